"""Distillation: a frozen teacher that no optimizer sees, and what is learned of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F  # noqa: N812

from pipeline.data.read.features import FeatureBatch
from pipeline.errors import ConfigError, FeatureError, ModelError
from pipeline.models.base import VisionLanguageModel
from pipeline.models.families import to_saved
from pipeline.objectives.base import Objective
from pipeline.objectives.distill import Distillation, DistillConfig
from pipeline.objectives.objective import by_stream
from pipeline.objectives.stream import ObjectiveModel, StreamCollator
from tests.objectives.tiny import (
    ANSWERS,
    collated,
    make_batch,
    make_family,
    make_objectives,
    make_tokenizer,
    part,
    tensors,
)

EVERYTHING: dict[str, Any] = {"words": {}, "match": {}, "hidden": {}, "attention": {}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def saved(folder: Path, model: VisionLanguageModel, tokenizer: Any) -> str:
    """Writes a model folder as training does."""
    folder.mkdir()
    document, tensors = to_saved(model.config, dict(model.named_parameters()), ANSWERS)
    (folder / "config.json").write_text(json.dumps(document))
    safetensors.torch.save_file(tensors, str(folder / "model.safetensors"))
    (folder / "sightline.json").write_text(json.dumps({"answers": ANSWERS}))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def unlike(model: VisionLanguageModel) -> VisionLanguageModel:
    """Draws larger weights, so that what the model says of two inputs differs by more."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A teacher wider than its students, with more heads."""
    model = make_family("visualbert", len(tokenizer), width=24, num_heads=3)
    return saved(tmp_path_factory.mktemp("wide") / "model", unlike(model), tokenizer)


def distilled(teacher: str, **terms: Any) -> list[Objective]:
    return make_objectives(mlm={}, itm={}, distill={"teacher": teacher, **terms})


def distill_loss(
    module: ObjectiveModel, objectives: list[Objective], tokenizer: Any, batch: Any
) -> float:
    return float(module(collated(objectives, tokenizer, batch))[1]["distill"])


@pytest.mark.parametrize(
    "family", ["visualbert", "lxmert", "vilbert", "uniter", "attention_fusion"]
)
def test_a_model_has_nothing_to_learn_of_itself(
    family: str, tmp_path: Path, tokenizer: Any
) -> None:
    model = unlike(make_family(family, len(tokenizer)))
    teacher = saved(tmp_path / "model", model, tokenizer)
    objectives = distilled(teacher, **EVERYTHING)
    module = ObjectiveModel(model, objectives)
    assert distill_loss(module, objectives, tokenizer, make_batch()) == pytest.approx(0, abs=1e-5)
    metrics = module.measure(collated(objectives, tokenizer, make_batch()))
    assert metrics["distill/agreement"] == 1
    questions = make_objectives(distill={"teacher": teacher, "texts": "questions", "answers": {}})
    asked = collated(questions, tokenizer, make_batch())
    loss, _ = ObjectiveModel(model, questions)(asked)
    probabilities = (
        model.answer_logits(model.encode(inputs := asked.streams["questions-full"].inputs), inputs)
        .div(2)
        .sigmoid()
    )
    entropy = F.binary_cross_entropy(probabilities, probabilities, reduction="none").sum(1).mean()
    torch.testing.assert_close(loss, 4 * entropy)  # the least that cross-entropy can be


def test_no_optimizer_or_checkpoint_knows_the_teacher(wide: str, tokenizer: Any) -> None:
    student = make_family("visualbert", len(tokenizer))
    objectives = distilled(wide, **EVERYTHING)
    module = ObjectiveModel(student, objectives)
    own = {f"model.{name}" for name, _ in student.named_parameters()}
    learned = {name for name, _ in module.named_parameters()} - own
    assert learned == {"learned.distill.weight", "learned.distill.bias"}  # 16 to 24
    assert set(module.state_dict()) - set(own) >= learned
    assert not any("teacher" in name for name in module.state_dict())
    objective = next(one for one in objectives if isinstance(one, Distillation))
    teacher = objective.teacher.model
    before = [parameter.clone() for parameter in teacher.parameters()]
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module(collated(objectives, tokenizer, make_batch()))[0].backward()
    optimizer.step()
    assert not teacher.training
    for parameter, old in zip(teacher.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)
    (gradient,) = (
        parameter.grad
        for name, parameter in module.named_parameters()
        if name == "learned.distill.weight"
    )
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize("term", list(EVERYTHING))
def test_each_term_teaches(term: str, wide: str, tokenizer: Any) -> None:
    objectives = make_objectives(
        mlm={"weight": 1e-9}, distill={"teacher": wide, term: {"weight": 2.0}}
    )
    module = ObjectiveModel(make_family("visualbert", len(tokenizer)), objectives)
    batch = collated(objectives, tokenizer, make_batch())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    first = float(module(batch)[1]["distill"])
    for _ in range(40):
        optimizer.zero_grad()
        loss, losses = module(batch)
        loss.backward()
        optimizer.step()
    assert float(losses["distill"]) < 0.5 * first


def test_a_writer_learns_the_next_words_of_another_beside_its_own_captions(
    wide: str, tokenizer: Any
) -> None:
    objectives = make_objectives(
        lm={"weight": 1e-9}, distill={"teacher": wide, "next_words": {"temperature": 1.0}}
    )
    module = ObjectiveModel(make_family("uniter", len(tokenizer)), objectives)
    batch = collated(objectives, tokenizer, make_batch())
    assert list(batch.streams) == ["captions-prefix"]  # one pass for both
    view = batch.streams["captions-prefix"].targets["distill-next-words"]
    assert torch.equal(view.word_mask, batch.streams["captions-prefix"].targets["lm"] != -100)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    first = float(module(batch)[1]["distill-next-words"])
    for _ in range(40):
        optimizer.zero_grad()
        loss, losses = module(batch)
        loss.backward()
        optimizer.step()
    assert float(losses["distill-next-words"]) < 0.5 * first
    assert module.measure(batch)["distill-next-words/agreement"] > 0.7


def test_what_is_learned_under_both_masks_is_two_objectives(wide: str) -> None:
    built = make_objectives(distill={"teacher": wide, "match": {}, "next_words": {}})
    assert [one.name for one in built] == ["distill", "distill-next-words"]
    assert [one.stream.mask for one in built] == ["full", "prefix"]


def test_a_samples_loss_is_the_same_alone_and_in_any_batch(wide: str, tokenizer: Any) -> None:
    objectives = distilled(wide, **EVERYTHING)
    module = ObjectiveModel(unlike(make_family("lxmert", len(tokenizer))), objectives)
    whole = distill_loss(module, objectives, tokenizer, make_batch(6))
    alone = [distill_loss(module, objectives, tokenizer, make_batch(1, first=i)) for i in range(6)]
    assert np.mean(alone) == pytest.approx(whole, rel=1e-4)


def test_the_match_is_learned_across_families_of_opposite_polarity(
    tmp_path: Path, tokenizer: Any
) -> None:
    teacher = unlike(make_family("vilbert", len(tokenizer)))  # 0 means match
    student = make_family("uniter", len(tokenizer))  # 1 means match
    folder = saved(tmp_path / "model", teacher, tokenizer)
    objectives = make_objectives(distill={"teacher": folder, "match": {"temperature": 1}})
    module = ObjectiveModel(student, objectives)
    batch = collated(objectives, tokenizer, make_batch())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        optimizer.zero_grad()
        module(batch)[0].backward()
        optimizer.step()
    inputs = batch.streams["captions-full"].inputs
    says = student.match_logits(student.encode(inputs)).softmax(1)[:, student.match_index]
    said = teacher.match_logits(teacher.encode(inputs)).softmax(1)[:, teacher.match_index]
    torch.testing.assert_close(says, said, rtol=0, atol=0.05)


class SplitOfTheTeacher:
    """A split opened with another extractor: more regions, of other values."""

    num_samples = 16
    names = np.array([f"sample-{number}" for number in range(16)])

    def keys(self, rows: Any) -> list[str]:
        return [str(name) for name in self.names[rows]]

    def features(self, rows: Any) -> FeatureBatch:
        rng = np.random.default_rng(4)
        values = rng.standard_normal((16, 8, 3)).astype(np.float16)
        boxes = rng.random((16, 8, 4)).astype(np.float32)
        return FeatureBatch(values[rows], boxes[rows], np.full(len(rows), 8, np.int32))


def test_a_teacher_may_see_through_another_extractor(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unlike(make_family("visualbert", len(tokenizer), feature_dim=3))
    folder = saved(tmp_path / "model", model, tokenizer)
    opened = []

    class Dataset:
        def split(self, name: str, features: str) -> SplitOfTheTeacher:
            opened.append((name, features))
            return SplitOfTheTeacher()

    objectives = distilled(folder, features="regions-1234abcd", **EVERYTHING)
    for objective in objectives:
        objective.open(Dataset(), "train")  # type: ignore[arg-type]
    assert opened == [("train", "regions-1234abcd")]
    module = ObjectiveModel(make_family("visualbert", len(tokenizer)), objectives)
    batch = collated(objectives, tokenizer, make_batch())
    view = batch.streams["captions-full"].targets["distill"]
    assert view.features.shape == (6, 8, 3)
    monkeypatch.setattr(SplitOfTheTeacher, "names", np.roll(SplitOfTheTeacher.names, 1))
    with pytest.raises(FeatureError, match="features of other samples than the student's"):
        collated(objectives, tokenizer, make_batch())
    loss, losses = module(batch)
    loss.backward()
    assert losses["distill"] > 0
    moved = batch.to(torch.device("cpu"), torch.bfloat16)
    assert torch.isfinite(module.bfloat16()(moved)[0])


def test_a_view_of_selected_samples_is_as_if_they_had_been_read_by_themselves(
    wide: str, tokenizer: Any
) -> None:
    class SplitOfSomeRegions(SplitOfTheTeacher):
        def features(self, rows: Any) -> FeatureBatch:
            seen = super().features(rows)
            num_regions = (np.asarray(rows) % 4).astype(np.int32)
            width = int(num_regions.max())
            kept = (np.arange(width) < num_regions[:, None])[..., None]
            values, boxes = seen.values[:, :width], seen.boxes[:, :width]
            return FeatureBatch(values * kept, boxes * kept, num_regions)

    class Dataset:
        def split(self, name: str, features: str) -> SplitOfSomeRegions:  # noqa: ARG002
            return SplitOfSomeRegions()

    for features in (None, "regions-1234abcd"):
        objectives = distilled(wide, features=features, next_words={}, **EVERYTHING)
        for group in by_stream(objectives).values():
            for objective in group:
                objective.open(Dataset(), "train")  # type: ignore[arg-type]
            collate = StreamCollator(group, tokenizer, 24, ANSWERS)
            whole = collate(make_batch(9))
            for samples in ([0, 4], [1, 5, 2], [8], [7, 3, 0]):
                found = collate.select(whole, torch.tensor(samples))
                expected = collate(part(make_batch(9), samples))
                for ours, alone in zip(tensors(found), tensors(expected), strict=True):
                    assert ours.dtype == alone.dtype
                    assert torch.equal(ours, alone)


def test_a_teacher_with_other_words_or_answers_is_refused(wide: str, tokenizer: Any) -> None:
    objective = Distillation(DistillConfig.model_validate({"teacher": wide, "answers": {}}))
    objective.check(tokenizer, ANSWERS)
    with pytest.raises(ConfigError, match="knows 3 answers, the student 2"):
        objective.check(tokenizer, ANSWERS[:2])
    other: Any = make_tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(ConfigError, match="another tokenizer"):
        objective.check(other, ANSWERS)


def test_attention_is_refused_where_text_and_regions_never_meet(wide: str, tokenizer: Any) -> None:
    objectives = make_objectives(distill={"teacher": wide, "attention": {}})
    module = ObjectiveModel(make_family("late_fusion", len(tokenizer)), objectives)
    with pytest.raises(ModelError, match=r"distill\.attention: text and regions never meet"):
        module(collated(objectives, tokenizer, make_batch()))


def test_a_folder_without_a_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    objectives = make_objectives(distill={"teacher": str(tmp_path), "hidden": {}})
    with pytest.raises(ModelError, match=r"distill: teacher"):
        ObjectiveModel(make_family("visualbert", len(tokenizer)), objectives)


def test_a_blind_student_has_a_blind_teacher(wide: str, tokenizer: Any) -> None:
    objectives = distilled(wide, **EVERYTHING)
    batch = collated(objectives, tokenizer, replace(make_batch(), step=1), blind=True)
    module = ObjectiveModel(make_family("visualbert", len(tokenizer)), objectives)
    assert torch.isfinite(module(batch)[0])
