import io
import pickle

import numpy as np
import pytest
from PIL import Image

from pipeline import config
from pipeline.data.sources.base import Record
from pipeline.data.sources.shapes import ShapesSource, ShapesSourceConfig
from pipeline.data.sources.shapes_scene import CELLS_PER_SIDE, sample_scene
from pipeline.errors import ConfigError, SourceError


def make_source(
    scenes: int = 7, validation_scenes: int = 3, image_size: int = 64, seed: int = 5
) -> ShapesSource:
    return ShapesSourceConfig(
        type="shapes",
        scenes=scenes,
        validation_scenes=validation_scenes,
        image_size=image_size,
        seed=seed,
    ).build()


def pixels(source: ShapesSource, record: Record) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source.read(record)))).astype(int)


def test_it_lists_every_scene_once_under_a_key_of_its_own() -> None:
    records = list(make_source().records())
    assert [record.split for record in records] == ["train"] * 7 + ["validation"] * 3
    assert len({record.key for record in records}) == 10
    assert len({record.image_fingerprint for record in records}) == 10


def test_listing_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sources.shapes.draw", None)
    assert len(list(make_source().records())) == 10


def test_the_same_settings_give_the_same_records_and_bytes() -> None:
    one, other = make_source(), pickle.loads(pickle.dumps(make_source()))
    assert list(one.records()) == list(other.records())
    for record in one.records():
        assert one.read(record) == other.read(record)


def test_more_scenes_keep_the_records_of_fewer() -> None:
    few = {record.image_fingerprint for record in make_source().records()}
    assert few < {record.image_fingerprint for record in make_source(11, 6).records()}


def test_another_seed_gives_other_scenes() -> None:
    scenes = [sample_scene(seed, "train", index) for seed in (1, 2) for index in range(20)]
    assert len(set(scenes)) == 40


def test_a_larger_picture_is_another_fingerprint_of_the_same_texts() -> None:
    small, large = next(make_source().records()), next(make_source(image_size=96).records())
    assert (small.key, small.texts) == (large.key, large.texts)
    assert small.image_fingerprint != large.image_fingerprint


@pytest.mark.parametrize("image_size", [48, 100])
def test_a_picture_is_a_square_jpeg_of_the_size_asked_for(image_size: int) -> None:
    source = make_source(image_size=image_size)
    picture = Image.open(io.BytesIO(source.read(next(source.records()))))
    assert (picture.format, picture.mode) == ("JPEG", "RGB")
    assert picture.size == (image_size, image_size)


def test_things_show_in_their_cells_and_the_other_cells_are_plain() -> None:
    source = make_source(scenes=30, image_size=96)
    for record in source.records():
        scene = sample_scene(5, record.split, int(record.image))  # type: ignore[arg-type]
        cells = pixels(source, record).reshape(CELLS_PER_SIDE, 32, CELLS_PER_SIDE, 32, 3)
        taken = {(thing.row, thing.column) for thing in scene.things}
        for row in range(CELLS_PER_SIDE):
            for column in range(CELLS_PER_SIDE):
                middle = cells[row, 4:28, column, 4:28]
                assert (np.ptp(middle, axis=(0, 1)).max() > 60) == ((row, column) in taken)


def test_a_thing_has_the_color_it_is_said_to_have() -> None:
    source = make_source(scenes=40, image_size=96)
    reference = {
        "red": (240, 84, 84),
        "yellow": (250, 214, 84),
        "green": (84, 208, 112),
        "blue": (92, 144, 255),
        "purple": (190, 96, 250),
        "white": (244, 244, 244),
    }
    for record in source.records():
        picture = pixels(source, record)
        for thing in sample_scene(5, record.split, int(record.image)).things:  # type: ignore[arg-type]
            if thing.shape == "ring":  # its centre shows the background
                continue
            x = int((thing.column + 0.5 + thing.offset[0]) * 32)
            y = int((thing.row + 0.5 + thing.offset[1]) * 32)
            centre = picture[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
            nearest = min(reference, key=lambda name: np.abs(centre - reference[name]).sum())
            assert nearest == thing.color


def test_a_record_of_another_source_is_refused() -> None:
    source = make_source()
    record = next(source.records())
    foreign = Record("photo", "train", "photo.jpg", "jpg", record.texts, "1")
    with pytest.raises(SourceError, match="photo"):
        source.read(foreign)


@pytest.mark.parametrize("fault", [{"scenes": 0}, {"image_size": 8}, {"shapes": 3}])
def test_impossible_settings_are_refused_by_name(fault: dict[str, int]) -> None:
    document = {"type": "shapes", "scenes": 3, "validation_scenes": 2, **fault}
    with pytest.raises(ConfigError, match=next(iter(fault))):
        config.check(ShapesSourceConfig, document, "recipe.yaml")
