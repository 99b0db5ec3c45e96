from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.manifest.manifest import Manifest
from pipeline.errors import ConfigError, SourceError
from tests.data.sources.built import build, draw, ingested, listed, reason, reasons, record


def test_flickr8k_has_813_samples_in_the_official_splits(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "flickr8k"
    source = build(
        "flickr",
        images=str(folder / "Flicker8k_Dataset"),
        captions=str(folder / "Flickr8k.token.txt"),
        splits={
            "train": str(folder / "Flickr_8k.trainImages.txt"),
            "validation": str(folder / "Flickr_8k.devImages.txt"),
        },
    )
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (813, {})
    samples = Manifest.open(str(tmp_path / "dataset")).samples()
    assert Counter(samples["split"].to_pylist()) == {"train": 753, "validation": 60}
    assert sum(samples["num_captions"].to_pylist()) == 4065


def test_flickr8k_is_the_same_from_its_own_files_and_from_karpathys(shared_data: Path) -> None:
    folder = shared_data / "flickr8k"
    images = str(folder / "Flicker8k_Dataset")
    own = build("flickr", images=images, captions=str(folder / "Flickr8k.token.txt"))
    karpathy = build("karpathy", images=images, annotations=str(folder / "dataset_flickr8k.json"))
    assert listed(own).keys() == listed(karpathy).keys()
    key = "1000268201_693b08cb0e"
    assert record(own, key).texts == record(karpathy, key).texts


def test_flickr30k_has_7_samples_and_1194_missing_images(shared_data: Path) -> None:
    folder = shared_data / "flickr30k"
    source = build(
        "flickr",
        images=str(folder / "flickr30k-images"),
        captions=str(folder / "results_20130124.token"),
    )
    assert reasons(source) == {"live": 7, "missing-image": 1194}
    assert len(record(source, "100652400").texts.decode().captions) == 5


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    names = ["good.jpg", "unlisted.jpg", "twice.jpg", "silent.jpg", "empty.jpg"]
    draw(*(tmp_path / name for name in names))
    (tmp_path / "token.txt").write_text(
        "good.jpg#0\tA dog .\ngood.jpg#1\t\nunlisted.jpg#0\tx\ntwice.jpg#0\ty\r\n\n"
        "2258277193_586949ec62.jpg.1#0\tnever a file\nempty.jpg#0\t \n"
    )
    (tmp_path / "train.txt").write_text("good.jpg\ntwice.jpg\nsilent.jpg\nempty.jpg\n")
    (tmp_path / "dev.txt").write_text("twice.jpg\nlost.jpg")
    source = build(
        "flickr",
        images=str(tmp_path),
        captions=str(tmp_path / "token.txt"),
        splits={"train": str(tmp_path / "train.txt"), "dev": str(tmp_path / "dev.txt")},
    )
    entries = listed(source)
    quirk = next(key for key in entries if key.startswith("2258277193_586949ec62-jpg-1-"))
    assert {key: (reason(entry), entry.split) for key, entry in entries.items()} == {
        "good": ("live", "train"),
        "unlisted": ("no-split", "unlisted"),
        "twice": ("several-splits", "train"),
        quirk: ("missing-image", "unlisted"),
        "empty": ("no-captions", "train"),
        "silent": ("no-captions", "train"),
        "lost": ("missing-image", "dev"),
    }
    assert record(source, "good").texts.decode().captions == ("A dog .",)
    assert entries["good"].detail == "1 empty captions dropped"


@pytest.mark.parametrize("line", ["a.jpg\tno number", "a.jpg#x\twords", "a.jpg#0 words", "#0\tx"])
def test_a_line_of_another_shape_costs_itself(tmp_path: Path, line: str) -> None:
    draw(tmp_path / "a.jpg")
    (tmp_path / "token.txt").write_text(f"a.jpg#0\tgood\n{line}\n")
    source = build("flickr", images=str(tmp_path), captions=str(tmp_path / "token.txt"))
    assert reasons(source) == {"live": 1, "malformed-record": 1}
    (reject,) = (entry for entry in source.records() if reason(entry) != "live")
    assert "token.txt: line 2: expected an image's name" in reject.detail
    (tmp_path / "token.txt").write_text(f"{line}\n")
    with pytest.raises(SourceError, match=r"token\.txt: line 1: .* Is it a Flickr \.token file"):
        listed(source)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system(tmp_path: Path, end: str) -> None:
    draw(tmp_path / "a.jpg", tmp_path / "b.jpg")
    (tmp_path / "token.txt").write_bytes(f"a.jpg#0\tone{end}a.jpg#1\ttwo{end}b.jpg#0\tx".encode())
    (tmp_path / "train.txt").write_bytes(f"a.jpg{end}b.jpg{end}".encode())
    source = build(
        "flickr",
        images=str(tmp_path),
        captions=str(tmp_path / "token.txt"),
        splits={"train": str(tmp_path / "train.txt")},
    )
    assert reasons(source) == {"live": 2}
    assert record(source, "a").texts.decode().captions == ("one", "two")


def test_lists_and_a_fraction_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        build("flickr", images="i", captions="c", splits={"a": "b"}, validation_fraction=0.1)
