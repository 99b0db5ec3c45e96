import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest
import webdataset
from PIL import Image

from pipeline import storage
from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.ingest.ingest import IngestConfig, IngestReport, ingest
from pipeline.data.load.loader import Loader
from pipeline.data.load.order import Order
from pipeline.data.manifest import pending_commits
from pipeline.data.manifest.diff import diff
from pipeline.data.manifest.info import describe
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.retention import Retention
from pipeline.data.media.reencode import ReencodeConfig
from pipeline.data.read.dataset import Dataset
from pipeline.data.read.images import ImageConfig, LiveConfig
from pipeline.data.sources.merged import MergedSourceConfig
from pipeline.data.sources.webdataset import WebDatasetSource, WebDatasetSourceConfig
from pipeline.data.tars.foreign_tar import ForeignTar, ImageReference
from pipeline.data.upkeep.compact import compact
from pipeline.data.upkeep.verify import verify
from pipeline.errors import ConfigError, ShardError, SourceError
from tests.data.sources.built import build
from tests.data.world import Killed

CONFIG = IngestConfig(shards_in_flight=0, max_reject_fraction=0.9, max_removed_fraction=1.0)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), tuple(Random(number).randbytes(3))).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, numbers: range, prefix: str = "") -> None:
    """Samples of a picture, a caption and JSON that nobody asked for, as webdataset writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            key, words = f"{prefix}{number:03d}", f"words {number}"
            sample = {"png": picture(number), "txt": words, "json": {"alt": f"alt {number}"}}
            writer.write({"__key__": key, **sample})


def make_tars(folder: Path, count: int = 3, each: int = 5) -> None:
    for shard in range(count):
        write_tar(folder / f"s-{shard}.tar", range(shard * each, (shard + 1) * each))


def run(tars: Path | str, url: Path | str, **settings: Any) -> IngestReport:
    config = settings.pop("config", CONFIG)
    return ingest(build("webdataset", shards=str(tars), **settings), str(url), config)


def contents(url: Path | str) -> dict[str, tuple[str, bytes, tuple[str, ...]]]:
    """Split, image and captions of every live sample, read as a loader reads them."""
    found = {}
    dataset = Dataset.open(str(url))
    for name in dataset.splits():
        split = dataset.split(name)
        rows = range(split.num_samples)
        for row, key, texts in zip(rows, split.each_key(), split.texts(rows), strict=True):
            found[key] = (name, split.image(row), texts.captions)
    return found


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def make_unreadable(tar: Path) -> None:
    """Puts other bytes under the same size and time: whoever opens the tar meets nonsense."""
    status = tar.stat()
    tar.write_bytes(b"x" * status.st_size)
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))


def shards(url: Path) -> dict[str, str]:
    return {row["key"]: row["shard"] for row in Manifest.open(str(url)).samples().to_pylist()}


def test_samples_are_those_of_copies_and_nothing_is_written_beside_the_tars(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars", each=9)
    before = snapshot(tmp_path / "tars")
    report = run(tmp_path / "tars", tmp_path / "left")
    run(tmp_path / "tars", tmp_path / "copied", in_place=False)
    assert report.num_live == 27
    assert contents(tmp_path / "left") == contents(tmp_path / "copied")
    assert {split for split, _, _ in contents(tmp_path / "left").values()} == {
        "train",
        "validation",
    }
    assert snapshot(tmp_path / "tars") == before
    stored = b"".join(path.read_bytes() for path in (tmp_path / "left").rglob("*.tar"))
    assert b"words 3" in stored
    assert b"PNG" not in stored
    one, other = (Dataset.open(str(tmp_path / name)).content() for name in ("left", "copied"))
    assert len(one) == len(other) == 32
    assert describe(str(tmp_path / "left"))["splits"]["train"]["tars"] == 3
    assert describe(str(tmp_path / "copied"))["splits"]["train"]["tars"] == 0


def test_a_loader_reads_pictures_from_the_tars(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars", each=4)
    seen: dict[str, dict[str, bytes]] = {}
    for name, in_place in (("left", True), ("copied", False)):
        run(tmp_path / "tars", tmp_path / name, in_place=in_place, validation_fraction=0)
        live = LiveConfig(images=ImageConfig(size=8), grid=(1, 1), patches=False)
        split = Dataset.open(str(tmp_path / name)).split("train", live)
        order = Order(split, "captions", seed=1)
        loader = Loader(split, order, global_batch_size=4, seed=1)
        batches = [batch for step in loader.batches(0, 3, 0, 1, 4) for batch in step]
        seen[name] = {
            key: pixels.tobytes()
            for batch in batches
            if batch.features is not None
            for key, pixels in zip(batch.keys, batch.features.values, strict=True)
        }
    assert len(seen["left"]) == 12
    assert seen["left"] == seen["copied"]


def test_keys_with_folders_and_dots_are_found_where_they_lie(tmp_path: Path) -> None:
    for folder in ("v1.0/b", "v1.1/b"):
        write_tar(tmp_path / "tars" / f"{folder[3]}.tar", range(2), prefix=f"{folder}/")
    report = run(tmp_path / "tars", tmp_path / "out")
    assert report.num_live == 4
    run(tmp_path / "tars", tmp_path / "copied", in_place=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "copied")
    assert all("." not in key and "/" not in key for key in contents(tmp_path / "out"))


def test_a_key_in_several_tars_is_counted_and_its_first_record_holds(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "b.tar", range(4))
    write_tar(tmp_path / "tars" / "c.tar", range(3, 6))
    first = run(tmp_path / "tars", tmp_path / "out")
    assert (first.num_live, first.rejects) == (6, {"duplicate-id": 1})
    again = run(tmp_path / "tars", tmp_path / "out")
    assert (again.num_unchanged, again.num_added, again.version) == (7, 0, first.version)
    # One that comes before both, as if there had never been a run without it.
    write_tar(tmp_path / "tars" / "a.tar", range(5, 7))
    grown = run(tmp_path / "tars", tmp_path / "out")
    fresh = run(tmp_path / "tars", tmp_path / "fresh")
    assert (grown.num_live, grown.rejects) == (fresh.num_live, fresh.rejects) == (7, {"duplicate-id": 2})  # fmt: skip  # noqa: E501
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    (tmp_path / "tars" / "b.tar").unlink()
    run(tmp_path / "tars", tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"003", "004", "005", "006"}


def test_an_unchanged_tar_is_not_opened_and_a_vanished_one_takes_its_samples(
    tmp_path: Path,
) -> None:
    make_tars(tmp_path / "tars")
    first = run(tmp_path / "tars", tmp_path / "out")
    for tar in (tmp_path / "tars").iterdir():
        make_unreadable(tar)
    again = run(tmp_path / "tars", tmp_path / "out")
    assert (again.num_listed, again.num_unchanged, again.version) == (15, 15, first.version)
    (tmp_path / "tars" / "s-1.tar").unlink()
    less = run(tmp_path / "tars", tmp_path / "out")
    assert (less.num_removed, less.num_unchanged, less.num_live) == (5, 10, 10)
    changes = diff(str(tmp_path / "out"), first.version, less.version)
    assert changes.counts() == {"removed": 5}
    with pytest.raises(SourceError, match=r"s-1\.tar: no such file; if it is gone for good"):
        run(tmp_path / "tars" / "s-{0..2}.tar", tmp_path / "out")


def test_a_grown_tar_costs_its_new_samples(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    run(tmp_path / "tars", tmp_path / "out", validation_fraction=0)
    before = shards(tmp_path / "out")
    make_unreadable(tmp_path / "tars" / "s-0.tar")
    with tarfile.open(tmp_path / "tars" / "s-1.tar", "a") as tar:
        for name, payload in (("100.png", picture(100)), ("100.txt", b"a new one")):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    with pytest.raises(ShardError, match=r"s-1\.tar: the tar has changed since it was indexed"):
        contents(tmp_path / "out")
    grown = run(tmp_path / "tars", tmp_path / "out", validation_fraction=0)
    assert (grown.num_added, grown.num_shards, grown.num_live) == (1, 1, 16)
    after = shards(tmp_path / "out")
    new = after.pop("100")
    assert after == before  # and so are all features that were made
    assert new not in before.values()
    split = Dataset.open(str(tmp_path / "out")).split("train")
    row = [*split.each_key()].index("100")
    assert (split.image(row), split.texts([row])[0].captions) == (picture(100), ("a new one",))
    assert split.image([*split.each_key()].index("007")) == picture(7)


def test_a_tar_that_was_only_touched_or_moved_keeps_its_shards(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    run(tmp_path / "tars", tmp_path / "out")
    before, held = shards(tmp_path / "out"), contents(tmp_path / "out")
    (tmp_path / "tars" / "s-2.tar").touch()
    touched = run(tmp_path / "tars", tmp_path / "out")
    assert (touched.num_shards, touched.num_edited, touched.num_unchanged) == (0, 5, 10)
    shutil.move(tmp_path / "tars", tmp_path / "elsewhere")
    moved = run(tmp_path / "elsewhere", tmp_path / "out")
    assert (moved.num_shards, moved.num_edited) == (0, 15)
    assert shards(tmp_path / "out") == before
    assert contents(tmp_path / "out") == held


def test_a_rewritten_tar_is_indexed_anew(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    run(tmp_path / "tars", tmp_path / "out")
    write_tar(tmp_path / "tars" / "s-1.tar", range(6, 12))  # shares 6 to 9, at other places
    report = run(tmp_path / "tars", tmp_path / "out")
    # 10 and 11 are those of s-2.tar too, whose second records they are now.
    assert (report.num_removed, report.rejects) == (1, {"duplicate-id": 2})
    run(tmp_path / "tars", tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert verify(str(tmp_path / "out")).faults == ()


def test_images_told_by_their_content_are_found_where_a_rewritten_tar_has_them(
    tmp_path: Path,
) -> None:
    make_tars(tmp_path / "tars", count=1)
    config = CONFIG.model_copy(update={"fingerprint": "content"})
    first = run(tmp_path / "tars", tmp_path / "out", config=config)
    (tmp_path / "tars" / "s-0.tar").touch()
    touched = run(tmp_path / "tars", tmp_path / "out", config=config)
    assert (touched.num_unchanged, touched.num_shards) == (5, 0)
    assert contents(tmp_path / "out")["003"][1] == picture(3)  # under the tar's new time
    write_tar(tmp_path / "tars" / "s-0.tar", range(2, 5))
    less = run(tmp_path / "tars", tmp_path / "out", config=config)
    assert (first.num_live, less.num_live, less.num_removed) == (5, 3, 2)
    assert contents(tmp_path / "out")["003"][1] == picture(3)
    run(tmp_path / "tars", tmp_path / "out", config=config, in_place=False)
    (tmp_path / "tars" / "s-0.tar").unlink()
    assert contents(tmp_path / "out")["003"][1] == picture(3)


def test_a_truncated_tar_stops_the_run_and_is_named(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    first = run(tmp_path / "tars", tmp_path / "out")
    tar = tmp_path / "tars" / "s-1.tar"
    tar.write_bytes(tar.read_bytes()[: 512 * 7 + 100])
    with pytest.raises(SourceError, match=r"s-1\.tar: not a plain tar, or cut short"):
        run(tmp_path / "tars", tmp_path / "out")
    assert Manifest.open(str(tmp_path / "out")).version == first.version
    (fault,) = verify(str(tmp_path / "out")).faults
    assert (fault.kind, fault.location) == ("unreadable-file", str(tar))


def test_verify_finds_a_changed_image_under_the_same_size_and_time(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    run(tmp_path / "tars", tmp_path / "out")
    found = verify(str(tmp_path / "out"))
    assert (found.faults, found.num_samples) == ((), 15)
    tar = tmp_path / "tars" / "s-1.tar"
    status, payload = tar.stat(), tar.read_bytes()
    tar.write_bytes(payload.replace(picture(7), picture(8)))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    (fault,) = verify(str(tmp_path / "out")).faults
    assert (fault.kind, fault.key, fault.location) == ("changed-image", "007", str(tar))


def test_other_texts_leave_the_images_and_their_shards(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    run(tmp_path / "tars", tmp_path / "out")
    before = shards(tmp_path / "out")
    report = run(tmp_path / "tars", tmp_path / "out", texts={"captions": ["json.alt"]})
    assert report.num_edited == 15
    assert shards(tmp_path / "out") == before
    assert contents(tmp_path / "out")["007"][1:] == (picture(7), ("alt 7",))
    again = run(tmp_path / "tars", tmp_path / "out", texts={"captions": ["json.alt"]})
    assert again.version == report.version


def test_a_setting_that_changes_no_sample_makes_tars_be_listed_once_more(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    run(tmp_path / "tars", tmp_path / "out")
    held = contents(tmp_path / "out")
    filters = FilterConfig(max_caption_words=7)
    config = CONFIG.model_copy(update={"filters": filters})
    report = run(tmp_path / "tars", tmp_path / "out", config=config)
    assert (report.num_unchanged, report.num_shards) == (15, 0)
    assert contents(tmp_path / "out") == held
    for tar in (tmp_path / "tars").iterdir():
        make_unreadable(tar)
    again = run(tmp_path / "tars", tmp_path / "out", config=config)
    assert (again.num_unchanged, again.version) == (15, report.version)


def test_filters_and_duplicates_count_in_place_too(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    write_tar(tmp_path / "tars" / "t.tar", range(2), prefix="copy-")
    config = CONFIG.model_copy(update={"filters": FilterConfig(duplicates="exact")})
    report = run(tmp_path / "tars", tmp_path / "out", config=config)
    assert (report.num_live, report.rejects) == (15, {"duplicate-image": 2})
    again = run(tmp_path / "tars", tmp_path / "out", config=config)
    assert (again.num_unchanged, again.version) == (17, report.version)
    # The originals go: the copies, in a tar that has not changed, become samples.
    (tmp_path / "tars" / "s-0.tar").unlink()
    less = run(tmp_path / "tars", tmp_path / "out", config=config)
    assert (less.num_live, less.rejects) == (12, {})


def test_compact_leaves_the_tars_and_what_refers_to_them(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars", count=4, each=6)
    url = str(tmp_path / "out")
    run(tmp_path / "tars", url, texts={"captions": ["json.alt"]})
    run(tmp_path / "tars", url)
    (tmp_path / "tars" / "s-3.tar").unlink()
    write_tar(tmp_path / "tars" / "s-2.tar", range(12, 14))
    run(tmp_path / "tars", url)
    before, held = snapshot(tmp_path / "tars"), contents(url)
    done = compact(url, Retention(last_versions=1, min_age_hours=0))
    assert done.num_removed > 0
    assert snapshot(tmp_path / "tars") == before
    assert contents(url) == held
    assert verify(url).faults == ()
    again = run(tmp_path / "tars", url)
    assert (again.num_unchanged, again.num_live) == (14, 14)


def test_encoding_anew_what_stays_in_place_is_refused(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    config = CONFIG.model_copy(update={"reencode": ReencodeConfig(shorter_side=4)})
    with pytest.raises(ConfigError, match="`in_place: false`"):
        run(tmp_path / "tars", tmp_path / "out", config=config)
    assert run(tmp_path / "tars", tmp_path / "out", config=config, in_place=False).num_live == 15


def test_a_recipe_can_tell_so_without_opening_a_tar() -> None:
    config = IngestConfig(reencode=ReencodeConfig())
    for settings, refused in (({}, True), ({"in_place": False}, False)):
        tars = WebDatasetSourceConfig(type="webdataset", shards="s.tar", **settings)
        for source in (tars, MergedSourceConfig(type="merged", sources=[tars])):
            IngestConfig().check_source(source)
            expected = pytest.raises(ValueError, match="`in_place: false`")
            with expected if refused else nullcontext():
                config.check_source(source)


def test_switching_between_places_moves_every_sample_once(tmp_path: Path) -> None:
    make_tars(tmp_path / "tars")
    run(tmp_path / "tars", tmp_path / "out", in_place=False)
    held = contents(tmp_path / "out")
    for in_place, num_tars in ((True, 3), (False, 0)):
        report = run(tmp_path / "tars", tmp_path / "out", in_place=in_place)
        assert (report.num_edited, report.num_live) == (15, 15)
        assert contents(tmp_path / "out") == held
        splits = describe(str(tmp_path / "out"))["splits"]
        assert splits["train"]["tars"] == num_tars


def test_images_in_place_have_the_texts_of_other_sources(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "a.tar", range(4))
    lines = [{"image": f"{number:03d}.png", "caption": f"more of {number}"} for number in range(3)]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "none").mkdir()
    sources: list[Mapping[str, Any]] = [
        {"type": "webdataset", "shards": str(tmp_path / "tars")},
        {"type": "table", "table": str(tmp_path / "more.jsonl"), "images": str(tmp_path / "none"),
         "image": "image", "texts": {"captions": "caption"}},
    ]  # fmt: skip
    source = build("merged", sources=sources)
    ingest(source, str(tmp_path / "out"), CONFIG)
    found = contents(tmp_path / "out")
    assert found["002"][1:] == (picture(2), ("words 2", "more of 2"))
    assert ingest(source, str(tmp_path / "out"), CONFIG).num_unchanged == 4
    assert verify(str(tmp_path / "out")).faults == ()


def test_a_run_killed_anywhere_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)  # every shard is listed on its own
    make_tars(tmp_path / "tars", count=4)
    run(tmp_path / "tars", tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    read = WebDatasetSource.read

    def killed_at(number: int) -> Callable[..., bytes]:
        reads = iter(range(number))

        def reading(self: WebDatasetSource, record: Any) -> bytes:
            if next(reads, None) is None:
                raise Killed
            return read(self, record)

        return reading

    for number in (0, 3, 5, 9, 14, 18):
        url = tmp_path / f"killed-{number}"
        monkeypatch.setattr(WebDatasetSource, "read", killed_at(number))
        with pytest.raises(Killed):
            run(tmp_path / "tars", url)
        monkeypatch.setattr(WebDatasetSource, "read", read)
        listed = Manifest.open(str(url)).samples(["key"]).num_rows
        if listed:
            assert contents(url).items() <= whole.items()
        report = run(tmp_path / "tars", url)
        assert (report.num_added, report.num_live) == (20 - listed, 20)
        assert contents(url) == whole
        assert run(tmp_path / "tars", url).version == report.version


def test_tars_and_dataset_may_be_on_an_object_store(
    tmp_path: Path, object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    tars, url = f"{object_store}/tars", f"{object_store}/out"
    make_tars(tmp_path / "tars", count=2)
    for tar in (tmp_path / "tars").iterdir():
        storage.write_bytes(f"{tars}/{tar.name}", tar.read_bytes())
    report = run(tars, url)
    assert report.num_live == 10
    assert contents(url)["007"][1:] == (picture(7), ("words 7",))
    assert run(tars, url).version == report.version
    assert storage.list_names(tars) == ["s-0.tar", "s-1.tar"]
    assert verify(url).faults == ()
    # Under the same name comes another tar: an old copy in the cache must not be taken for it.
    write_tar(tmp_path / "tars" / "s-1.tar", range(25, 30))
    storage.write_bytes(f"{tars}/s-1.tar", (tmp_path / "tars" / "s-1.tar").read_bytes())
    assert [fault.kind for fault in verify(url).faults] == ["unreadable-file"]
    changed = run(tars, url)
    assert (changed.num_added, changed.num_removed, changed.num_unchanged) == (5, 5, 5)
    assert contents(url)["027"][1:] == (picture(27), ("words 27",))
    local = tmp_path / "local"  # a dataset here of tars that are there
    run(tars, local)
    assert contents(local) == contents(url)
    assert not Dataset.open(str(local)).split("train").is_local


def test_a_tar_is_told_from_another_version_of_it() -> None:
    tar = ForeignTar("/a#b/c.tar", '12-"e#tag"', "settings", 3)
    tar.check_stamp('12-"e#tag"')
    with pytest.raises(ShardError, match="changed since it was indexed"):
        tar.check_stamp('12-"etag"')


def test_a_reference_survives_being_written_down() -> None:
    reference = ImageReference(1536, 7, "00ff")
    assert ImageReference.from_json(reference.to_json()) == reference
    with pytest.raises(ShardError, match="not a reference"):
        ImageReference.from_json(b"\xff\xd8")
