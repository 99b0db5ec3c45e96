import json
import os
from pathlib import Path

import pytest

from pipeline.cli import run_job
from tests.data.sources.built import draw

QUICKSTART = str(Path(__file__).resolve().parents[1] / "jobs" / "recipes" / "quickstart.yaml")


def test_help_teaches_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(["--help"]) == 0
    shown = capsys.readouterr().out
    verbs = ("run", "ingest", "extract", "pretrain", "finetune", "evaluate", "report")
    for verb in (*verbs, "predict", "check", "export", "submit"):
        assert f" {verb} " in shown
    assert run_job(["predict", "--help"]) == 0
    assert "--question" in capsys.readouterr().out


def test_a_misspelt_key_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_job(["run", QUICKSTART, "training.finetune.lr=1"]) == 64
    assert "training.finetune.lr: unknown key" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_refused_before_any_work_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "dataset.source={type: coco-captions, images: photos, annotations: captions.json}"
    weights = "features.extractor={type: grid, network: resnet18, weights: gone.pth}"
    assert run_job(["run", QUICKSTART, source, weights]) == 64
    said = capsys.readouterr().err
    for part in ("dataset.source.images: photos", "captions.json: no such", "gone.pth"):
        assert part in said
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_command_line_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(["run"]) == 2
    assert run_job(["nosuchverb"]) == 2
    assert "nosuchverb" in capsys.readouterr().err


def test_print_recipe_prints_the_resolved_recipe_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_job(["run", QUICKSTART, "--print-recipe", "training.seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out
    assert run_job(["pretrain", QUICKSTART, "--print-recipe", "--explain", "training.seed=7"]) == 0
    assert "whole number at least 0; default: 0; another value" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert run_job(["run", QUICKSTART, "--explain"]) == 64


def test_a_stage_whose_input_is_missing_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_job(["pretrain", QUICKSTART]) == 1
    assert "ingest" in capsys.readouterr().err


def test_info_of_no_dataset_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(["data", "info", str(tmp_path)]) == 1
    assert "no manifest" in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(["version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


def test_a_benchs_settings_are_printed_and_a_wrong_one_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for bench in ("ingest", "loader", "extract", "model", "train"):
        assert run_job(["bench", bench, "rounds=2", "--print-settings"]) == 0
        assert "rounds: 2" in capsys.readouterr().out
    assert run_job(["bench", "model", "rownds=2"]) == 64
    assert "did you mean 'rounds'?" in " ".join(capsys.readouterr().err.split())


def test_a_source_that_lost_half_its_samples_is_refused_and_allowed_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(*(tmp_path / "photos" / f"{name}.png" for name in "abcd"))
    for name in "abcd":
        (tmp_path / "photos" / f"{name}.txt").write_text(f"picture {name}")
    settings = [
        QUICKSTART, "dataset.source={type: folder, folder: photos}", "dataset.path=data",
        "cluster={runner: process, workers: 1}", "run=run",
    ]  # fmt: skip

    def records() -> dict[str, int]:
        found: dict[str, int] = json.loads(capsys.readouterr().out)["stages"]["ingest"]["records"]
        return {name: found[name] for name in ("added", "edited", "removed", "unchanged")}

    assert run_job(["ingest", *settings, "--json"]) == 0
    assert records() == {"added": 4, "edited": 0, "removed": 0, "unchanged": 0}
    for name in "ab":
        (tmp_path / "photos" / f"{name}.png").unlink()
        (tmp_path / "photos" / f"{name}.txt").unlink()
    (tmp_path / "photos" / "c.txt").write_text("another caption")

    assert run_job(["ingest", *settings]) == 1
    said = capsys.readouterr().err
    assert "2 of 4 samples would be removed" in said
    assert "--allow-removals" in said
    assert run_job(["ingest", *settings, "--allow-removals", "--json"]) == 0
    assert records() == {"added": 0, "edited": 1, "removed": 2, "unchanged": 1}
    assert "max_removed_fraction: 0.2" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert run_job(["ingest", *settings]) == 0
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "2 samples (0 added, 0 edited, 0 removed, 2 unchanged), 0 rejects" in told


@pytest.mark.parametrize("odd", ["[x]", "a%20b", "a|b", "a^b", "a\\b"])
def test_a_datasets_path_that_delta_takes_for_another_is_refused(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_job(["ingest", QUICKSTART, f"dataset.path='{odd}/data'"]) == 64
    assert "a dataset's path must be without" in capsys.readouterr().err
    assert run_job(["data", "info", f"{odd}/data"]) == 1
    assert "a dataset's path must be without" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("odd", ["a b", "a#b", "a?b", "a+b", "é", "{1..2}", "*", "a~", "日本"])
def test_any_other_path_may_be_a_datasets(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / odd / "photos" / "a.png")
    (tmp_path / odd / "photos" / "a.txt").write_text("words")
    settings = [
        QUICKSTART, f"dataset.source={{type: folder, folder: '{odd}/photos'}}", f"run='{odd}/run'",
        f"dataset.path='{odd}/data'", "cluster={runner: process, workers: 1}",
    ]  # fmt: skip
    assert run_job(["ingest", *settings]) == 0
    assert run_job(["data", "verify", f"{odd}/data"]) == 0
    assert {path.name for path in (tmp_path / odd).iterdir()} == {"photos", "data", "run"}


def test_a_run_folder_that_cannot_be_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "data" / "manifest" / "samples" / "_delta_log").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.yaml").write_text("name: another\n")
    os.mkfifo(tmp_path / "fifo")
    fifo = "dataset.source={type: folder, folder: fifo}"
    for setting, said in (
        ("run=file", "a file is there"),
        ("run=file/run", "cannot be written"),
        ("run=data", "a dataset is there"),
        ("run=other", "the run 'another' is there"),
        ("run=/proc/none", "cannot be written"),
        (f"run={'x' * 300}", "cannot be written"),
        (f"dataset.path={tmp_path}/file", "a file is there"),
        (fifo, "neither a file nor a folder"),
    ):
        assert run_job(["ingest", QUICKSTART, setting]) == 64, setting
        assert said in capsys.readouterr().err
