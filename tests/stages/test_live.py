"""A recipe whose features are live: from source files to a prediction without a feature shard."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import storage
from pipeline.cli import run_job
from pipeline.data.read.dataset import Dataset
from pipeline.errors import ConfigError
from pipeline.pretrained.files import read_own
from pipeline.pretrained.folder import BACKBONE_WEIGHTS, load_model
from pipeline.stages.check import check
from pipeline.stages.export import export
from pipeline.stages.progress import StageProgress
from pipeline.stages.run import STAGES, run_stages
from pipeline.stages.train import finetune
from pipeline.training.launch.recorded_spec import read_spec
from pipeline.vision.extractors.grid import GridConfig
from tests.stages.small_recipe import small

BACKBONE = (
    "features={live: true, augment: {area: [0.6, 1.0]}, extractor: {type: grid, weights: random, "
    "network: squeezenet1_0, node: features.3, image_size: 32}}",
    "training.finetune.optimizer.learning_rate_factors={'*.backbone.*': 0.1}",
    "training.finetune.evaluation.every_steps=3",
)
PIXELS = ("features={live: true, extractor: {type: pixels, image_size: 32, patch_size: 16}}",)
LXMERT = [  # which predicts regions, and writes no captions
    "model.family=lxmert",
    "model.sizes={width: 16, num_heads: 2, intermediate_size: 24, text_layers: 1, "
    "region_layers: 1, cross_layers: 1, max_positions: 32}",
    "benchmarks.caption=null",
]
QUIET = Console(stderr=True, quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small recipe with a backbone has been run once."""
    folder = tmp_path_factory.mktemp("live")
    run_stages(small(folder, *BACKBONE), list(STAGES), QUIET)
    return folder


def test_no_feature_is_stored_and_a_second_run_does_nothing(finished: Path) -> None:
    assert not (finished / "data" / "features").exists()
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert summary["stages"]["extract"]["state"] == "nothing to store"
    assert {"vqa/accuracy", "vqa/accuracy_blind", "caption/cider"} <= set(summary["metrics"])
    again = run_stages(small(finished, *BACKBONE), list(STAGES), QUIET)
    states = {stage["state"] for stage in again["stages"].values()}
    assert states == {"up to date", "nothing to store"}
    report = (finished / "run" / "report.html").read_text()
    assert "reading a grid of its own CNN&#39;s features of the shapes dataset" in report
    assert BACKBONE_WEIGHTS in (finished / "run" / "model" / "README.md").read_text()
    gallery = json.loads((finished / "run" / "evaluation" / "examples.json").read_text())
    looked = [example["attention"] for example in gallery["examples"] if example["kind"] == "vqa"]
    assert {tuple(attention["grid"]) for attention in looked} == {(6, 6)}


def test_predict_sees_with_the_trained_backbone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "photo.png"
    image.write_bytes(Dataset.open(str(finished / "data")).split("validation").image(0))
    asked = ["--image", str(image), "--question", "Is there a circle?", "--json"]
    model = tmp_path / "model"
    export(str(finished / "run"), str(model))  # which stands alone
    answers = []
    for place in (finished / "run", model):
        assert run_job(["predict", str(place), *asked]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answers"])
    assert answers[0] == answers[1]
    assert read_own(str(model))["extractor"]["weights"]["trained"]
    image.write_bytes(b"not an image")
    assert run_job(["predict", str(model), *asked]) == 1
    assert "photo.png: not-an-image" in capsys.readouterr().err


def test_a_checkpoint_is_exported_with_its_backbone(finished: Path, tmp_path: Path) -> None:
    phase = str(finished / "run" / "finetune")
    checkpoints = storage.join(phase, "checkpoints")
    (name,) = [name for name in storage.list_names(checkpoints) if name.startswith("step")]
    export(storage.join(checkpoints, name), str(tmp_path / "model"))
    ours, theirs = (
        load_model(folder).model.state_dict()
        for folder in (str(tmp_path / "model"), storage.join(phase, "model"))
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == tensor).all() for name, tensor in theirs.items())
    assert (tmp_path / "model" / BACKBONE_WEIGHTS).exists()


def test_check_counts_the_backbone(tmp_path: Path) -> None:
    frozen = small(tmp_path, *BACKBONE, "training.pretrain.optimizer.freeze=['*.backbone.*']")
    phase = check(frozen, QUIET).phases[0]
    network = GridConfig(network="squeezenet1_0", node="features.3", weights="random").backbone()
    expected = sum(parameter.numel() for parameter in network.parameters())
    assert phase.parameters - phase.trained_parameters == expected


def test_live_pixels_go_through_every_stage(finished: Path, tmp_path: Path) -> None:
    recipe = small(tmp_path, f"dataset.path={finished / 'data'}", *PIXELS)
    summary = run_stages(recipe, list(STAGES), QUIET)
    assert "vqa/accuracy" in summary["metrics"]
    spec = read_spec(str(tmp_path / "run" / "finetune"))
    assert spec.live is not None
    assert spec.backbone is None
    assert not (finished / "data" / "features").exists()


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["features.augment={}"], "stored features are always the same"),
        (["features={live: true, extractor: {type: regions}}"], "has no gradient"),
        ([*BACKBONE, *LXMERT, "objectives={mrm: {features: {}}}"], "no region of it can be hidden"),
        ([*BACKBONE, "benchmarks.distill={teacher: m, match: {}}"], "give distill.features"),
    ],
)
def test_what_cannot_be_live_is_refused_before_work_starts(
    tmp_path: Path, overrides: list[str], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        small(tmp_path, *overrides)


def test_a_teacher_with_a_backbone_is_refused(finished: Path, tmp_path: Path) -> None:
    teacher = finished / "run" / "model"
    learned = f"benchmarks.distill={{teacher: {teacher}, match: {{}}}}"
    recipe = small(tmp_path, f"dataset.path={finished / 'data'}", *PIXELS, learned)
    run_stages(recipe, ["pretrain"], QUIET)
    with (
        StageProgress(QUIET, "finetune") as progress,
        pytest.raises(ConfigError, match="sees with a backbone of its own"),
    ):
        finetune(recipe, progress)
