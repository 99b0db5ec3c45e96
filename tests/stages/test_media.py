"""A folder of a video, frames, a DICOM and a photograph: from the files to a step of training."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.dataset import Dataset
from pipeline.recipe import Recipe
from pipeline.report.preview import write_preview
from pipeline.stages.run import run_stages
from pipeline.training.tracking.metrics_log import read_metrics
from tests.stages.small_recipe import small
from tests.vision.photo_dataset import picture
from tests.vision.video_files import dicom, folder, frame, video

QUIET = Console(stderr=True, quiet=True)
SCAN = np.arange(48 * 32).reshape(32, 48)


def write_album(root: Path) -> None:
    """Six whole samples in `train`, three that are not, and as many photographs held out."""
    files = {
        "clip.mp4": video(12),
        "web.webm": video(7, form="webm"),
        "packed.zip": folder(4),
        "scan.dcm": dicom(SCAN, WindowCenter=700, WindowWidth=1400),
        "photo.jpg": picture(3),
        "cut.mp4": video(9)[:-200],
        "empty.zip": b"PK\x05\x06" + bytes(18),
        "short.dcm": dicom(SCAN)[:-100],
    }
    (root / "train" / "steps").mkdir(parents=True)
    (root / "held").mkdir()
    for name, payload in files.items():
        (root / "train" / name).write_bytes(payload)
    for stem in ("clip", "web", "packed", "scan", "photo", "cut", "short", "empty", "steps"):
        (root / "train" / f"{stem}.txt").write_text(f"this is {stem}\n")
    for number in range(3):
        png = io.BytesIO()
        Image.fromarray(frame(number)).save(png, "PNG")
        (root / "train" / "steps" / f"{number}.png").write_bytes(png.getvalue())
        (root / "held" / f"p{number}.jpg").write_bytes(picture(number))
        (root / "held" / f"p{number}.txt").write_text("a photograph\n")


def make_recipe(folder: Path) -> Recipe:
    album = folder / "album"
    return small(
        folder,
        f"dataset.source={{type: folder, folder: {{train: {album}/train, "
        f"validation: {album}/held}}}}",
        "dataset.ingest={samples_per_shard: 4, max_reject_fraction: 0.5, shards_in_flight: 0, "
        "reencode: {shorter_side: 16}}",
        "features={extract: {actors: 0}, extractor: {type: grid, network: squeezenet1_0, "
        "node: features.3, weights: random, image_size: 32, window: stored, "
        "frames: {count: 3, folder_rate: 5}}}",
        "training.pretrain.steps=1",
        "training.pretrain.schedule.warmup_steps=0",
        "benchmarks={caption: {metrics: [bleu]}}",
    )


def test_every_kind_of_file_is_ingested_extracted_and_trained_on(tmp_path: Path) -> None:
    write_album(tmp_path / "album")
    recipe = make_recipe(tmp_path)
    run_stages(recipe, ["ingest", "extract", "pretrain"], QUIET)
    url = str(tmp_path / "data")
    manifest = Manifest.open(url)
    rejects = {row["key"]: row["reason"] for row in manifest.rejects(["key", "reason"]).to_pylist()}
    assert sorted(rejects.values()) == ["no-frames", "undecodable-dicom", "undecodable-video"]
    live = manifest.samples(["key", "suffix", "width", "height"]).to_pylist()
    suffixes = {row["key"]: row["suffix"] for row in live if not row["key"].startswith("p0")}
    assert {"mp4", "webm", "zip", "dcm", "jpg"} == set(suffixes.values())
    stage = json.loads((tmp_path / "run" / "stages" / "extract.json").read_text())
    split = Dataset.open(url).split("train", stage["outputs"]["features"])
    rows = {key: row for row, key in enumerate(split.each_key())}
    assert split.image(rows["clip"]) == (tmp_path / "album" / "train" / "clip.mp4").read_bytes()
    batch = split.features(list(rows.values()))
    assert batch.times is not None
    seconds = {
        key: np.unique(batch.times[i, : batch.num_regions[i]]).tolist()
        for i, key in enumerate(rows)
    }
    assert seconds["photo"] == seconds["scan"] == [0.0]
    assert seconds["steps"] == pytest.approx([0.0, 0.2, 0.4])
    assert seconds["packed"] == pytest.approx([0.0, 0.4, 0.6])
    assert len(seconds["clip"]) == len(seconds["web"]) == 3
    (line,) = read_metrics(str(tmp_path / "run" / "pretrain"))
    assert np.isfinite(line["loss"])
    page = write_preview(url, str(tmp_path / "page.html"), 20, stage["outputs"]["features"])
    assert "Frames at 0.00, <b>0.20</b>, 0.40 s" in Path(page).read_text()
    again = run_stages(recipe, ["ingest", "extract", "pretrain"], QUIET)
    assert {stage["state"] for stage in again["stages"].values()} == {"up to date"}
