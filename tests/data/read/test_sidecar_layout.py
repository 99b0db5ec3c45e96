from pathlib import Path

import numpy as np
import pytest

from pipeline.data.read.extractor_card import PartLayout
from pipeline.data.read.sidecar_layout import SidecarLayout, card_layout
from pipeline.data.sample import Sample
from pipeline.data.tars.shard import Member, ShardWriter
from pipeline.errors import FeatureError
from tests.data.cards import card_bytes
from tests.data.tiny_dataset import npy

ARRAYS = {
    "attribute.labels": PartLayout.of("int32", "R"),
    "classes": PartLayout.of("float16", "R", 91),
    "labels": PartLayout.of("int32", "R"),
    "scales": PartLayout.of("float32", 1, 7),
    "scores": PartLayout.of("float32", "R"),
}


@pytest.mark.parametrize("with_boxes", [True, False])
def test_places_are_where_the_writer_put_each_part(tmp_path: Path, with_boxes: bool) -> None:
    num_regions = np.array([36, 0, 1, 100, 36], np.int32)
    written: list[dict[str, Member]] = []
    with ShardWriter(str(tmp_path)) as writer:
        for number, count in enumerate(num_regions.tolist()):
            parts = {"npy": npy(np.zeros((count, 7), np.int8)), "segments.json": b"[]" * number}
            for name, part in ARRAYS.items():
                shape = [count if axis == "R" else int(axis) for axis in part.shape]
                parts[f"{name}.npy"] = npy(np.zeros(shape, part.dtype))
            if with_boxes:
                parts["boxes.npy"] = npy(np.zeros((count, 4), np.float32))
            written.append(writer.write(Sample(f"sample-{number}", parts)))
    values = [members["npy"] for members in written]
    places = SidecarLayout(ARRAYS, segments=True).places(
        np.array([member.offset for member in values]),
        np.array([member.size for member in values]),
        num_regions,
        with_boxes,
    )
    assert set(places) == {*ARRAYS, "segments", *(["boxes"] if with_boxes else [])}
    for name, (offsets, sizes) in places.items():
        suffix = "segments.json" if name == "segments" else f"{name}.npy"
        assert offsets.tolist() == [members[suffix].offset for members in written]
        if name != "segments":
            assert sizes.tolist() == [members[suffix].size for members in written]


def test_a_card_names_the_parts_and_may_be_absent(tmp_path: Path) -> None:
    assert card_layout(str(tmp_path), "regions-00") == SidecarLayout()
    folder = tmp_path / "features" / "regions-00"
    folder.mkdir(parents=True)
    part = {"dtype": "float16", "shape": ["R", 91]}
    card = card_bytes(parts={"classes": part}, segments="COCO run-length code")
    (folder / "card.json").write_bytes(card)
    found = card_layout(str(tmp_path), "regions-00")
    assert found == SidecarLayout({"classes": ARRAYS["classes"]}, segments=True)
    assert found.arrays["classes"].axes == "(R, 91)"
    (folder / "card.json").write_text("{")
    with pytest.raises(FeatureError, match=r"card\.json: damaged: not JSON"):
        card_layout(str(tmp_path), "regions-00")
