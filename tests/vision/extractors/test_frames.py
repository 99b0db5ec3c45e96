import importlib.metadata
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.sample import Sample, Texts
from pipeline.data.tars.shard import ShardWriter
from pipeline.data.tars.shard_files import ShardFiles, default_cache
from pipeline.errors import FeatureError
from pipeline.vision.extractor import Extractor, measure_invariance
from pipeline.vision.extractors.detection.regions import RegionsConfig
from pipeline.vision.extractors.frames import FramesExtractor
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.registry import from_card
from pipeline.vision.preprocess.video import FramesConfig, read_frames
from pipeline.vision.sidecar import SidecarPlan, write_sidecar
from tests.vision.photo_dataset import picture
from tests.vision.video_files import folder, video

PICTURES = GridConfig(network="squeezenet1_0", node="features.2", weights="random", image_size=32)
THREE = FramesConfig(count=3, folder_rate=10)
CELLS, DIM = 36, 96


@pytest.fixture(scope="module")
def pictures() -> Extractor:
    return PICTURES.build()


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return PICTURES.model_copy(update={"frames": THREE}).build()


def test_features_of_a_video_are_those_of_its_frames_with_their_times(
    extractor: Extractor, pictures: Extractor
) -> None:
    payload = video(12)
    (feature,) = extractor.extract([extractor.prepare(payload)])
    assert feature.values.shape == (3 * CELLS, DIM)
    assert feature.values.dtype == np.float16
    seconds = [second for second, _ in read_frames(payload, THREE)]
    np.testing.assert_allclose(feature.parts["times"], np.repeat(seconds, CELLS), rtol=1e-6)
    frames = folder(12)  # the same without a codec's loss
    (lossless,) = extractor.extract([extractor.prepare(frames)])
    for place, (_, pixels) in enumerate(read_frames(frames, THREE)):
        (alone,) = pictures.extract([pictures.prepare(_png(pixels))])
        of_frame = slice(place * CELLS, (place + 1) * CELLS)
        np.testing.assert_allclose(lossless.values[of_frame], alone.values, atol=1e-3)
    assert feature.boxes is not None
    np.testing.assert_array_equal(feature.boxes[:CELLS], feature.boxes[CELLS : 2 * CELLS])
    np.testing.assert_allclose(feature.boxes[CELLS - 1], [5 / 6, 5 / 6, 1, 1], rtol=1e-6)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_a_video_of_one_frame(extractor: Extractor, pictures: Extractor) -> None:
    (feature,) = extractor.extract([extractor.prepare(picture(1))])
    (expected,) = pictures.extract([pictures.prepare(picture(1))])
    np.testing.assert_array_equal(feature.values, expected.values)
    assert set(feature.parts["times"].tolist()) == {0.0}


def test_videos_of_any_lengths_share_a_batch_without_meeting(extractor: Extractor) -> None:
    payloads = [video(12), picture(2), folder(2), video(5, form="webm")]
    prepared = [extractor.prepare(payload) for payload in payloads]
    found = extractor.extract(prepared)
    assert [len(feature.values) // CELLS for feature in found] == [3, 1, 2, 3]
    assert measure_invariance(extractor.exact(), prepared).largest_difference < 1e-4


def test_a_video_is_refused_where_no_rule_for_frames_is_given(pictures: Extractor) -> None:
    with pytest.raises(FeatureError, match=r"a video; set extractor\.frames"):
        pictures.prepare(video(3))


def test_a_missing_decoder_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(FeatureError, match=r"PyAV: pip install 'sightline\[video\]'"):
        PICTURES.model_copy(update={"frames": THREE}).check()
    PICTURES.check()


def test_detected_regions_keep_their_classes_and_scores_beside_the_times() -> None:
    config = RegionsConfig(
        network="fasterrcnn_mobilenet_v3_large_320_fpn",
        weights="random",
        num_classes=5,
        short_side=32,
        long_side=64,
        num_proposals=12,
        min_regions=4,
        max_regions=4,
        storage="int8-per-channel",
        frames=FramesConfig(count=2),
    )
    extractor = config.build()
    (feature,) = extractor.extract([extractor.prepare(video(6))])
    assert feature.values.shape == (8, 1024)
    assert feature.quantized is not None
    for name, layout in extractor.card().parts.items():
        array = feature.quantized.scales if name == "scales" else feature.parts[name]
        shape = [8 if axis == "R" else axis for axis in layout.shape]
        assert (list(array.shape), array.dtype.name) == (shape, layout.dtype)


def test_the_card_says_which_frames_and_gives_the_extractor_back(
    extractor: Extractor, pictures: Extractor
) -> None:
    card = extractor.card()
    assert card.selection["frames"] == {"count": 3, "folder_rate": 10.0}
    assert card.environments[0].libraries["av"]
    assert (card.grid, card.boxes, card.num_regions) == (None, "stored", 3 * CELLS)
    assert from_card(card).card() == card
    names = {pictures.name, extractor.name}
    for frames in (FramesConfig(count=4, folder_rate=10), FramesConfig(rate=1, folder_rate=10)):
        names.add(PICTURES.model_copy(update={"frames": frames}).build().name)
    assert len(names) == 4
    most = THREE.model_copy(update={"most": 9})  # only what is refused depends on it
    assert PICTURES.model_copy(update={"frames": most}).build().name == extractor.name


def test_a_shard_of_videos_becomes_a_sidecar_of_their_frames(
    tmp_path: Path, extractor: Extractor
) -> None:
    texts = Texts("clip").to_json()
    with ShardWriter(str(tmp_path / "shards" / "train")) as writer:
        writer.write(Sample("clip-1", {"mp4": video(12), "json": texts}))
        writer.write(Sample("clip-2", {"webm": video(2, form="webm"), "json": texts}))
    keys = frozenset(("clip-1", "clip-2"))
    plan = SidecarPlan(str(tmp_path), "train", writer.shard.name, keys)
    found = write_sidecar(extractor, plan, ShardFiles(default_cache()), batch_size=2, threads=1)
    assert isinstance(extractor, FramesExtractor)
    assert found.rows["num_regions"].to_pylist() == [3 * CELLS, 2 * CELLS]
