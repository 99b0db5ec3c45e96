"""The real model, objectives, loader and tokenizer, on a dataset of a few samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.load.loader import eval_batches
from pipeline.data.read.dataset import Dataset
from pipeline.data.text.vocabulary import build_tokenizer, load_tokenizer
from pipeline.errors import ConfigError
from pipeline.models.flops import EncodingFlops
from pipeline.objectives.objective import ObjectivesConfig
from pipeline.objectives.stream import CollatedBatch, StreamCollator
from pipeline.pretrained.folder import load_model
from pipeline.training.assembly import Assembly, assemble
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import train
from pipeline.training.spec import RankContext, TrainingSpec
from pipeline.training.tracking.metrics_log import read_events, read_metrics
from tests.data.tiny_dataset import EXTRACTOR, make_dataset, make_texts
from tests.training.stand_in import in_processes, train_on

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")
TRAINING = {"steps": 6, "global_batch_size": 12, "micro_batch_size": 3}
ANSWERS = ("yes", "no", "a cat")
SIZES = {
    "feature_dim": 8,
    "width": 12,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 20,
    "max_positions": 16,
}
TOWERS = {name: size for name, size in SIZES.items() if name != "num_layers"}
DUAL: dict[str, Any] = {
    "family": "late_fusion",
    "model": TOWERS | {"text_layers": 2, "region_layers": 1, "vocab_size": 90, "num_answers": 3},
    "answers": ANSWERS,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of 23 samples and a tokenizer built from its captions."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(str(folder / "dataset"))
    texts = [make_texts(number) for number in range(23)]
    captions = [caption for text in texts for caption in text.captions]
    build_tokenizer(iter(captions * 3), 90).save_pretrained(str(folder / "tokenizer"))
    return folder


def make_spec(data: Path, folder: Path, **changes: Any) -> TrainingSpec:
    sizes = SIZES | {"vocab_size": 90, "num_answers": len(changes.get("answers", ()))}
    spec: dict[str, Any] = {
        "phase": "pretrain",
        "folder": str(folder),
        "dataset": str(data / "dataset"),
        "dataset_version": newest_version(data),
        "features": EXTRACTOR,
        "family": "visualbert",
        "model": sizes,
        "tokenizer": str(data / "tokenizer"),
        "max_tokens": 9,
        "objectives": {"mlm": {}, "itm": {}, "lm": {}},
        "seed": 3,
        "card": {
            "recipe": "tiny",
            "family": "visualbert",
            "phase": changes.get("phase", "pretrain"),
            "max_tokens": 9,
            "data": {"dataset": "tiny", "version": 1, "split": "train", "features": EXTRACTOR},
            "objectives": changes.get("objectives", {}),
            "training": TrainingConfig.model_validate(TRAINING).model_dump(mode="json"),
            "seed": 3,
        },
        "training": TRAINING,
    }
    return TrainingSpec.model_validate(spec | changes)


def newest_version(data: Path) -> int:
    return Dataset.open(str(data / "dataset")).version


def steps_of(assembly: Assembly, start: int, world_size: int) -> list[list[Any]]:
    """The micro-batches of every step from `start` on, over all ranks in rank order."""
    ranks = [list(assembly.batches(start, rank, world_size)) for rank in range(world_size)]
    return [[batch for rank in ranks for batch in rank[step]] for step in range(len(ranks[0]))]


def words(batches: list[Any], stream: str) -> list[list[int]]:
    rows = []
    for batch in batches:
        inputs = batch.streams[stream].inputs
        for tokens, padding in zip(inputs.tokens, inputs.token_padding, strict=True):
            rows.append(tokens[~padding].tolist())
    return rows


def test_a_step_is_the_same_for_any_number_of_ranks_and_any_start(
    data: Path, tmp_path: Path
) -> None:
    assembly = assemble(make_spec(data, tmp_path))
    alone, pair, later = (
        steps_of(assembly, 0, 1),
        steps_of(assembly, 0, 2),
        steps_of(assembly, 4, 4),
    )
    assert [len(step) for step in alone] == [4] * 6
    for stream in ("captions-full", "captions-prefix"):
        alone_words = [words(step, stream) for step in alone]
        assert [words(step, stream) for step in pair] == alone_words
        assert [words(step, stream) for step in later] == alone_words[4:]


def test_another_dataset_is_mixed_in_by_weight_on_any_number_of_ranks(
    data: Path, tmp_path: Path
) -> None:
    make_dataset(str(tmp_path / "other"))
    other = {"dataset": str(tmp_path / "other"), "dataset_version": newest_version(data)}
    spec = make_spec(data, tmp_path, mixed_in=[other | {"split": "train", "weight": 2}])
    assembly = assemble(spec)
    alone = [words(step, "captions-full") for step in steps_of(assembly, 0, 1)]
    assert [words(step, "captions-full") for step in steps_of(assembly, 0, 2)] == alone
    plain = assemble(make_spec(data, tmp_path))
    assert [words(step, "captions-full") for step in steps_of(plain, 0, 1)] != alone


def test_objectives_of_two_kinds_of_text_share_a_step(data: Path, tmp_path: Path) -> None:
    spec = make_spec(
        data, tmp_path, objectives={"answer": {}, "lm": {}}, answers=ANSWERS, phase="finetune"
    )
    batch: Any
    (batch, *_), *_ = assemble(spec).batches(0, 0, 1)
    assert set(batch.streams) == {"captions-prefix", "questions-full"}
    assert batch.num_samples == 6


@pytest.mark.parametrize("blind", [False, True])
def test_micro_batches_take_at_most_so_many_tokens_and_a_step_is_the_same(
    data: Path, tmp_path: Path, blind: bool
) -> None:
    objectives: dict[str, Any] = {"answer": {}, "lm": {}, "itm": {}}
    most = 90
    spec, plain = (
        make_spec(
            data,
            tmp_path,
            objectives=objectives,
            answers=ANSWERS,
            blind=blind,
            training=TRAINING
            | {"micro_batch_size": 6, "loading": {"tokens_per_micro_batch": tokens}},
        )
        for tokens in (most, None)
    )
    streams = ("captions-full", "captions-prefix", "questions-full")
    for rank in range(2):
        cut = list(assemble(spec).batches(0, rank, 2))
        whole = list(assemble(plain).batches(0, rank, 2))
        for micro_batches, (share,) in zip(cut, whole, strict=True):
            batches: list[Any] = list(micro_batches)
            assert len(batches) > 1
            for batch in batches:
                sizes = {len(batch.streams[stream].inputs.tokens) for stream in streams}
                assert len(sizes) == 1
                assert batch.num_tokens_with_padding <= most or sizes == {1}
            assert sum(batch.num_samples for batch in batches) == share.num_samples
            for stream in streams:
                assert sorted(words(batches, stream)) == sorted(words([share], stream))


def test_the_mean_loss_is_that_over_samples_however_they_are_cut(
    data: Path, tmp_path: Path
) -> None:
    losses = []
    for tokens in (None, 70, 1):  # with one, each sample is by itself
        training = TRAINING | {
            "micro_batch_size": 12,
            "loading": {"tokens_per_micro_batch": tokens},
        }
        assembly = assemble(make_spec(data, tmp_path, training=training))
        assembly.module.eval()
        (step, *_) = assembly.batches(0, 0, 1)
        counts = [batch.num_samples for batch in step]
        with torch.no_grad():
            found = [assembly.module(batch)[0].item() for batch in step]
        losses.append(np.average(found, weights=counts))
    assert len(step) == 12
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_operations_are_those_of_real_tokens_and_regions(data: Path, tmp_path: Path) -> None:
    assembly = assemble(make_spec(data, tmp_path))
    assert assembly.flops is not None
    (batch, *_), *_ = assembly.batches(0, 0, 1)
    for one in batch.streams.values():  # type: ignore[attr-defined]
        one.inputs.token_padding[0, 4:] = True
        one.inputs.region_padding[1, :2] = True
    encoding = EncodingFlops(assembly.module.model.config)  # type: ignore[union-attr,arg-type]
    expected = [
        encoding.of(int((~padding).sum()), int((~regions).sum()))
        for one in batch.streams.values()  # type: ignore[attr-defined]
        for padding, regions in zip(
            one.inputs.token_padding, one.inputs.region_padding, strict=True
        )
    ]
    assert len(set(expected)) == 3
    assert assembly.flops(batch) == 3 * sum(expected)
    frozen = make_spec(
        data, tmp_path, training=TRAINING | {"optimizer": {"freeze": ("model.embed*",)}}
    )
    assert assemble(frozen).flops is None


def test_the_blind_twin_sees_no_region(data: Path, tmp_path: Path) -> None:
    batch: Any
    (batch, *_), *_ = assemble(make_spec(data, tmp_path, blind=True)).batches(0, 0, 1)
    for stream in batch.streams.values():
        assert stream.inputs.features.shape == (3, 0, 8)


def test_every_rank_starts_from_the_same_weights(data: Path, tmp_path: Path) -> None:
    first, second = (assemble(make_spec(data, tmp_path)).module for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.training


@pytest.mark.usefixtures("alone")
def test_held_out_losses_are_found_while_training(data: Path, tmp_path: Path) -> None:
    """Here of the training split itself, which is what the tiny dataset has features for."""
    spec = make_spec(
        data,
        tmp_path,
        held_out_split="train",
        training=TRAINING | {"evaluation": {"every_steps": 3}},
    )
    train(spec, HERE)
    found = [line["evaluation"] for line in read_metrics(spec.folder) if "evaluation" in line]
    assert [set(line) for line in found] == [{"loss", "mlm", "itm", "lm"}] * 2
    assert found[0]["loss"] == pytest.approx(sum(found[0][name] for name in ("mlm", "itm", "lm")))
    plain = make_spec(data, tmp_path / "plain")
    train(plain, HERE)
    assert read_metrics(plain.folder)[-1]["loss"] == read_metrics(spec.folder)[-1]["loss"]


def held_out(data: Path, folder: Path, sizes: tuple[int, int], **changes: Any) -> TrainingSpec:
    """A run that evaluates on the tiny dataset's training split."""
    training = TRAINING | {"evaluation": {"every_steps": 3}} | changes.pop("training", {})
    training |= dict(zip(("global_batch_size", "micro_batch_size"), sizes, strict=True))
    return make_spec(data, folder, held_out_split="train", training=training, **changes)


@torch.no_grad()
def figures(spec: TrainingSpec, rank_context: RankContext = HERE) -> dict[str, float]:
    assembly = assemble(spec)
    assert assembly.evaluate is not None
    return dict(assembly.evaluate(assembly.module.eval(), rank_context))


def figures_of_rank(rank: int, spec: TrainingSpec, expected: dict[str, float]) -> None:
    here = RankContext(rank, torch.distributed.get_world_size(), rank, "cpu")
    assert figures(spec, here) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def by_hand(spec: TrainingSpec) -> dict[str, float]:
    """The mean of each objective over every example of the split, one at a time, in row order."""
    module: Any = assemble(spec).module.eval()
    split = Dataset.open(spec.dataset).split("train", EXTRACTOR)
    objectives = ObjectivesConfig.model_validate(spec.objectives).build()
    means = {}
    for objective in objectives:
        kind = objective.stream.kind
        collate = StreamCollator([objective], load_tokenizer(spec.tokenizer), 9, ANSWERS)
        found = [
            float(module(CollatedBatch({objective.stream.name: collate(batch)}))[1][objective.name])
            for batch in eval_batches(split, kind, 1)
        ]
        assert len(found) == split.num_texts(kind)
        means[objective.name] = float(np.mean(found))
    total = sum(objective.weight * means[objective.name] for objective in objectives)
    return {"loss": total, **means}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sizes", [(12, 3), (7, 7), (50, 5)])
def test_held_out_figures_are_means_over_every_example_once(
    data: Path, tmp_path: Path, sizes: tuple[int, int]
) -> None:
    objectives: dict[str, Any] = {"answer": {"weight": 2.0}, "lm": {}}
    spec = held_out(data, tmp_path, sizes, objectives=objectives, answers=ANSWERS)
    assert figures(spec) == pytest.approx(by_hand(spec), rel=1e-5)


@pytest.mark.processes
@pytest.mark.usefixtures("alone")
def test_held_out_figures_know_neither_batch_size_nor_ranks(data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "objectives": {"answer": {}, "lm": {}, "itm": {}, "mlm": {"texts": ["captions"]}},
        "answers": ANSWERS,
    }
    shares = {"answer": 1.0, "lm": 2.0, "itm": 3.0, "mlm": 1.0}
    for turns in ({}, {"one_per_step": shares}):  # all in a step, one in each
        changes["objectives"] |= turns
        expected = figures(held_out(data, tmp_path, (12, 3), **changes))
        assert set(expected) == {"loss", "answer", "lm", "itm", "mlm"}
        for sizes in ((8, 8), (5, 2)):
            spec = held_out(data, tmp_path, sizes, **changes)
            assert figures(spec) == pytest.approx(expected, rel=1e-5)
            for world_size in (2, 3):
                exits = in_processes(world_size, figures_of_rank, spec, expected)
                assert exits == [0] * world_size
    parts = sum(expected[name] * share / 7 for name, share in shares.items())
    assert expected["loss"] == pytest.approx(parts, rel=1e-6)


@pytest.mark.usefixtures("alone")
def test_at_most_so_many_examples_are_held_out(data: Path, tmp_path: Path) -> None:
    def few_of(count: int) -> dict[str, Any]:
        return {"evaluation": {"every_steps": 3, "examples": count}}

    few, many = (held_out(data, tmp_path, (12, 3), training=few_of(count)) for count in (5, 1000))
    assert figures(few) == pytest.approx(
        figures(held_out(data, tmp_path, (4, 4), training=few_of(5))),
        rel=1e-5,
    )
    assert figures(few) != pytest.approx(figures(many), rel=1e-3)
    assert figures(many) == figures(held_out(data, tmp_path, (12, 3)))


@pytest.mark.processes
@pytest.mark.usefixtures("alone")
def test_contrast_is_held_out_in_global_batches_of_like_size(data: Path, tmp_path: Path) -> None:
    """33 captions in global batches of 12: three of 11, of which each of two ranks has a part."""
    changes: dict[str, Any] = {"objectives": {"itc": {}, "answer": {}}, **DUAL}
    expected = figures(held_out(data, tmp_path, (12, 12), **changes))
    spec = held_out(data, tmp_path, (12, 6), **changes)
    assert in_processes(2, figures_of_rank, spec, expected) == [0, 0]
    uncut = held_out(data, tmp_path, (33, 33), **changes)
    assert figures(uncut)["itc"] > expected["itc"]
    assert figures(uncut)["answer"] == pytest.approx(expected["answer"], rel=1e-5)


def test_a_global_batch_that_is_needed_whole_may_not_be_cut(data: Path, tmp_path: Path) -> None:
    assembly = assemble(make_spec(data, tmp_path, objectives={"itc": {}}, **DUAL))
    with pytest.raises(ConfigError, match="global_batch_size = micro_batch_size x ranks"):
        next(assembly.batches(0, 0, 1))
    assert next(assembly.batches(0, 0, 4))


@pytest.mark.usefixtures("alone")
def test_a_model_is_pretrained_saved_and_fine_tuned(data: Path, tmp_path: Path) -> None:
    pretrain = make_spec(
        data,
        tmp_path / "pretrain",
    )
    assert train(pretrain, HERE).model_folder == str(tmp_path / "pretrain" / "model")
    assert set(read_metrics(pretrain.folder)[0]["losses"]) == {"mlm", "itm", "lm"}
    saved = load_model(str(tmp_path / "pretrain" / "model"))
    assert saved.card["phase"] == "pretrain"
    weights = {name: tensor.clone() for name, tensor in saved.model.named_parameters()}

    finetune = make_spec(
        data,
        tmp_path / "finetune",
        phase="finetune",
        objectives={"answer": {}, "lm": {}},
        answers=ANSWERS,
        initial=str(tmp_path / "pretrain" / "model"),
        training={
            "steps": 30,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "optimizer": {"learning_rate": 3e-3},
        },
    )
    start = dict(assemble(finetune).module.model.named_parameters())  # type: ignore[union-attr]
    assert all(torch.equal(start[name], tensor) for name, tensor in weights.items())
    train(finetune, HERE)
    losses = [line["losses"]["answer"] for line in read_metrics(finetune.folder)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert load_model(str(tmp_path / "finetune" / "model")).answers == ANSWERS


@pytest.mark.usefixtures("alone")
def test_an_answer_head_is_taken_over_only_for_the_same_answers(data: Path, tmp_path: Path) -> None:
    first = make_spec(
        data, tmp_path / "first", objectives={"answer": {}}, answers=ANSWERS, phase="finetune"
    )
    train(first, HERE)
    initial = str(tmp_path / "first" / "model")
    trained = load_model(initial).model.state_dict()
    same = make_spec(data, tmp_path, objectives={"answer": {}}, answers=ANSWERS, initial=initial)
    other = make_spec(
        data, tmp_path, objectives={"answer": {}}, answers=("red", "blue"), initial=initial
    )
    taken = assemble(same).module.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(taken[name], tensor) for name, tensor in trained.items())
    fresh = assemble(other).module.model.state_dict()  # type: ignore[union-attr]
    differing = {name for name, tensor in trained.items() if not equal(fresh[name], tensor)}
    assert differing
    assert all(name.startswith("answer_head") for name in differing)


@pytest.mark.usefixtures("alone")
def test_what_was_taken_over_is_told_in_the_log_and_on_the_models_card(
    data: Path, tmp_path: Path
) -> None:
    first = make_spec(data, tmp_path / "first", objectives={"answer": {}}, answers=ANSWERS)
    train(first, HERE)
    initial = str(tmp_path / "first" / "model")
    second = make_spec(
        data,
        tmp_path / "second",
        model=SIZES | {"vocab_size": 90, "num_layers": 3},
        initial=initial,
    )
    train(second, HERE)
    told = read_events(second.folder)[0]
    assert told["event"] == "initialised"
    assert told["initial"] == initial
    assert told["new_parameters"] == ["layers.2 (12)"]
    assert told["left_out_tensors"] == ["cls (2)"]
    assert "12 new: layers.2 (12); 2 left out: cls (2)" in told["summary"]
    page = (tmp_path / "second" / "model" / "README.md").read_text()
    assert f"| from | {initial} |" in page
    assert "| new (12) | layers.2 (12) |" in page
    assert load_model(str(tmp_path / "second" / "model")).card["initial"]["left_out"] == 2


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("stage", "precision", "tokens"), [(1, "fp32", None), (3, "bf16", None), (2, "fp32", 60)]
)
def test_the_real_model_trains_on_two_ranks_and_goes_on_bit_by_bit(
    data: Path, tmp_path: Path, stage: int, precision: str, tokens: int | None
) -> None:
    training = {
        "steps": 6,
        "global_batch_size": 12,
        "micro_batch_size": 3,
        "checkpoints": {"every_steps": 2},
        "zero_stage": stage,
        "precision": precision,
        "loading": {"tokens_per_micro_batch": tokens},
    }
    unbroken, broken = (
        make_spec(data, tmp_path / name, training=training) for name in ("unbroken", "broken")
    )
    train_on(2, unbroken, assemble)
    assert in_processes(2, train_to_step_5, broken) != [0, 0]
    train_on(2, broken, assemble)
    first, second = (
        [(line["loss"], line["losses"], line["grad_norm"]) for line in read_metrics(spec.folder)]
        for spec in (unbroken, broken)
    )
    assert first == second
    assert len(first) == 6


def train_to_step_5(rank: int, spec: TrainingSpec) -> None:
    def assemble_ending(spec: TrainingSpec) -> Assembly:
        assembly = assemble(spec)

        def batches(start: int, rank: int, world_size: int) -> Any:
            source = assembly.batches(start, rank, world_size)
            yield from (next(source) for _ in range(4))

        return replace(assembly, batches=batches)

    train(spec, RankContext(rank, 2, rank, "cpu"), assemble_ending)
