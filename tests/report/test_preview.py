import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import FeaturePart, FeatureRow, SampleRow, State, to_table
from pipeline.data.read.dataset import Dataset, FeatureBatch
from pipeline.data.sample import Dialog, Question, Round, Sample, Texts
from pipeline.data.tars.shard import Member, ShardWriter
from pipeline.errors import FeatureError, ManifestError
from pipeline.reason import Reason
from pipeline.report.preview import norms, write_preview
from pipeline.vision.extract import ExtractConfig, extract
from pipeline.vision.extractors.detection.segments import SegmentsConfig
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.preprocess.video import FramesConfig
from tests.data.cards import card_bytes
from tests.report.conftest import HOSTILE, Page, png
from tests.vision.photo_dataset import make_dataset as make_photos
from tests.vision.photo_dataset import pictures
from tests.vision.video_files import HEIGHT, WIDTH, level, video


def texts(number: int) -> Texts:
    return Texts(
        image_id=number,
        captions=(f"scene {number}", HOSTILE),
        questions=(Question(number, f"What is in {number}?", ("a cat", "a cat", "a dog")),),
        dialogs=(Dialog("two of them", (Round("how many?", "two"), Round("both red?", "no"))),),
    )


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def live(key: str, split: str, suffix: str, members: Mapping[str, Member]) -> SampleRow:
    image, words = members[suffix], members["json"]
    return SampleRow(
        key=key,
        split=split,
        state=State.LIVE,
        image_fingerprint="1",
        texts_fingerprint="1",
        suffix=suffix,
        image_offset=image.offset,
        image_size=image.size,
        texts_offset=words.offset,
        texts_size=words.size,
        num_captions=2,
        num_questions=1,
        num_rounds=2,
        width=40,
        height=30,
    )


def make_dataset(folder: Path, grid: Sequence[int] | None = None) -> str:
    """Makes 5 samples in `train` and 2 in `val`, 3 rejects, and features `drawn` of 6 regions."""
    url = str(folder / "scenes")
    rows: list[SampleRow] = []
    features: list[FeatureRow] = []
    for split, numbers in (("train", range(5)), ("val", range(5, 7))):
        with ShardWriter(f"{url}/shards/{split}") as writer:
            for number in numbers:
                parts = {"png": png(40, 30), "json": texts(number).to_json()}
                members = writer.write(Sample(f"s{number}", parts))
                rows.append(live(f"s{number}", split, "png", members))
        shard = writer.shard.name
        rows[-len(numbers) :] = [
            replace(row, shard=shard, texts_shard=shard) for row in rows[-len(numbers) :]
        ]
        with ShardWriter(f"{url}/features/drawn", shard) as writer:
            for number in numbers:
                values = npy(np.arange(24, dtype=np.float16).reshape(6, 4) + number)
                boxes = npy(np.tile(np.array([0.1, 0.2, 0.5, 0.9], np.float32), (6, 1)))
                members = writer.write(Sample(f"s{number}", {"npy": values, "boxes.npy": boxes}))
                features.append(
                    FeatureRow(
                        key=f"s{number}",
                        shard=shard,
                        num_regions=6,
                        parts=(
                            FeaturePart("values", *members["npy"]),
                            FeaturePart("boxes", *members["boxes.npy"]),
                        ),
                    )
                )
    reasons = (Reason.NO_CAPTIONS, Reason.MISSING_IMAGE, Reason.MISSING_IMAGE)
    for number, reason in enumerate(reasons):
        rows.append(
            SampleRow(
                key=f"r{number}",
                split="train",
                state=State.REJECT,
                reason=reason,
                detail=f"images/{number}.jpg {HOSTILE}",
                image_fingerprint="1",
                texts_fingerprint="1",
            )
        )
    manifest = Manifest.create(url).commit(to_table(rows, SampleRow))
    manifest.features("drawn").commit(to_table(features, FeatureRow))
    card = card_bytes(grid=grid, dim=4, dtype="float16", num_regions=6, boxes="stored")
    (folder / "scenes" / "features" / "drawn" / "card.json").write_bytes(card)
    return url


def preview(folder: Path, limit: int = 48, features: str | None = None, **made: object) -> str:
    url = make_dataset(folder, **made)  # type: ignore[arg-type]
    location = write_preview(url, str(folder / "page.html"), limit, features)
    return Path(location).read_text()


def test_every_sample_is_shown_with_all_its_texts(tmp_path: Path) -> None:
    page = Page(preview(tmp_path))
    words = page.words()
    assert page.faults == []
    assert len(page.all("img")) == 7
    for number in range(7):
        assert f"scene {number}" in words
        assert f"What is in {number}? a cat ×2, a dog ×1" in words
    assert words.count("two of them how many? two both red? no") == 7


def test_counts_and_rejects_are_those_of_the_manifest(tmp_path: Path) -> None:
    words = Page(preview(tmp_path)).words()
    assert "samples 7 captions 14 questions 7 dialog rounds 14 rejects 3" in words
    assert "train 5 10 5 10 val 2 4 2 4" in words
    assert "missing-image 2 r1" in words
    assert words.index("missing-image 2") < words.index("no-captions 1")


def test_a_limit_is_spread_over_the_splits(tmp_path: Path) -> None:
    page = Page(preview(tmp_path, limit=4))
    splits = [article["data-is"] for article in page.all("article")]
    assert splits == ["split-1", "split-1", "split-2", "split-2"]


def test_captions_and_details_are_never_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    html = preview(tmp_path)
    page = Page(html)
    assert HOSTILE not in html
    assert len(page.all("script")) == 1
    assert page.text.count(HOSTILE) == 7 + 3
    assert not re.search(r"https?://", html)


def test_a_grid_is_drawn_as_the_norms_of_its_cells(tmp_path: Path) -> None:
    page = Page(preview(tmp_path, features="drawn", grid=[2, 3]))
    pictures = [box for box in page.all("div") if "data-maps" in box]
    assert len(pictures) == 7
    assert {picture["data-grid"] for picture in pictures} == {"2,3"}
    assert {picture["data-outlined"] for picture in pictures} == {"0"}
    layers = [image for image in page.all("img") if image.get("class") == "colours"]
    assert len(layers) == 7


def test_regions_are_drawn_as_boxes(tmp_path: Path) -> None:
    page = Page(preview(tmp_path, features="drawn", grid=None))
    pictures = [box for box in page.all("div") if "data-maps" in box]
    assert {picture["data-outlined"] for picture in pictures} == {"6"}
    assert (pictures[0]["data-boxes"] or "").startswith("0.1,0.2,0.5,0.9,0.1")


def test_the_norm_of_padding_is_not_shown() -> None:
    values = np.array([[[3, 4], [6, 8], [0, 0]]], np.float16)  # B=1, R=3, D=2
    batch = FeatureBatch(values, np.zeros((1, 3, 4), np.float32), np.array([2], np.int32))
    assert norms(batch, 0).tolist() == [0.0, 5.0]


def test_features_that_do_not_exist_are_refused_with_those_that_do(tmp_path: Path) -> None:
    url = make_dataset(tmp_path)
    with pytest.raises(FeatureError, match="this dataset has drawn"):
        write_preview(url, str(tmp_path / "page.html"), 4, "other")


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError):
        write_preview(str(tmp_path / "nothing"), str(tmp_path / "page.html"), 4)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_labels_scores_and_masks_of_a_detector_lie_over_its_pictures(tmp_path: Path) -> None:
    url = str(tmp_path / "photos")
    make_photos(url, pictures(3))
    config = SegmentsConfig(
        network="maskrcnn_resnet50_fpn",
        weights="random",
        num_classes=91,
        short_side=32,
        long_side=64,
        num_proposals=12,
        min_regions=4,
        max_regions=4,
        mask_side=24,
    )
    name = extract(url, config, ExtractConfig(actors=0)).extractor
    html = Path(write_preview(url, str(tmp_path / "page.html"), 9, name)).read_text()
    page = Page(html)
    assert page.faults == []
    tags = [box for box in page.all("span") if "tag" in (box.get("class") or "")]
    assert 3 <= len(tags) <= 3 * 4
    layers = [image for image in page.all("img") if image.get("class") == "over"]
    assert len(layers) == 3
    for layer in layers:
        payload = base64.b64decode((layer["src"] or "").partition(",")[2])
        assert max(Image.open(io.BytesIO(payload)).size) == 24
    names = json.loads((tmp_path / "photos" / "features" / name / "card.json").read_text())
    assert any(f"{label} 0.0" in page.words() for label in names["class_names"][1:])


def make_videos(url: str, lengths: Sequence[int]) -> None:
    """Makes a dataset of mp4 videos of so many frames."""
    rows: list[SampleRow] = []
    with ShardWriter(f"{url}/shards/train") as writer:
        for number, length in enumerate(lengths):
            members = writer.write(
                Sample(f"v{number}", {"mp4": video(length), "json": texts(number).to_json()})
            )
            rows.append(live(f"v{number}", "train", "mp4", members))
    shard = writer.shard.name
    rows = [replace(row, shard=shard, texts_shard=shard) for row in rows]
    Manifest.create(url).commit(to_table(rows, SampleRow))


def test_videos_are_shown_by_the_middle_one_of_their_extractors_frames(tmp_path: Path) -> None:
    url = str(tmp_path / "videos")
    make_videos(url, [9, 2])
    config = GridConfig(
        network="squeezenet1_0",
        node="features.2",
        weights="random",
        image_size=32,
        storage="int8",
        frames=FramesConfig(count=3),
    )
    report = extract(url, config, ExtractConfig(actors=0))
    batch = Dataset.open(url).split("train", report.extractor).features([0, 1])
    assert batch.num_regions.tolist() == [3 * 36, 2 * 36]
    assert batch.times is not None
    assert np.unique(batch.times[0]).tolist() == pytest.approx([0.1, 0.4, 0.7])
    html = Path(write_preview(url, str(tmp_path / "page.html"), 9, report.extractor)).read_text()
    page = Page(html)
    assert page.faults == []
    drawn = [box for box in page.all("div") if "data-maps" in box]
    assert [box["data-grid"] for box in drawn] == ["6,6", "6,6"]
    shown = [image["src"] or "" for image in page.all("img") if "jpeg" in (image["src"] or "")]
    brightness = []
    for source in shown:
        jpeg = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert jpeg.size == (WIDTH, HEIGHT)
        brightness.append(float(np.asarray(jpeg)[:, 16:].mean()))
    assert brightness == pytest.approx([level(4), level(1)], abs=4)
    assert "Frames at 0.10, <b>0.40</b>, 0.70 s" in html
    assert "Frames at 0.00, <b>0.10</b> s" in html
