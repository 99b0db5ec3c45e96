"""A recipe looked at before its run, with and without its data."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.stages import check as checking
from pipeline.stages.check import activation_bytes, check
from pipeline.stages.data_inputs import DataInputs
from pipeline.stages.estimate import Report
from pipeline.stages.preflight import small_validation
from pipeline.stages.run import run_stages
from tests.stages.small_recipe import small

QUIET = Console(stderr=True, quiet=True)


def looked_at(folder: Path, *overrides: str) -> Report:
    return check(small(folder, *overrides), QUIET)


@pytest.fixture(scope="module")
def report(extracted: Path) -> Report:
    return looked_at(extracted)


class Layers(nn.Module):
    """Keeps its input for the first layer's gradient, and what the second and the loss read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.second(self.first(batch).relu()).pow(2).mean(), {}


class Numbers:
    """Two samples of five numbers, as a micro-batch is moved."""

    num_samples = num_tokens = num_tokens_with_padding = 2

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.ones(2, 5, device=device, dtype=dtype)


def test_activations_are_what_the_backward_pass_will_read() -> None:
    # the input; after ReLU, once, though both ReLU and the second layer keep it; before the square
    numbers = 2 * 5 + 2 * 7 + 2 * 3
    assert activation_bytes(Layers(), Numbers(), torch.float32) == 4 * numbers
    assert activation_bytes(Layers(), Numbers(), torch.bfloat16) == 2 * numbers


def test_real_steps_on_real_data_tell_how_long_it_takes(
    extracted: Path, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [phase.name for phase in report.phases] == ["pretrain", "finetune", "blind"]
    pretrain, finetune, _ = report.phases
    card = small(extracted).features.extractor.build("cpu").card()
    assert pretrain.data is not None
    captions = pretrain.data.examples["captions"]
    assert pretrain.data.samples == 40
    assert pretrain.data.shards == 3
    assert pretrain.data.epochs == {"captions": round(3 * 8 / captions, 2)}
    assert finetune.data is not None
    assert set(finetune.data.examples) == {"captions", "questions"}
    for phase in report.phases:
        assert phase.measured is not None
        assert phase.measured.seconds_per_step > 0
        # patches, which the blind twin does not see, and words without their padding
        assert card.num_regions is not None
        regions = 0 if phase.name == "blind" else card.num_regions
        assert regions + 4 < phase.measured.tokens_per_sample < regions + 32
        assert phase.hours == phase.steps * phase.measured.seconds_per_step / 3600
        assert phase.activation_bytes
    assert not (extracted / "run" / "check").exists()
    assert not (extracted / "run" / "pretrain").exists()
    report.print(Console(width=120))
    shown = capsys.readouterr().out
    assert "1 ← the recipe's" in shown
    assert "ms a step" in shown
    assert json.loads(json.dumps(report.to_json()))["phases"][0]["hours"] == pretrain.hours


def test_without_data_it_tells_what_the_recipe_decides_and_names_the_rest(tmp_path: Path) -> None:
    report = looked_at(tmp_path)
    assert any("sightline ingest" in reason for reason in report.unknown)
    pretrain = report.phases[0]
    assert pretrain.hours is None
    assert pretrain.state_bytes["0"] == 16 * pretrain.parameters
    assert list(tmp_path.iterdir()) == []


def test_what_the_device_cannot_hold_is_refused_with_what_would_fit(
    extracted: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain = report.phases[0]
    state, whole = pretrain.state_bytes["1"], pretrain.bytes_at(1)
    assert state
    assert whole
    monkeypatch.setattr(checking, "host_bytes", lambda: whole - 1)
    with pytest.raises(ConfigError, match="a smaller micro_batch_size fits"):
        looked_at(extracted)
    monkeypatch.setattr(checking, "host_bytes", lambda: state // 2)
    with pytest.raises(ConfigError, match=r"pretrain: a rank would hold .*use more workers"):
        looked_at(extracted)


def test_checkpoints_that_would_fill_the_disk_are_refused(extracted: Path) -> None:
    with pytest.raises(ConfigError, match=r"smaller checkpoints\.keep_last"):
        looked_at(extracted, "training.finetune.checkpoints.keep_last=1000000000")


def test_gpus_that_are_not_here_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"64 workers want 64 GPUs, and this machine has \d+"):
        looked_at(
            tmp_path,
            "cluster={workers: 64, gpus_per_worker: 1}",
            *(f"training.{phase}.global_batch_size=256" for phase in ("pretrain", "finetune")),
        )


def test_a_split_or_texts_that_are_not_there_are_refused_with_those_that_are(
    extracted: Path, tmp_path: Path
) -> None:
    splits = r"its splits are train \(40 samples\), validation \(12 samples\)"
    wrong = {"dataset.train_split": "training", "dataset.validation_split": "val"}
    expected = r"dataset.train_split: found 'training'.*\n.*dataset.validation_split: found 'val'"
    with pytest.raises(ConfigError, match=expected):
        looked_at(extracted, *(f"{key}={name}" for key, name in wrong.items()))
    for key, name in wrong.items():
        for stage in ("extract", "pretrain"):
            recipe = small(extracted, f"{key}={name}", f"run={tmp_path / 'run'}")
            with pytest.raises(ConfigError, match=rf"{key}: found '{name}', .*{splits}"):
                run_stages(recipe, [stage], QUIET)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "recipe.yaml"}


def test_a_benchmark_without_texts_is_refused_before_training(tmp_path: Path) -> None:
    captioned = tmp_path / "source"
    captioned.mkdir()
    for number in range(12):
        Image.new("RGB", (64, 64), (20 * number, 9, 9)).save(captioned / f"{number}.png")
        (captioned / f"{number}.txt").write_text("a dark square")
    source = {"type": "folder", "folder": str(captioned), "validation_fraction": 0.5}
    recipe = small(tmp_path, f"dataset.source={json.dumps(source)}")
    with pytest.raises(ConfigError, match=r"validation_split: .* samples and no questions.*vqa"):
        run_stages(recipe, ["ingest", "extract", "pretrain"], QUIET)


def test_few_held_out_samples_are_warned_of(extracted: Path, report: Report) -> None:
    warning = "dataset.validation_split: split 'validation' has 12 samples; figures of so few"
    assert any(line.startswith(warning) for line in report.advice)
    inputs = DataInputs.open(small(extracted))
    assert small_validation(small(extracted), inputs.dataset)
    assert (
        small_validation(small(extracted, "dataset.validation_split=train"), inputs.dataset) is None
    )


def test_swap_files_that_this_machine_cannot_have_are_refused(extracted: Path) -> None:
    def swapped(**offload: object) -> list[str]:
        settings = {"offload_optimizer": {"device": "nvme", **offload}}
        return [
            "training.finetune.zero_stage=3",
            f"training.finetune.deepspeed={json.dumps({'zero_optimization': settings})}",
        ]

    with pytest.raises(ConfigError, match=r"nvme_path: device nvme needs a folder"):
        looked_at(extracted, *swapped())
    (extracted / "a-file").touch()
    with pytest.raises(ConfigError, match=r"nvme_path: .*a-file.* cannot be written"):
        looked_at(extracted, *swapped(nvme_path=str(extracted / "a-file" / "below")))
