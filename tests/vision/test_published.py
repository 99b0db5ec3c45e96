from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import FeatureError
from pipeline.vision.published import open_published
from tests.vision import published_files as files

IMAGES = {f"COCO_val2014_{number:012d}": files.make(number) for number in range(5)}


def write(folder: Path, layout: str) -> str:
    if layout == "UNITER":
        return files.write_uniter(folder / "npz", IMAGES)
    if layout == "OpenVQA":
        return files.write_openvqa(folder / "npz", IMAGES)
    if layout == "VOLTA":
        pytest.importorskip("h5py")
        return files.write_volta(folder / "features.h5", IMAGES)
    return files.write_table(folder / "features.tsv", IMAGES, layout)


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

    refused("".join(lines) + lines[1], "in lines 2 and 6")
    refused("".join(lines)[:-30] + "\n", r"line 5.*(features|values for)")
    refused(lines[0].replace("\t2\t", "\t5\t"), "line 1: boxes: 8 values for 5 boxes")
    refused(lines[0] + lines[1].rpartition("\t")[0] + "\n", "line 2: 5 columns, expected 6")
    refused("a\tb\n", r"expected 6 columns .* or 10")
    refused(lines[0].replace("\t200\t", "\twide\t"), "line 1: width")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "one.npz", features=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FeatureError, match=r"one\.npz: cannot be read"):
        open_published(str(tmp_path / "npz")).read("one", "float16")


@pytest.mark.parametrize("name", ["absent.tsv", "features.lmdb"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, name: str) -> None:
    if name == "features.lmdb":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FeatureError, match=r"no such file|expected \.tsv"):
        open_published(str(tmp_path / name))
