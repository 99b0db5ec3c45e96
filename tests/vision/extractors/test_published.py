import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import FeatureError, UnusableImageError
from pipeline.vision.extractors.published import PublishedFeatures, open_published
from tests.vision import published_files as files

IMAGES = {f"COCO_val2014_{number:012d}": files.make(number) for number in range(5)}


def write(folder: Path, layout: str, images: Mapping[str, files.Made] = IMAGES) -> str:
    if layout == "UNITER":
        return files.write_uniter(folder / "npz", images)
    if layout == "OpenVQA":
        return files.write_openvqa(folder / "npz", images)
    if layout == "VOLTA":
        pytest.importorskip("h5py")
        return files.write_volta(folder / "features.h5", images)
    return files.write_table(folder / "features.tsv", images, layout)


@pytest.mark.parametrize("layout", ["bottom-up attention", "LXMERT", "UNITER", "OpenVQA", "VOLTA"])
def test_every_layout_gives_values_and_boxes_unchanged(tmp_path: Path, layout: str) -> None:
    published = open_published(write(tmp_path, layout))
    assert sorted(published.ids()) == sorted(IMAGES)
    for image_id, made in IMAGES.items():
        feature = published.read(image_id, "float32")
        half = layout == "UNITER"
        expected = made.values.astype(np.float16).astype(np.float32) if half else made.values
        np.testing.assert_array_equal(feature.values, expected)
        assert feature.boxes is not None
        np.testing.assert_allclose(feature.boxes, made.fractions(), atol=1e-3 if half else 1e-7)
        if layout in ("LXMERT", "VOLTA"):
            np.testing.assert_array_equal(feature.parts["labels"], made.objects)
            np.testing.assert_array_equal(feature.parts["attribute.labels"], made.objects)
            np.testing.assert_array_equal(feature.parts["scores"], made.scores)
            assert feature.parts["labels"].dtype == np.int32
        if layout == "UNITER":
            assert set(feature.parts) == {"scores", "classes"}
            np.testing.assert_allclose(feature.parts["classes"], made.classes, atol=1e-3)
        if layout in ("bottom-up attention", "OpenVQA"):
            assert not feature.parts


def test_the_digest_is_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    path = write(tmp_path, "LXMERT")
    digest = open_published(path).digest
    moved = Path(path).rename(tmp_path / "moved.tsv")
    assert open_published(str(moved)).digest == digest
    moved.write_text(moved.read_text().replace("\t100\t", "\t101\t"))
    assert open_published(str(moved)).digest != digest


def test_a_heading_is_no_image(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "LXMERT"))
    heading = "img_id\timg_h\timg_w\tobjects_id\tobjects_conf\tattrs_id\tattrs_conf\tnum_boxes\t"
    path.write_text(heading + "boxes\tfeatures\n" + path.read_text())
    published = open_published(str(path))
    assert len(published.ids()) == 5
    assert len(published.read("COCO_val2014_000000000003", "float16").values) == 2


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "bottom-up attention"))
    lines = path.read_text().splitlines(keepends=True)

    def refused(content: str, match: str) -> None:
        path.write_text(content)
        with pytest.raises(FeatureError, match=match):
            for image_id in (published := open_published(str(path))).ids():
                published.read(image_id, "float16")

    refused("".join(lines) + lines[1].replace("\t100\t", "\t101\t"), "contradictory.*line 6")
    refused("".join(lines)[:-30] + "\n", r"line 5.*(features|values for)")
    refused(lines[0].replace("\t2\t", "\t5\t"), "line 1: boxes: 8 values for 5 boxes")
    refused(lines[0] + lines[1].rpartition("\t")[0] + "\n", "line 2: 5 columns, expected 6")
    refused("a\tb\n", r"expected 6 columns .* or 10")
    refused(lines[0].replace("\t200\t", "\twide\t"), "line 1: width")


def test_boxes_in_numbers_of_another_size_are_not_taken_for_boxes(tmp_path: Path) -> None:
    boxes = np.array([[0, 0, 50, 25], [10, 10, 90, 40]], np.float64)
    cells = [base64.b64encode(array.tobytes()).decode() for array in (boxes, np.ones((2, 4)))]
    (tmp_path / "features.tsv").write_text("\t".join(["7", "100", "50", "2", *cells]))
    published = open_published(str(tmp_path / "features.tsv"))
    with pytest.raises(UnusableImageError, match=r"line 1: boxes of 8 values, expected 4"):
        published.read("7", "float32")


def test_what_macs_put_beside_files_is_no_image(tmp_path: Path) -> None:
    folder = Path(write(tmp_path, "UNITER"))
    digest = open_published(str(folder)).digest
    for image_id in IMAGES:
        (folder / f"._{image_id}.npz").write_bytes(b"Mac OS X")
    assert sorted(open_published(str(folder)).ids()) == sorted(IMAGES)
    assert open_published(str(folder)).digest == digest


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "one.npz", features=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FeatureError, match=r"unreadable-features: .*one\.npz"):
        open_published(str(tmp_path / "npz")).read("one", "float16")


def test_a_line_repeated_word_for_word_is_one_image(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "LXMERT"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1], lines[0]]))
    published = open_published(str(path))
    assert (len(published.ids()), published.num_repeated) == (5, 2)
    for image_id, made in IMAGES.items():
        np.testing.assert_array_equal(published.read(image_id, "float32").values, made.values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"values": np.zeros((0, 6), np.float32), "boxes": np.zeros((0, 4))}, "no-regions"),
        ({"values": np.full((1, 6), np.nan, np.float32)}, "not-finite"),
        ({"values": np.full((1, 6), np.inf, np.float32)}, "not-finite"),
        ({"boxes": np.array([[90, 40, 230, 80]])}, "bad-boxes"),
        ({"boxes": np.array([[90, 40, 30, 80]])}, "bad-boxes"),
        ({"boxes": np.array([[-9, 40, 30, 80]])}, "bad-boxes"),
        ({"boxes": np.array([[np.nan, 40, 30, 80]])}, "bad-boxes"),
        ({"boxes": np.array([[0, 0, 201, 100.5]])}, None),  # rounded over the edge
        ({"boxes": np.array([[20, 20, 20, 40]])}, None),  # of no width, as detectors give some
    ],
)
@pytest.mark.parametrize("layout", ["bottom-up attention", "OpenVQA", "VOLTA"])
def test_an_image_that_cannot_be_used_says_why(
    tmp_path: Path, layout: str, change: dict[str, np.ndarray], reason: str | None
) -> None:
    one = files.make(1)
    one = replace(one, values=one.values[:1], boxes=one.boxes[:1], objects=one.objects[:1])
    one = replace(one, scores=one.scores[:1], classes=one.classes[:1])
    bad = replace(one, **{name: array.astype(np.float32) for name, array in change.items()})
    path = write(tmp_path, layout, {"good": one, "bad": bad})
    published = open_published(path)
    assert len(published.read("good", "float16").values) == 1
    if reason is None:
        boxes = published.read("bad", "float16").boxes
        assert boxes is not None
        assert ((boxes >= 0) & (boxes <= 1)).all()
        return
    with pytest.raises(UnusableImageError) as caught:
        published.read("bad", "float16")
    assert caught.value.reason == reason
    assert "bad" in caught.value.detail


def test_how_boxes_are_written_is_told_where_it_can_be(tmp_path: Path) -> None:
    def with_boxes(*boxes: Sequence[float]) -> PublishedFeatures:
        images = {}
        for number, box in enumerate(boxes):
            made = files.make(3)
            images[str(number)] = replace(
                made, values=made.values[:1], boxes=np.array([box], np.float32)
            )
        path = files.write_table(tmp_path / "boxes.tsv", images, "bottom-up attention")
        return open_published(path)

    either, xywh, corners = [10, 5, 60, 45], [90, 50, 30, 20], [90, 50, 180, 90]
    for boxes, is_xywh in (
        ([either, xywh], True),
        ([xywh], True),
        ([either], False),
        ([either, corners], False),
        ([xywh, corners], False),
    ):
        found = with_boxes(*boxes)
        assert found.is_only(found.ids(), "xywh") == is_xywh
    feature = with_boxes(xywh).read("0", "float32", "xywh")
    assert feature.boxes is not None
    np.testing.assert_allclose(feature.boxes, [[0.45, 0.5, 0.6, 0.7]])


@pytest.mark.parametrize("name", ["absent.tsv", "features.lmdb"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, name: str) -> None:
    if name == "features.lmdb":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FeatureError, match=r"no such file|expected \.tsv"):
        open_published(str(tmp_path / name))
