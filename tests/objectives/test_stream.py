"""Batches to inputs with targets and to losses: nothing depends on what shares the batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.load.loader import Batch
from pipeline.errors import ConfigError, FeatureError
from pipeline.objectives.base import IGNORED, Objective, Vocabulary
from pipeline.objectives.objective import ObjectivesConfig, by_stream
from pipeline.objectives.stream import (
    ObjectiveModel,
    StreamCollator,
    encode_texts,
    make_inputs,
)
from tests.objectives.tiny import (
    ANSWERS,
    collated,
    make_batch,
    make_family,
    make_model,
    make_objectives,
    make_texts,
    make_tokenizer,
    part,
    tensors,
)

ALL: dict[str, Any] = {"mlm": {}, "itm": {"weight": 0.5}, "lm": {"weight": 2.0}, "answer": {}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def objectives() -> list[Objective]:
    return ObjectivesConfig.model_validate(ALL).build()


def losses_of(
    objectives: list[Objective], tokenizer: Any, batch: Any, blind: bool = False
) -> tuple[float, dict[str, float]]:
    module = ObjectiveModel(make_model(len(tokenizer)), objectives)
    total, losses = module(collated(objectives, tokenizer, batch, blind))
    return float(total.detach()), {name: float(loss) for name, loss in losses.items()}


@pytest.mark.parametrize("blind", [False, True])
def test_a_samples_losses_are_the_same_alone_and_in_any_batch(
    objectives: list[Objective], tokenizer: Any, blind: bool
) -> None:
    _, whole = losses_of(objectives, tokenizer, make_batch(6), blind)
    alone = [losses_of(objectives, tokenizer, make_batch(1, first=i), blind)[1] for i in range(6)]
    pairs = [losses_of(objectives, tokenizer, make_batch(2, first=i), blind)[1] for i in (0, 2, 4)]
    for name, mean in whole.items():
        assert np.mean([losses[name] for losses in alone]) == pytest.approx(mean, abs=2e-6), name
        assert np.mean([losses[name] for losses in pairs]) == pytest.approx(mean, abs=2e-6), name


def test_the_total_is_the_weighted_sum(objectives: list[Objective], tokenizer: Any) -> None:
    total, losses = losses_of(objectives, tokenizer, make_batch())
    assert set(losses) == {"mlm", "itm", "lm", "answer"}
    expected = losses["mlm"] + 0.5 * losses["itm"] + 2 * losses["lm"] + losses["answer"]
    assert total == pytest.approx(expected)


def test_every_loss_reaches_the_weights_and_what_is_reported_is_detached(
    objectives: list[Objective], tokenizer: Any
) -> None:
    model = make_model(len(tokenizer))
    total, losses = ObjectiveModel(model, objectives)(collated(objectives, tokenizer, make_batch()))
    total.backward()
    assert not any(loss.requires_grad for loss in losses.values())
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert not without


def test_one_forward_pass_serves_the_objectives_of_a_stream(
    objectives: list[Objective], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(len(tokenizer))
    masks = []
    encode = model.encode

    def counted(inputs: Any, *, mask: Any, attention: bool) -> Any:
        masks.append(mask)
        return encode(inputs, mask=mask, attention=attention)

    monkeypatch.setattr(model, "encode", counted)
    ObjectiveModel(model, objectives)(collated(objectives, tokenizer, make_batch()))
    assert sorted(masks) == ["full", "full", "prefix"]  # itm and mlm, answer, lm


def test_corruption_is_a_function_of_seed_step_and_position(
    objectives: list[Objective], tokenizer: Any
) -> None:
    def tokens(batch: Any) -> torch.Tensor:
        return collated(objectives, tokenizer, batch).streams["captions-full"].inputs.tokens

    assert torch.equal(tokens(make_batch()), tokens(make_batch()))
    others = [tokens(make_batch(step=step)) for step in (4, 5, 6)]
    assert any(
        other.shape != tokens(make_batch()).shape or not torch.equal(other, tokens(make_batch()))
        for other in others
    )
    later = tokens(make_batch(2, first=3))
    assert torch.equal(tokens(make_batch())[3:5, : later.shape[1]], later)


def test_captions_and_questions_have_their_special_tokens(tokenizer: Any) -> None:
    def written(texts: list[str], kind: Any, max_tokens: int) -> list[str]:
        encodings = encode_texts(texts, kind, tokenizer, Vocabulary.of(tokenizer), max_tokens)
        assert encodings.tokens.shape == encodings.padding.shape == encodings.is_word.shape
        return [tokenizer.decode(row) for row in encodings.tokens]

    assert written(["a red dog", "cat"], "captions", 9) == [
        "[CLS] a red dog [SEP]",
        "[CLS] cat [SEP] [PAD] [PAD]",
    ]
    assert written(["is the dog red"], "questions", 9) == ["[CLS] is the dog red [MASK] [SEP]"]
    assert written(["is the dog red"], "questions", 5) == ["[CLS] is the [MASK] [SEP]"]
    assert written([""], "captions", 5) == ["[CLS] [SEP]"]


def test_a_text_that_spells_a_special_token_has_none(tokenizer: Any) -> None:
    vocabulary = Vocabulary.of(tokenizer)
    encodings = encode_texts(["a [MASK] [SEP]"], "captions", tokenizer, vocabulary, 24)
    inside = encodings.tokens[encodings.is_word]
    assert not set(inside.tolist()) & {vocabulary.mask, vocabulary.sep}


def test_is_word_marks_the_text_only(tokenizer: Any) -> None:
    encodings = encode_texts(
        ["a red dog", "cat"], "questions", tokenizer, Vocabulary.of(tokenizer), 24
    )
    assert encodings.is_word.astype(int).tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert encodings.padding.astype(int).tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_padding_goes_only_to_the_longest_of_the_batch(
    objectives: list[Objective], tokenizer: Any
) -> None:
    for size in (1, 4):
        for stream in collated(objectives, tokenizer, make_batch(size)).streams.values():
            assert not stream.inputs.token_padding.all(0).any()
            assert not stream.inputs.region_padding.all(0).any()


def test_counts_tell_real_tokens_from_padding(objectives: list[Objective], tokenizer: Any) -> None:
    batch = collated(objectives[:1], tokenizer, make_batch(3))
    inputs = batch.streams["captions-full"].inputs
    assert batch.num_samples == 3
    assert batch.num_tokens_with_padding == inputs.tokens.numel() + 3 * 3
    assert batch.num_tokens == int((~inputs.token_padding).sum()) + 1 + 2 + 3


def test_moving_casts_features_and_boxes_but_not_pixels(
    objectives: list[Objective], tokenizer: Any
) -> None:
    batch = make_batch(3)
    assert batch.features
    moved = collated(objectives, tokenizer, batch).to(torch.device("cpu"), torch.bfloat16)
    for stream in moved.streams.values():
        assert stream.inputs.features.dtype == stream.inputs.boxes.dtype == torch.bfloat16
    assert moved.streams["questions-full"].targets["answer"].dtype == torch.float32
    pixels = replace(batch.features, values=np.zeros((3, 3, 7), np.uint8))
    moved = collated(objectives, tokenizer, replace(batch, features=pixels)).to(
        torch.device("cpu"), torch.bfloat16
    )
    assert moved.streams["captions-full"].inputs.features.dtype == torch.uint8


def test_a_blind_model_is_shown_no_region(objectives: list[Objective], tokenizer: Any) -> None:
    for given in (make_batch(3), replace(make_batch(3), features=None)):
        batch = collated(objectives, tokenizer, given, blind=True)
        assert all(stream.inputs.features.shape == (3, 0, 7) for stream in batch.streams.values())


def test_a_batch_without_features_is_refused(tokenizer: Any) -> None:
    encodings = encode_texts(["a"], "captions", tokenizer, Vocabulary.of(tokenizer), 24)
    with pytest.raises(FeatureError, match="no features"):
        make_inputs(encodings, None)


def test_the_text_that_an_example_is_about_is_read(
    objectives: list[Objective], tokenizer: Any
) -> None:
    batch = replace(make_batch(2), text_index=np.array([0, 1]))
    lm = [objective for objective in objectives if objective.name == "lm"]
    tokens = collated(lm, tokenizer, batch).streams["captions-prefix"].inputs.tokens
    read = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert read == [make_texts(0).captions[0], make_texts(1).captions[1]]


EVERYTHING: dict[str, Any] = {
    "mlm": {"texts": ["captions", "questions"], "whole_words": True, "matched_only": True},
    "itm": {"texts": ["captions", "questions"]},
    "mrm": {
        "texts": ["captions", "questions"],
        "zeroed": 0.8,
        "exchanged": 0.1,
        "features": {"distance": "smooth-l1"},
        "classes": {"distance": "label"},
        "attributes": {"distance": "label"},
    },
    "qa": {},
}


def test_every_pretraining_loss_of_lxmert_is_the_same_alone_and_in_any_batch(
    tokenizer: Any,
) -> None:
    objectives = make_objectives(**EVERYTHING)
    module = ObjectiveModel(make_family("lxmert", len(tokenizer)), objectives)

    def losses(size: int, first: int) -> dict[str, float]:
        batch = collated(objectives, tokenizer, make_batch(size, first=first))
        return {name: float(loss) for name, loss in module(batch)[1].items()}

    whole = losses(6, 0)
    assert set(whole) == {
        *("mlm", "mlm-questions", "itm", "itm-questions", "mrm", "mrm-questions", "qa")
    }
    alone = [losses(1, i) for i in range(6)]
    pairs = [losses(2, i) for i in (0, 2, 4)]
    for name, mean in whole.items():
        assert np.mean([one[name] for one in alone]) == pytest.approx(mean, abs=2e-6), name
        assert np.mean([one[name] for one in pairs]) == pytest.approx(mean, abs=2e-6), name


def test_a_mismatched_pair_costs_a_matched_only_objective_nothing(tokenizer: Any) -> None:
    objectives = make_objectives(mlm={"matched_only": True}, itm={"mismatch_probability": 0.999})
    module = ObjectiveModel(make_family("vilbert", len(tokenizer)), objectives)
    batch = collated(objectives, tokenizer, make_batch())
    assert not batch.streams["captions-full"].is_matched.any()
    assert module(batch)[1]["mlm"] == 0
    assert module(batch)[1]["itm"] > 0


def test_where_a_step_trains_one_objective_all_else_is_left_out(tokenizer: Any) -> None:
    objectives = make_objectives(
        mlm={},
        itm={},
        mrm={"features": {}},
        lm={},
        one_per_step={"mlm": 2, "itm": 2, "mrm": 1, "lm": 1},
    )
    module = ObjectiveModel(make_family("uniter", len(tokenizer)), objectives)
    seen = set()
    for step in range(20):
        batch = collated(objectives, tokenizer, make_batch(2, step=step))
        total, losses = module(batch)
        ((name, loss),) = losses.items()
        assert total == loss
        assert batch.num_samples == 2
        captions = batch.streams["captions-full"]
        if name == "mrm":  # UNITER hides regions or words, never both
            assert not (captions.inputs.tokens == tokenizer.mask_token_id).any()
            assert captions.inputs.masked_regions is not None
        if name != "itm" and captions.targets:
            assert captions.is_matched.all()
        seen.add(name)
    assert seen == {"mlm", "itm", "mrm", "lm"}


def test_a_blind_model_cannot_be_trained_on_regions(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"objectives\.mrm: a blind model has no regions"):
        collated(make_objectives(mrm={"features": {}}), tokenizer, make_batch(), blind=True)


def test_pieces_know_the_word_that_they_are_of(tokenizer: Any) -> None:
    encodings = encode_texts(
        ["a dogdog red", "cat"], "captions", tokenizer, Vocabulary.of(tokenizer), 24
    )
    assert encodings.words is not None
    pieces = tokenizer.convert_ids_to_tokens(encodings.tokens[0])
    starts = [not piece.startswith("##") for piece in pieces[1:-1]]
    assert encodings.words[0, 1:-1].tolist() == (np.cumsum(starts) - 1).tolist()
    assert not all(starts)


def test_what_is_drawn_is_what_runs_have_drawn_so_far(tokenizer: Any) -> None:
    """Recorded values: a run that goes on after an update goes on with the same examples."""
    shares = {"mask_fraction": 0.4, "zeroed": 0.6, "exchanged": 0.3}
    objectives = make_objectives(mlm={}, itm={}, qa={}, mrm={"features": {}} | shares)
    batch = make_batch(6)
    streams = collated(objectives, tokenizer, batch).streams
    captions, questions = streams["captions-full"], streams["questions-full"]
    assert captions.targets["itm"].tolist() == [False, True, True, True, True, True]
    assert questions.targets["qa"].tolist() == [0, 0, 2, 0, 2, 2]
    words = captions.targets["mlm"]
    chosen = [[0, 2], [1, 2], [2, 5], [3, 2], [3, 6], [4, 4], [4, 9], [5, 6]]
    assert (words != IGNORED).nonzero().tolist() == chosen
    assert [int(words[i, at]) for i, at in chosen] == [73, 76, 75, 76, 50, 77, 53, 50]
    shown = [int(captions.inputs.tokens[i, at]) for i, at in chosen]
    assert shown == [4, 76, 4, 4, 39, 4, 4, 4]  # 4 is [MASK]
    regions = captions.inputs
    chosen = [[0, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 3], [4, 3], [5, 0]]
    assert captions.targets["mrm"].chosen.nonzero().tolist() == chosen
    assert regions.masked_regions is not None
    masked = [[0, 0], [1, 1], [2, 0], [3, 3], [5, 0]]
    assert regions.masked_regions.nonzero().tolist() == masked
    assert batch.features is not None
    before = torch.from_numpy(batch.features.values)
    assert torch.equal(regions.features[2, 1], before[2, 1])
    assert torch.equal(regions.features[3, 0], before[3, 3])
    assert torch.equal(regions.features[4, 3], before[4, 2])


def with_labels(batch: Batch) -> Batch:
    """What an extractor gives that tells one class a region and, of each, how sure it is."""
    features = batch.features
    assert features is not None
    assert features.classes is not None
    labels = features.classes.argmax(-1).astype(np.int32)
    scores = features.classes.max(-1)
    given = replace(features, classes=None, attributes=None, labels=labels, scores=scores)
    return replace(batch, features=given)


@pytest.mark.parametrize(
    "settings",
    [
        ALL | {"itc": {}},
        {
            "mlm": {"texts": ("captions", "questions"), "whole_words": True},
            "itm": {"texts": ("captions", "questions")},
            "mrm": {"features": {}, "classes": {}, "attributes": {}, "exchanged": 0.0},
            "qa": {},
        },
        {"mrm": {"classes": {"distance": "label"}, "zeroed": 0.5, "exchanged": 0.5}, "mlm": {}},
        {"itm": {"mismatch_probability": 0.9}, "mrm": {"features": {}, "mask_fraction": 0.8}},
    ],
)
@pytest.mark.parametrize("blind", [False, True])
def test_samples_selected_of_a_batch_are_those_collated_by_themselves(
    settings: dict[str, Any], blind: bool, tokenizer: Any
) -> None:
    if blind:
        settings = {name: of_one for name, of_one in settings.items() if name != "mrm"}
    rng = np.random.default_rng(2)
    narrower = 0
    for collate in (
        StreamCollator(group, tokenizer, 24, ANSWERS, 7 if blind else None)
        for group in by_stream(make_objectives(**settings)).values()
    ):
        for step in range(4):
            batch = make_batch(10, step=step)
            if "distance" in str(settings):
                batch = with_labels(batch)
            whole = collate(batch)
            for size in (1, 2, 3, 9, 10):
                samples = rng.choice(10, size, replace=False)
                found = collate.select(whole, torch.from_numpy(samples))
                expected = collate(part(batch, samples.tolist()))
                assert found.targets.keys() == expected.targets.keys()
                pairs = zip(tensors(found), tensors(expected), strict=True)
                for ours, alone in pairs:
                    assert ours.dtype == alone.dtype
                    assert ours.is_contiguous()
                    assert torch.equal(ours, alone)
                narrower += found.inputs.tokens.shape[1] < whole.inputs.tokens.shape[1]
    assert narrower
