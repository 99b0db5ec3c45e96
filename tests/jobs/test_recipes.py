"""The recipes that come with the project, run on real photographs where there are some."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import config
from pipeline.cli import run_job
from pipeline.models.families import build
from pipeline.recipe import Recipe
from pipeline.training.engine.optimizer import freeze, parameter_groups
from pipeline.vision.extractors.grid import GridConfig

RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"
COCO_TINY = str(RECIPES / "coco-tiny.yaml")

# Pretraining as the families' papers and code have it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "visualbert-coco": {
        "examples": 414_113,
        "epochs": 10,
        "batch": 48,
        "rate": 5e-5,
        "warmup": 0.1,
        "max_tokens": 128,
    },
    "lxmert-coco-vqa": {
        "examples": 857_870 // 2,  # captions and questions, as many of each in a batch
        "epochs": 20,
        "batch": 256 // 2,
        "rate": 1e-4,
        "warmup": 0.05,
        "max_tokens": 20,
    },
    "vilbert-cc": {
        "examples": 3_100_000,
        "epochs": 10,
        "batch": 512,
        "rate": 1e-4,
        "warmup": 0.1,
        "max_tokens": 36,
        "betas": (0.9, 0.98),
    },
    "uniter-coco": {
        "steps": 200_000,
        "rate": 5e-5,
        "warmup": 0.05,
        "max_tokens": 60,
        "betas": (0.9, 0.98),
        "clip_norm": 5.0,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes_have_the_published_numbers(name: str) -> None:
    recipe, published = config.load(Recipe, str(RECIPES / f"{name}.yaml")), PUBLISHED[name]
    training = recipe.training.pretrain
    assert training is not None
    steps = published.get("steps")
    if steps is None:
        assert training.global_batch_size == published["batch"]
        steps = published["epochs"] * published["examples"] / published["batch"]
    assert training.steps == pytest.approx(steps, abs=1)
    assert training.schedule.warmup_steps == pytest.approx(
        published["warmup"] * training.steps, abs=1
    )
    assert training.optimizer.learning_rate == published["rate"]
    assert training.optimizer.betas == published.get("betas", (0.9, 0.999))
    assert training.optimizer.clip_norm == published.get("clip_norm", 1.0)
    assert training.optimizer.weight_decay == 0.01
    assert recipe.model.max_tokens == published["max_tokens"]


def test_what_starts_from_bert_learns_ten_times_slower_in_vilbert() -> None:
    recipe = config.load(Recipe, str(RECIPES / "vilbert-cc.yaml"))
    training = recipe.training.pretrain
    assert training is not None
    with torch.device("meta"):
        model = build(recipe.model.config(vocab_size=30522, feature_dim=2048))
    module = torch.nn.ModuleDict({"model": model})
    slow = {
        id(parameter)
        for group in parameter_groups(module, training.optimizer)
        for parameter in group["params"]
        if group["factor"] == 0.1
    }
    beginnings = {
        name.split(".")[0] for name, parameter in model.named_parameters() if id(parameter) in slow
    }
    assert beginnings == {"text_embeddings", "text_norm", "text_layers"}


def test_the_early_layers_of_a_live_backbone_stay_and_the_others_learn_slowly() -> None:
    recipe = config.load(Recipe, str(RECIPES / "end-to-end-coco.yaml"))
    extractor = recipe.features.extractor
    assert isinstance(extractor, GridConfig)
    backbone = extractor.model_copy(update={"weights": "random", "image_size": 64}).backbone()
    with torch.device("meta"):
        model = build(recipe.model.config(vocab_size=30522, feature_dim=2048), backbone)
    module = torch.nn.ModuleDict({"model": model})
    for training in (recipe.training.pretrain, recipe.training.finetune):
        assert training is not None
        freeze(module, training.optimizer.freeze)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        slow = {
            names[id(parameter)].split(".")[3]
            for group in parameter_groups(module, training.optimizer)
            for parameter in group["params"]
            if group["factor"] == 0.1
        }
        assert slow == {"layer2", "layer3", "layer4"}


@pytest.mark.slow
def test_coco_tiny_runs_on_official_files_and_captions_real_photographs(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = shared_data / "coco"
    overrides = [
        f"dataset.source.images={coco / 'val2017'}",
        f"dataset.source.annotations={coco / 'annotations' / 'captions_val2017.json'}",
        f"dataset.path={tmp_path / 'data'}",
        f"run={tmp_path / 'run'}",
        "features.extractor.weights=random",  # no download in a test; the card says so
        "cluster={runner: process, workers: 1}",
        "training.pretrain.steps=10",
        "training.finetune.steps=10",
        "benchmarks.caption.metrics=[bleu, cider]",
    ]
    assert run_job(["run", COCO_TINY, *overrides, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["metrics"]) == {"caption/cider", "caption/bleu4"}
    ingested = json.loads((tmp_path / "run" / "stages" / "ingest.json").read_text())["outputs"]
    assert ingested["samples"] == 64
    assert ingested["rejects"] == {"missing-image": 1936}
    (card,) = (tmp_path / "data" / "features").glob("*/card.json")
    assert json.loads(card.read_text())["weights"]["random"] is True
    results = json.loads((tmp_path / "run" / "evaluation" / "caption.results.json").read_text())
    report = (tmp_path / "run" / "report.html").read_text()
    assert 5 < len(results) < 25
    assert "data:image/jpeg" in report


VISUAL_PREFIX = """
name: visual-prefix
dataset:
  source: {type: shapes, scenes: 60, validation_scenes: 12, image_size: 64}
features:
  extractor: {type: pixels, image_size: 32, patch_size: 8}
  extract: {actors: 1}
model:
  family: visual_prefix
  vocab_size: 300
  max_tokens: 32
  sizes:
    width: 32
    num_heads: 4
    intermediate_size: 64
    max_positions: 40
    projection: mlp
    cross_every: 1
    decoder: {model_type: gpt2, n_embd: 32, n_head: 4, n_layer: 2, n_positions: 96}
objectives: {itm: {}, lm: {}}
training:
  pretrain: {steps: 3, global_batch_size: 8, micro_batch_size: 8}
  finetune: {steps: 3, global_batch_size: 8, micro_batch_size: 8}
benchmarks:
  vqa: {max_tokens: 24}
  caption: {beams: 2, max_tokens: 16, metrics: [bleu]}
cluster: {runner: process, workers: 1}
"""


@pytest.mark.slow
def test_a_decoder_that_reads_images_goes_through_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "visual-prefix.yaml"
    recipe.write_text(VISUAL_PREFIX)
    places = [f"run={tmp_path / 'run'}", f"dataset.path={tmp_path / 'data'}"]
    assert run_job(["run", str(recipe), *places, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert {"vqa/accuracy", "caption/bleu4"} <= set(metrics)
    document = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert document["model_type"] == "visual_prefix"
    assert (tmp_path / "run" / "report.html").exists()
