import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import webdataset

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.info import describe, rejects
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.dataset import Dataset
from pipeline.data.sources.webdataset import WebDatasetSourceConfig
from pipeline.data.upkeep.compact import compact
from pipeline.data.upkeep.verify import verify
from pipeline.errors import ClusterError, ConfigError, FeatureError, RejectError, ShardError
from pipeline.vision import extract as module
from pipeline.vision.extract import ExtractConfig, ExtractProgress, ExtractReport, extract
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.pixels import PixelsConfig
from tests.vision.photo_dataset import make_dataset, picture, pictures

PIXELS = PixelsConfig(image_size=12, patch_size=4)
GRID = GridConfig(network="squeezenet1_0", node="features", weights="random", image_size=64)
HERE = ExtractConfig(actors=0, batch_size=3)


def sidecars(url: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (url / "features" / name).glob("*.tar")}


def check_features(url: Path, report: ExtractReport, images: dict[str, bytes]) -> None:
    """Every live sample, and no other, has the feature of its own image."""
    split = Dataset.open(str(url)).split("train", features=report.extractor)
    assert sorted([*split.each_key()]) == sorted(images)
    extractor = PIXELS.build()
    values = split.features(range(split.num_samples)).values
    for row, key in enumerate([*split.each_key()]):
        (expected,) = extractor.extract([extractor.prepare(images[key])])
        np.testing.assert_array_equal(values[row], expected.values)


def test_every_live_sample_gets_its_feature(tmp_path: Path) -> None:
    images = pictures(11)
    make_dataset(str(tmp_path), images)
    heard: list[ExtractProgress] = []
    report = extract(str(tmp_path), PIXELS, HERE, heard.append)
    check_features(tmp_path, report, images)
    assert (report.num_shards, report.num_images, report.num_unchanged) == (3, 11, 0)
    assert report.size_bytes == sum(map(len, sidecars(tmp_path, report.extractor).values()))
    assert [progress.num_done for progress in heard] == sorted(p.num_done for p in heard)
    assert (heard[0].num_done, heard[-1].num_done, heard[-1].num_to_do) == (0, 11, 11)
    assert 0 <= report.waited_fraction <= 1


def test_second_run_computes_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(str(tmp_path), pictures(9))
    first = extract(str(tmp_path), PIXELS, HERE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, "write_sidecar", None)
    monkeypatch.setattr(module, "measure_invariance", None)
    again = extract(str(tmp_path), PIXELS, HERE)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert (again.num_shards, again.num_images, again.num_unchanged) == (0, 0, 9)
    assert again.extractor == first.extractor
    assert again.card == first.card
    assert after == before


def test_cost_follows_change(tmp_path: Path) -> None:
    images = pictures(12)
    make_dataset(str(tmp_path), images)
    name = extract(str(tmp_path), PIXELS, HERE).extractor
    before = sidecars(tmp_path, name)

    images = images | pictures(2, first=20) | {"photo-5": picture(99)}
    del images["photo-7"]
    make_dataset(str(tmp_path), images)
    report = extract(str(tmp_path), PIXELS, HERE)
    assert report.num_images == 3
    assert report.num_unchanged == 10
    check_features(tmp_path, report, images)
    after = sidecars(tmp_path, name)
    assert {shard: after[shard] for shard in before} == before


def test_shard_with_removed_samples_counts_its_live_ones(tmp_path: Path) -> None:
    images = pictures(8)
    make_dataset(str(tmp_path), images, samples_per_shard=8)
    del images["photo-2"], images["photo-6"]
    make_dataset(str(tmp_path), images, samples_per_shard=8)
    report = extract(str(tmp_path), PIXELS, HERE)
    assert report.num_images == 6
    check_features(tmp_path, report, images)


def test_older_version_of_the_dataset_keeps_its_features(tmp_path: Path) -> None:
    images = pictures(5)
    make_dataset(str(tmp_path), images, samples_per_shard=5)
    version = Manifest.open(str(tmp_path)).version
    extract(str(tmp_path), PIXELS, HERE)
    make_dataset(str(tmp_path), images | {"photo-1": picture(70)}, samples_per_shard=5)
    name = extract(str(tmp_path), PIXELS, HERE).extractor
    split = Dataset.open(str(tmp_path), version).split("train", features=name)
    assert split.num_samples == 5


def test_another_extractor_has_its_own_folder_and_touches_no_shard(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), pictures(6))
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").rglob("*.tar")}
    names = {extract(str(tmp_path), config, HERE).extractor for config in (PIXELS, GRID)}
    assert {path.name for path in (tmp_path / "features").iterdir()} == names
    assert len(names) == 2
    assert shards == {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").rglob("*.tar")}


def test_card_says_what_made_the_features(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), pictures(8))
    report = extract(str(tmp_path), GRID, HERE)
    card = json.loads((tmp_path / "features" / report.extractor / "card.json").read_text())
    assert card == report.card.plain()
    assert report.extractor == f"grid-{card['identity'][:8]}"
    (environment,) = card["environments"]
    assert environment["device"] == "cpu"
    assert environment["libraries"]["torch"]
    invariance = environment["batch_invariance"]
    assert 0 <= invariance["largest_difference"] <= invariance["tolerance"]
    assert invariance["images"] == 5  # of the first shards


def test_other_libraries_are_added_to_the_card(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), pictures(4))
    report = extract(str(tmp_path), PIXELS, HERE)
    path = tmp_path / "features" / report.extractor / "card.json"
    card = json.loads(path.read_text())
    card["environments"][0]["libraries"]["numpy"] = "1.0"
    path.write_text(json.dumps(card))
    make_dataset(str(tmp_path), pictures(9))
    extract(str(tmp_path), PIXELS, HERE)
    versions = [e["libraries"]["numpy"] for e in json.loads(path.read_text())["environments"]]
    assert versions == ["1.0", np.__version__]


LENIENT = HERE.model_copy(update={"max_reject_fraction": 0.2})


def with_bad_ones(images: dict[str, bytes], *keys: str) -> dict[str, bytes]:
    return images | {key: images[key][:-60] for key in keys}


def test_an_image_of_which_nothing_can_be_made_costs_its_sample_alone(tmp_path: Path) -> None:
    images = pictures(12)
    make_dataset(str(tmp_path), with_bad_ones(images, "photo-3"))
    report = extract(str(tmp_path), PIXELS, LENIENT)
    assert (report.num_images, report.rejects) == (12, {"truncated-image": 1})
    split = Dataset.open(str(tmp_path)).split("train", report.extractor)
    assert (split.num_samples, split.num_rejects) == (11, 1)
    assert "photo-3" not in [*split.each_key()]
    assert split.features(range(11)).values.shape[0] == 11
    assert [*split.without_features().each_key()] == [*split.each_key()]
    assert Dataset.open(str(tmp_path)).split("train").num_samples == 12
    assert describe(str(tmp_path))["features"] == {report.extractor: 11}
    assert describe(str(tmp_path))["feature_rejects"] == {report.extractor: {"truncated-image": 1}}
    (listed,) = rejects(str(tmp_path)).to_pylist()
    assert (listed["key"], listed["reason"]) == ("photo-3", "truncated-image")
    assert listed["detail"].startswith(f"{report.extractor}: ")
    found = verify(str(tmp_path))
    assert found.faults == ()
    coverage = found.features[report.extractor]
    assert (coverage.num_samples, coverage.num_missing, coverage.num_rejects) == (11, 0, 1)


def test_a_reject_is_left_alone_until_it_is_another_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(12)
    make_dataset(str(tmp_path), with_bad_ones(images, "photo-3"))
    extract(str(tmp_path), PIXELS, LENIENT)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_sidecar", None)
        again = extract(str(tmp_path), PIXELS, LENIENT)
    assert (again.num_shards, again.num_unchanged) == (0, 12)
    assert again.rejects == {"truncated-image": 1}

    make_dataset(str(tmp_path), images)
    mended = extract(str(tmp_path), PIXELS, LENIENT)
    assert (mended.num_images, mended.rejects) == (1, {})
    check_features(tmp_path, mended, images)
    assert rejects(str(tmp_path)).num_rows == 0


def test_more_rejects_than_allowed_stop_the_run_with_reasons_and_keep_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(12)
    make_dataset(str(tmp_path), with_bad_ones(images, "photo-3", "photo-5"))
    message = r"nothing of \d of 12 samples, .*max_reject_fraction=0\.01"
    with pytest.raises(RejectError, match=message) as caught:
        extract(str(tmp_path), PIXELS, HERE)
    assert re.search("truncated-image: [12], for example 'photo-[35]'", str(caught.value))
    report = extract(str(tmp_path), PIXELS, LENIENT)
    assert report.rejects == {"truncated-image": 2}
    monkeypatch.setattr(module, "write_sidecar", None)  # known by now: nothing is computed
    with pytest.raises(RejectError, match="2 of 12"):
        extract(str(tmp_path), PIXELS, HERE)


def test_a_night_that_brings_bad_images_alone_adds_rejects_alone(tmp_path: Path) -> None:
    images = pictures(12)
    make_dataset(str(tmp_path), images)
    first = extract(str(tmp_path), PIXELS, LENIENT)
    card = tmp_path / "features" / first.extractor / "card.json"
    document = json.loads(card.read_text())
    document["environments"][0]["libraries"]["numpy"] = "0.1"  # to be measured again
    card.write_text(json.dumps(document))
    make_dataset(str(tmp_path), images | {"photo-20": picture(20)[:-60]})
    second = extract(str(tmp_path), PIXELS, LENIENT)
    assert (second.num_images, second.rejects) == (1, {"truncated-image": 1})


def test_compaction_carries_rejects_over(tmp_path: Path) -> None:
    images = with_bad_ones(pictures(12), "photo-3")
    make_dataset(str(tmp_path), images, samples_per_shard=1)
    name = extract(str(tmp_path), PIXELS, LENIENT).extractor
    make_dataset(str(tmp_path), images, samples_per_shard=12)
    compact(str(tmp_path))
    report = extract(str(tmp_path), PIXELS, LENIENT)
    assert (report.num_shards, report.rejects) == (0, {"truncated-image": 1})
    assert Dataset.open(str(tmp_path)).split("train", name).num_samples == 11
    assert verify(str(tmp_path)).faults == ()


def test_missing_weights_are_refused_before_any_work(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), pictures(2))
    config = GRID.model_copy(update={"weights": str(tmp_path / "absent.pth")})
    with pytest.raises(FeatureError, match=r"absent\.pth"):
        extract(str(tmp_path), config, HERE)
    assert not (tmp_path / "features").exists()


def test_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    make_dataset(str(tmp_path), pictures(2))
    with pytest.raises(ConfigError, match="gpus_per_actor"):
        extract(str(tmp_path), PIXELS, ExtractConfig(actors=0, gpus_per_actor=1))


@pytest.mark.processes
def test_killed_run_loses_only_the_shard_in_flight(tmp_path: Path) -> None:
    images = pictures(40)
    make_dataset(str(tmp_path), images, samples_per_shard=2)
    program = """
import sys, time
from pipeline.data.manifest import pending_commits
from pipeline.vision import extract as module
from tests.vision.test_extract import HERE, PIXELS
pending_commits.COMMIT_SECONDS = 0
def slowly(progress):
    print(progress.num_done, flush=True)
    time.sleep(0.2)
module.extract(sys.argv[1], PIXELS, HERE, slowly)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) >= 10:
                run.send_signal(signal.SIGKILL)
                break
    report = extract(str(tmp_path), PIXELS, HERE)
    assert report.num_unchanged >= 10
    assert report.num_images == 40 - report.num_unchanged
    check_features(tmp_path, report, images)
    folder = tmp_path / "features" / report.extractor
    assert len(list(folder.glob("*.tar"))) == 20


def test_ray_is_started_only_for_work_that_needs_it(tmp_path: Path) -> None:
    def started() -> None:
        raise AssertionError("Ray was started")

    make_dataset(str(tmp_path), pictures(5))
    with pytest.raises(AssertionError, match="Ray was started"):
        extract(str(tmp_path), PIXELS, ExtractConfig(actors=1), start_ray=started)
    extract(str(tmp_path), PIXELS, HERE, start_ray=started)
    extract(str(tmp_path), PIXELS, ExtractConfig(actors=1), start_ray=started)


class DyingWorker:
    """An actor whose network kills its process."""

    def __init__(self, *_: Any) -> None: ...

    def environment(self, _plans: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("ray_local")
class TestOnActors:
    def test_actors_give_the_bytes_that_one_process_gives(self, tmp_path: Path) -> None:
        for folder in ("here", "there"):
            make_dataset(str(tmp_path / folder), pictures(14))
        here = extract(str(tmp_path / "here"), GRID, HERE)
        config = ExtractConfig(actors=2, cpus_per_actor=0.5, batch_size=3)
        there = extract(str(tmp_path / "there"), GRID, config)
        assert (there.num_shards, there.num_images) == (here.num_shards, here.num_images)
        assert there.card == here.card
        found = sidecars(tmp_path / "there", there.extractor)
        assert found == sidecars(tmp_path / "here", here.extractor)

    def test_a_killed_actor_loses_its_shard_and_no_other(self, tmp_path: Path) -> None:
        images = pictures(24)
        make_dataset(str(tmp_path), images)
        killed: list[int] = []
        finished: dict[Path, int] = {}

        def kill_one(progress: ExtractProgress) -> None:
            if progress.num_done and not killed:
                killed.append(self._workers()[0])
                os.kill(killed[0], signal.SIGKILL)
                done = (tmp_path / "features").glob("pixels-*/*.tar")
                finished.update((path, path.stat().st_mtime_ns) for path in done)

        report = extract(str(tmp_path), PIXELS, ExtractConfig(actors=1, batch_size=3), kill_one)
        assert len(killed) == 1
        assert (report.num_images, report.num_shards) == (24, 6)
        check_features(tmp_path, report, images)
        assert 1 <= len(finished) < 6
        assert {path: path.stat().st_mtime_ns for path in finished} == finished

    def test_error_in_an_actor_is_raised_as_it_is(self, tmp_path: Path) -> None:
        make_dataset(str(tmp_path), pictures(6))
        shard = min((tmp_path / "shards" / "train").iterdir())
        shard.write_bytes(shard.read_bytes()[:700])
        with pytest.raises(ShardError, match=shard.name) as refused:
            extract(str(tmp_path), PIXELS, ExtractConfig(actors=1))
        assert "Traceback" not in str(refused.value)

    def test_more_actors_than_the_cluster_holds_do_no_harm(self, tmp_path: Path) -> None:
        images = pictures(24)
        make_dataset(str(tmp_path), images)
        report = extract(str(tmp_path), PIXELS, ExtractConfig(actors=5, cpus_per_actor=1))
        check_features(tmp_path, report, images)

    def test_a_ray_of_its_own_without_room_for_one_actor_is_refused(self, tmp_path: Path) -> None:
        make_dataset(str(tmp_path), pictures(2))
        for asked, fault in (
            ({"cpus_per_actor": 64}, "1 x 64 CPU asked for, and this machine has 2 CPU"),
            ({"gpus_per_actor": 1}, "1 x 1 CPU and 1 GPU asked for, and this machine has 2 CPU"),
        ):
            pool = ExtractConfig.model_validate({"actors": 1, **asked})
            with pytest.raises(ConfigError, match=f"extract: {fault}"):
                extract(str(tmp_path), PIXELS, pool)

    def test_an_actor_that_dies_again_and_again_names_its_shard(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "SHARD_RETRIES", 1)
        make_dataset(str(tmp_path), pictures(2))
        monkeypatch.setattr(module, "_Worker", DyingWorker)
        with pytest.raises(ClusterError, match=r"lost 2 times, with its node .* over shard \w+"):
            extract(str(tmp_path), PIXELS, ExtractConfig(actors=1))

    def _workers(self) -> list[int]:
        found: list[Any] = []
        for _ in range(50):
            found = [
                process.pid
                for process in psutil.process_iter(["pid", "cmdline"])
                if any("ray::_Worker" in word for word in process.info["cmdline"] or ())
                and any(parent.pid == os.getpid() for parent in process.parents())
            ]
            if found:
                break
            time.sleep(0.1)
        return found


def test_images_in_tars_of_others_get_the_features_that_copies_get(tmp_path: Path) -> None:
    images = pictures(7)
    (tmp_path / "tars").mkdir()
    for name, keys in (("a", sorted(images)[:4]), ("b", sorted(images)[4:])):
        with webdataset.TarWriter(str(tmp_path / "tars" / f"{name}.tar")) as writer:
            for key in keys:
                writer.write({"__key__": f"deep.er/{key}", "jpg": images[key], "txt": key})
    before = {path: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    found = {}
    for in_place in (True, False):
        url = str(tmp_path / f"in-place-{in_place}")
        tars: dict[str, Any] = {"type": "webdataset", "shards": {"train": str(tmp_path / "tars")}}
        source = WebDatasetSourceConfig(**tars, in_place=in_place).build()
        ingest(source, url, IngestConfig(shards_in_flight=0))
        report = extract(url, PIXELS, HERE)
        split = Dataset.open(url).split("train", report.extractor)
        values = split.features(range(7)).values
        found[in_place] = dict(zip([*split.each_key()], values, strict=True))
        assert verify(url).faults == ()
        assert extract(url, PIXELS, HERE).num_shards == 0
    assert list(map(len, found.values())) == [7, 7]
    for key, values in found[True].items():
        np.testing.assert_array_equal(values, found[False][key])
    assert {path: path.read_bytes() for path in (tmp_path / "tars").iterdir()} == before


def test_a_replaced_tar_of_others_stops_the_run_and_is_named(tmp_path: Path) -> None:
    images, tar = pictures(3), tmp_path / "a.tar"
    with webdataset.TarWriter(str(tar)) as writer:
        for key in images:
            writer.write({"__key__": key, "jpg": images[key], "txt": key})
    source = WebDatasetSourceConfig(type="webdataset", shards={"train": str(tar)}).build()
    ingest(source, str(tmp_path / "out"), IngestConfig(shards_in_flight=0))
    status, payload = tar.stat(), tar.read_bytes()
    tar.write_bytes(payload.replace(b"\xff\xd8", b"\xff\xd9"))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))  # nothing else gives it away
    with pytest.raises(ShardError, match=r"a\.tar: sample .*expected an image of .* bytes at byte"):
        extract(str(tmp_path / "out"), PIXELS, HERE)
    tar.touch()
    with pytest.raises(ShardError, match=r"a\.tar: the tar has changed since it was indexed"):
        extract(str(tmp_path / "out"), PIXELS, HERE)
