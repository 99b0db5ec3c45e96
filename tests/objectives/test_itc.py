"""Image-text contrast: the same negatives and the same update on any number of ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F  # noqa: N812

from pipeline.errors import ModelError
from pipeline.objectives.stream import ObjectiveModel
from tests.objectives import ranks
from tests.objectives.tiny import collated, make_batch, make_family, make_objectives, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.mark.processes
def test_two_ranks_give_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    loss, gradient = ranks.contrast(ranks.NUM_SAMPLES, first=0)
    shared_loss, shared_gradient = ranks.contrast_on(2, tmp_path)
    torch.testing.assert_close(shared_loss, loss, rtol=0, atol=1e-6)
    assert shared_gradient.keys() == gradient.keys()
    for name, expected in gradient.items():
        torch.testing.assert_close(shared_gradient[name], expected, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_of_both_directions_of_clip(tokenizer: Any) -> None:
    model = make_family("late_fusion", len(tokenizer))
    objectives = make_objectives(itc={})
    batch = collated(objectives, tokenizer, make_batch(4))
    stream = batch.streams["captions-full-intact"]
    encoded = model.encode(stream.inputs)
    found = objectives[0].loss(model, encoded, stream.inputs, stream.targets["itc"])
    texts, images = model.contrastive(encoded, stream.inputs)  # type: ignore[operator]
    logits = texts @ images.T / 0.07
    diagonal = torch.arange(4)
    expected = F.cross_entropy(logits, diagonal) / 2 + F.cross_entropy(logits.T, diagonal) / 2
    torch.testing.assert_close(found.mean(), expected)


def test_another_caption_of_the_same_image_is_no_negative(tokenizer: Any) -> None:
    objectives = make_objectives(itc={})
    module = ObjectiveModel(make_family("late_fusion", len(tokenizer)), objectives)

    def loss(batch: Any) -> float:
        return float(module(collated(objectives, tokenizer, batch))[0].detach())

    one, batch = make_batch(1), make_batch(3)
    assert loss(one) == 0  # nothing to tell it from
    twins = replace(batch, rows=np.array([5, 5, 5]))
    assert loss(twins) == 0
    assert loss(batch) > 0


def test_its_stream_is_neither_masked_nor_mismatched(tokenizer: Any) -> None:
    objectives = make_objectives(itc={}, mlm={}, itm={"mismatch_probability": 0.999})
    batch = collated(objectives, tokenizer, make_batch())
    intact = batch.streams["captions-full-intact"]
    assert intact.is_matched.all()
    assert not (intact.inputs.tokens == tokenizer.mask_token_id).any()
    assert not batch.streams["captions-full"].is_matched.any()


@pytest.mark.processes
def test_ranks_of_other_sizes_judge_as_one_does(tmp_path: Path) -> None:
    figures = ranks.judged(ranks.NUM_SAMPLES, first=0)
    sizes = (1, 3, 2)
    start_processes(ranks.judge_on, (sizes, str(tmp_path)), nprocs=3)  # type: ignore[no-untyped-call]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    torch.testing.assert_close(torch.cat(parts), figures)


def test_a_model_without_two_encoders_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="late_fusion"):
        ObjectiveModel(make_family("lxmert", len(tokenizer)), make_objectives(itc={}))
