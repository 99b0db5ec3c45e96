"""The bench as a whole, in the size that only shows that it runs."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.cli import run_job


def test_ratios_are_those_of_its_own_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog runs over a green field\na cat\ntwo birds sit on a wall\n")
    threads = torch.get_num_threads() + 1
    torch.set_num_threads(threads)
    settings = ["size=tiny", "rounds=2", "batch_size=3", "threads=1", f"captions={captions}"]
    assert run_job(["bench", "model", *settings, "--json"]) == 0
    assert torch.get_num_threads() == threads
    torch.set_num_threads(threads - 1)
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["size"] == "tiny"
    assert found["machine"]["threads"] == 1
    titles = [comparison["title"] for comparison in found["comparisons"]]
    assert "VisualBertForPreTraining" in titles[0]
    assert "LxmertForPreTraining" in titles[1]
    assert len(titles) == 5
    for comparison in found["comparisons"]:
        reference = next(iter(comparison["seconds"].values()))
        for name, seconds in comparison["seconds"].items():
            assert comparison["ratios"][name] == pytest.approx(reference / seconds)
    for comparison in found["comparisons"][:2]:
        figures = comparison["figures"]
        parts = figures["kernels"] * figures["heads"] * figures["padding"]
        assert parts == pytest.approx(figures["total"])
        assert figures["total"] == pytest.approx(comparison["ratios"]["ours"])
        assert figures["loss_difference"] < 1e-4
        unfused = figures["default_optimizer_seconds"] - figures["optimizer_seconds"]
        seconds = comparison["seconds"]
        assert figures["total_with_default_optimizer"] == pytest.approx(
            (seconds["transformers"] + unfused) / (seconds["ours"] + unfused)
        )


def test_it_runs_in_bf16_and_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["size=tiny", "rounds=1", "batch_size=2", "dtype=bf16"]
    assert run_job(["bench", "model", *settings]) == 0
    shown = capsys.readouterr().out
    for part in ("training step, VisualBERT", "generation of 20 tokens", "kernels", "dtype bf16"):
        assert part in shown


def test_a_wrong_option_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(["bench", "model", "size=huge"]) == 64
    assert "size" in capsys.readouterr().err
