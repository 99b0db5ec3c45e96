"""Duplicates as an ingest meets them, from an empty dataset to the next runs."""

import contextlib
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import webdataset

from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest import pending_commits
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.media.reencode import ReencodeConfig
from pipeline.data.sources.base import Record
from pipeline.data.upkeep.verify import verify
from tests.data.album import Album, encoded, picture
from tests.data.world import Killed


def config(duplicates: str = "exact", shards_in_flight: int = 0) -> IngestConfig:
    return IngestConfig(
        samples_per_shard=3,
        shards_in_flight=shards_in_flight,
        filters=FilterConfig.model_validate({"duplicates": duplicates}),
    )


def album(*seeds: int) -> Album:
    """A file for each seed: equal seeds, equal files."""
    return Album({f"key-{n}": encoded(picture(seed)) for n, seed in enumerate(seeds)})


def states(url: str) -> dict[str, str]:
    """The reason of each reject, or `live`, by key."""
    rows = Manifest.open(url).rows(["key", "state", "reason"]).to_pylist()
    return {row["key"]: row["reason"] or row["state"] for row in rows}


def live(url: str) -> set[str]:
    return set(Manifest.open(url).samples(["key"])["key"].to_pylist())


def check_one_of_each(url: str, source: Album) -> None:
    """Asserts that of all equal files exactly one is live, and that the others name it."""
    rows = {row["key"]: row for row in Manifest.open(url).rows().to_pylist()}
    by_file: dict[bytes, list[str]] = {}
    for key, payload in source.files.items():
        by_file.setdefault(payload, []).append(key)
    for keys in by_file.values():
        kept = [key for key in keys if rows[key]["state"] == "live"]
        assert len(kept) == 1, (keys, kept)
        for key in set(keys) - set(kept):
            assert rows[key]["reason"] == "duplicate-image"
            assert rows[key]["duplicate_of"] == kept[0]
            assert kept[0] in rows[key]["detail"]


def test_of_equal_files_one_is_stored_and_the_others_are_rejects(tmp_path: Path) -> None:
    source = album(1, 2, 1, 3, 2, 1, 4)
    report = ingest(source, str(tmp_path), config())
    assert report.num_live == 4
    assert report.rejects == {"duplicate-image": 3}  # over a third, which stops no run
    check_one_of_each(str(tmp_path), source)
    assert not verify(str(tmp_path)).faults
    shards = sorted(str(path) for path in tmp_path.rglob("shards/train/*.tar"))
    samples = webdataset.WebDataset(shards, shardshuffle=False)
    assert {sample["__key__"] for sample in samples} == live(str(tmp_path))


def test_an_unchanged_run_reads_nothing(tmp_path: Path) -> None:
    source = album(1, 2, 1, 3, 2)
    first = ingest(source, str(tmp_path), config())
    source.reads.clear()
    again = ingest(source, str(tmp_path), config())
    assert (source.reads, again.version, again.num_unchanged) == ([], first.version, 5)


def test_a_new_copy_of_a_stored_image_is_rejected_and_comes_back(tmp_path: Path) -> None:
    url = str(tmp_path)
    source = album(1, 2)
    ingest(source, url, config())
    for number in range(5):
        source.files[f"copy-{number}"] = source.files["key-0"]
    ingest(source, url, config())
    assert live(url) == {"key-0", "key-1"}

    del source.files["key-0"]
    source.reads.clear()
    report = ingest(source, url, config())

    assert set(source.reads) == {f"copy-{number}" for number in range(5)}
    assert (report.num_live, report.rejects) == (2, {"duplicate-image": 4})
    check_one_of_each(url, source)
    assert ingest(source, url, config()).num_unchanged == 6


def test_a_copy_comes_back_when_its_original_is_edited(tmp_path: Path) -> None:
    url = str(tmp_path)
    source = album(1, 2, 1)
    ingest(source, url, config())
    (original,) = live(url) & {"key-0", "key-2"}
    source.files[original] = encoded(picture(9))
    ingest(source, url, config())
    assert live(url) == {"key-0", "key-1", "key-2"}


def test_an_edited_caption_frees_no_copy(tmp_path: Path) -> None:
    url = str(tmp_path)
    source = album(1, 2, 1)
    ingest(source, url, config())
    before = live(url)
    for key in source.files:
        source.captions[key] = ("other words",)
    ingest(source, url, config())
    assert live(url) == before
    check_one_of_each(url, source)


def test_pictures_that_look_alike_are_told_by_their_hashes(tmp_path: Path) -> None:
    source = album(1, 2)
    source.files["small"] = encoded(picture(1).resize((36, 24)), "JPEG", quality=70)
    assert ingest(source, str(tmp_path / "exact"), config("exact")).num_live == 3
    report = ingest(source, str(tmp_path / "near"), config("near"))
    assert report.rejects == {"near-duplicate": 1}
    assert len(live(str(tmp_path / "near")) & {"key-0", "small"}) == 1
    hashes = Manifest.open(str(tmp_path / "near")).samples(["perceptual_hash"])
    assert hashes["perceptual_hash"].null_count == 0
    source.files["large"] = encoded(picture(1, 96, 64))
    assert ingest(source, str(tmp_path / "near"), config("near")).rejects == {"near-duplicate": 2}


def test_a_file_that_is_rejected_for_another_reason_is_nobodys_original(tmp_path: Path) -> None:
    whole = encoded(picture(1, 200, 150))
    source = Album({"whole": whole, "other": encoded(picture(2, 200, 150))})
    for number in range(9):
        source.files[f"thumb-{number}"] = encoded(picture(1, 40, 30))
    filters = FilterConfig(duplicates="near", min_shorter_side=100)
    report = ingest(source, str(tmp_path), config().model_copy(update={"filters": filters}))
    assert live(str(tmp_path)) == {"whole", "other"}
    assert report.rejects == {"too-small": 9}


def test_switching_the_filter_off_brings_every_copy_back_and_stores_nothing_else(
    tmp_path: Path,
) -> None:
    url = str(tmp_path)
    source = album(1, 2, 1, 1, 3)
    ingest(source, url, config())
    before = {row["key"]: row for row in Manifest.open(url).samples().to_pylist()}
    ingest(source, url, config("keep"))
    after = {row["key"]: row for row in Manifest.open(url).samples().to_pylist()}
    assert set(after) == set(source.files)
    assert all(after[key]["shard"] == row["shard"] for key, row in before.items())
    ingest(source, url, config())
    check_one_of_each(url, source)


def test_copies_are_found_among_images_that_were_encoded_anew(tmp_path: Path) -> None:
    url = str(tmp_path)
    source = album(1, 2, 1)
    settings = config().model_copy(update={"reencode": ReencodeConfig(shorter_side=16)})
    ingest(source, url, settings)
    check_one_of_each(url, source)
    source.files["late"] = source.files["key-1"]
    ingest(source, url, settings)
    check_one_of_each(url, source)
    assert "late" not in live(url)


@pytest.mark.usefixtures("ray_local")
def test_the_timing_of_ray_tasks_decides_nothing(tmp_path: Path) -> None:
    random = Random(3)
    source = album(*(random.randrange(12) for _ in range(40)))
    ingest(source, str(tmp_path / "one"), config())
    ingest(source, str(tmp_path / "ray"), config(shards_in_flight=3))
    assert states(str(tmp_path / "one")) == states(str(tmp_path / "ray"))
    check_one_of_each(str(tmp_path / "ray"), source)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_breaks_anywhere_ends_as_an_unbroken_one(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(Album):
        fail_at_read = -1

        def read(self, record: Record) -> bytes:
            if len(self.reads) == self.fail_at_read:
                raise Killed("as if killed here")
            return super().read(record)

    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    random = Random(seed)
    files = album(*(random.randrange(9) for _ in range(24))).files
    source = Breaking(files)
    ingest(source, str(tmp_path / "unbroken"), config())
    for _ in range(5):
        source.reads.clear()
        source.fail_at_read = random.randrange(40)
        with contextlib.suppress(Killed):
            ingest(source, str(tmp_path / "broken"), config())
    source.fail_at_read = -1
    ingest(source, str(tmp_path / "broken"), config())
    assert states(str(tmp_path / "broken")) == states(str(tmp_path / "unbroken"))


@pytest.mark.parametrize("seed", range(3))
def test_after_any_edits_one_of_each_file_is_live(tmp_path: Path, seed: int) -> None:
    random, url = Random(seed), str(tmp_path)
    source = album(*(random.randrange(6) for _ in range(15)))
    kept: list[set[str]] = []
    for _ in range(7):
        ingest(source, url, config())
        check_one_of_each(url, source)
        kept.append({key for key in live(url) if key in source.files})
        for _ in range(random.randrange(4)):
            key = f"key-{random.randrange(20)}"
            if random.random() < 0.4 and len(source.files) > 3:
                source.files.pop(key, None)
            else:
                source.files[key] = encoded(picture(random.randrange(6)))
    assert any(one != other for one, other in pairwise(kept))
