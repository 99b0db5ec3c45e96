"""Every family with every objective it can be trained on: one update, and a handful learned."""

from typing import Any

import pytest
import torch

from pipeline.models.families import FAMILIES
from pipeline.objectives.stream import ObjectiveModel
from tests.objectives.tiny import collated, make_batch, make_family, make_objectives, make_tokenizer

TEXT_AND_MATCH: dict[str, Any] = {"mlm": {}, "itm": {}, "answer": {}, "qa": {}}
REGIONS: dict[str, Any] = {"features": {}, "classes": {}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "visualbert": {**TEXT_AND_MATCH, "lm": {}},
    "lxmert": {**TEXT_AND_MATCH, "mrm": {**REGIONS, "attributes": {"distance": "label"}}},
    "vilbert": {**TEXT_AND_MATCH, "mrm": {"classes": {}, "zeroed": 0.9}},
    "uniter": {**TEXT_AND_MATCH, "lm": {}, "mrm": REGIONS},
    "late_fusion": {**TEXT_AND_MATCH, "itc": {}},
    "attention_fusion": TEXT_AND_MATCH,
    "visual_prefix": {"itm": {}, "lm": {}, "answer": {}, "qa": {}},
}
PAIRS = [(family, name) for family, settings in OBJECTIVES.items() for name in settings]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_every_family_is_trained_here() -> None:
    assert set(OBJECTIVES) == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), PAIRS, ids=map("-".join, PAIRS))
def test_a_handful_of_samples_is_learned(family: str, name: str, tokenizer: Any) -> None:
    objectives = make_objectives(**{name: OBJECTIVES[family][name]})
    module = ObjectiveModel(make_family(family, len(tokenizer)), objectives)
    batch = collated(objectives, tokenizer, make_batch(4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3, weight_decay=0.0)
    first = float(module(batch)[0].detach())
    # soft targets leave their entropy when every prediction is right
    share_left = 0.6 if name in ("answer", "mrm") else 0.1
    for _ in range(150):
        optimizer.zero_grad()
        loss, _ = module(batch)
        loss.backward()
        optimizer.step()
    assert float(module(batch)[0].detach()) < share_left * first
    ((_, metric),) = module.measure(batch).items()
    assert metric > 0.9


@pytest.mark.parametrize("family", OBJECTIVES)
def test_one_step_with_all_objectives_updates_what_they_use(family: str, tokenizer: Any) -> None:
    objectives = make_objectives(**OBJECTIVES[family])
    module = ObjectiveModel(make_family(family, len(tokenizer)), objectives).train()
    batch = collated(objectives, tokenizer, make_batch())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    total, losses = module(batch)
    assert set(losses) == set(OBJECTIVES[family])
    total.backward()
    optimizer.step()
    assert not torch.equal(module(batch)[0], total)
    assert not {
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    }
