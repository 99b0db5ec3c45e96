import io
import json
import os
import pickle
import subprocess
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import webdataset
from PIL import Image

from pipeline import storage
from pipeline.config import check
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.dataset import Dataset
from pipeline.data.sources import webdataset as webdataset_source
from pipeline.data.sources.base import Record, Reject
from pipeline.errors import ConfigError, SourceError
from tests.data.requested import ranges
from tests.data.sources.built import (
    DatasetPart,
    build,
    draw,
    ingested,
    listed,
    reason,
    reasons,
    record,
)
from tests.vision.video_files import video


def picture(folder: Path, name: str = "x.png") -> bytes:
    draw(folder / name)
    return (folder / name).read_bytes()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, payload in members:
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))


def test_tars_that_webdataset_writes_are_read_where_they_lie(tmp_path: Path) -> None:
    image = picture(tmp_path)
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"s-{shard:03d}.tar")) as writer:
            for number in range(4):
                meta = {"alt": f"alt {number}", "width": 7}
                key = f"{shard:03d}{number}"
                writer.write({"__key__": key, "png": image, "txt": f"words {key}", "json": meta})
    settings: dict[str, Any] = {"texts": {"captions": ["txt", "json.alt"]}}
    source = build("webdataset", shards=str(tmp_path / "s-{000..002}.tar"), **settings)
    entries = listed(source)
    assert {reason(entry) for entry in entries.values()} == {"live"}
    assert len(entries) == 12
    found = record(source, "0013")
    assert found.texts.decode().captions == ("words 0013", "alt 3")
    assert (found.suffix, source.read(found)) == ("png", image)
    folder = build("webdataset", shards=str(tmp_path), **settings)
    assert list(folder.records()) == list(source.records())


def test_the_shards_of_this_project_read_back_as_they_were(tmp_path: Path) -> None:
    shapes = build("shapes", scenes=5, validation_scenes=2, image_size=32)
    ingested(shapes, tmp_path)
    splits = {
        split: str(tmp_path / "dataset" / "shards" / split) for split in ("train", "validation")
    }
    source = build("webdataset", shards=splits)
    assert reasons(source) == {"live": 7}
    ingested(source, tmp_path / "again")
    for split in splits:
        one = Dataset.open(str(tmp_path / "dataset")).split(split)
        other = Dataset.open(str(tmp_path / "again" / "dataset")).split(split)
        rows = range(one.num_samples)
        assert list(one.each_key()) == list(other.each_key())
        assert one.texts(rows) == other.texts(rows)
        assert [one.image(row) for row in rows] == [other.image(row) for row in rows]


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    image = picture(tmp_path)
    write_tar(
        tmp_path / "a.tar",
        [
            ("./good.seg.png", b"a mask"),
            ("./good.png", image),
            ("./good.txt", b"words"),
            ("silent.png", image),
            ("blind.txt", b"words"),
            ("bad.png", image),
            ("bad.json", b"{"),
            ("latin.png", image),
            ("latin.txt", b"\xff\xfe\xfa"),
            ("good.png", image),
            ("good.txt", b"again"),
        ],
    )
    source = build("webdataset", shards=str(tmp_path / "a.tar"))
    assert reasons(source) == {
        "live": 2,
        "no-texts": 1,
        "missing-image": 1,
        "malformed-texts": 2,
    }
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects["duplicate-id"]) == (1, 1)
    assert source.read(next(source.records())) == image  # type: ignore[arg-type]


def colour(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), (number, 40, 90)).save(file, "PNG")
    return file.getvalue()


def test_what_macs_put_beside_files_is_passed_over(tmp_path: Path) -> None:
    image = picture(tmp_path)
    members = [
        (f"{folder}{name}.{suffix}", payload)
        for name in ("a", "b")
        for suffix, good in (("png", image), ("txt", b"words"))
        for folder, payload in (("./._", b"\0\5\x16\7"), ("./", good), ("__MACOSX/", b"no"))
    ]
    write_tar(tmp_path / "a.tar", [("./.DS_Store", b"no"), *sorted(members)])
    write_tar(tmp_path / "._a.tar", [])
    source = build("webdataset", shards=str(tmp_path))
    assert {key: reason(entry) for key, entry in listed(source).items()} == {
        "a": "live",
        "b": "live",
    }


@pytest.mark.parametrize("order", ["aab", "aba"])
def test_the_second_picture_of_a_key_is_counted_wherever_it_is(tmp_path: Path, order: str) -> None:
    pairs = [((f"{key}.png", colour(n)), (f"{key}.txt", b"%d" % n)) for n, key in enumerate(order)]
    write_tar(tmp_path / "a.tar", [member for pair in pairs for member in pair])
    source = build("webdataset", shards=str(tmp_path / "a.tar"), validation_fraction=0.0)
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (2, {"duplicate-id": 1})
    split = Dataset.open(str(tmp_path / "dataset")).split("train")
    row = list(split.each_key()).index("a")
    assert (split.image(row), split.texts([row])[0].captions) == (colour(0), ("0",))


def test_pictures_whose_names_have_more_dots_are_samples_of_their_own(tmp_path: Path) -> None:
    names = [f"photo.2019-07-{number:03d}" for number in range(150)]
    members = [(f"{name}.PNG", colour(number)) for number, name in enumerate(names)]
    members += [(f"{name}.txt", name.encode()) for name in names]
    write_tar(tmp_path / "a.tar", sorted([*members, ("photo.1.png", b"?"), ("photo.2.txt", b"?")]))
    source = build("webdataset", shards=str(tmp_path / "a.tar"))
    assert reasons(source) == {"live": 150, "no-texts": 1, "missing-image": 1}
    entries = [entry for entry in source.records() if isinstance(entry, Record)]
    assert len({entry.key for entry in entries}) == 150
    for entry in entries:
        assert source.read(entry) == colour(names.index(entry.texts.decode().captions[0]))


def test_parts_with_dots_stay_parts_unless_they_say_something(tmp_path: Path) -> None:
    image = picture(tmp_path)
    members = [
        ("a.png", image), ("a.seg.json", b'{"classes": [1]}'), ("a.seg.png", image),
        ("a.txt", b"a"),
        ("b.meta.json", b"{}"), ("b.txt", b"words"),
        ("c.2.png", image), ("c.2.txt", b"two"), ("c.png", image), ("c.txt", b"one"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    source = build("webdataset", shards=str(tmp_path / "a.tar"))
    entries = list(source.records())
    assert [(entry.key.partition("-")[0], reason(entry)) for entry in entries] == [
        ("a", "live"),
        ("b", "missing-image"),
        ("c", "live"),
        ("c", "live"),
    ]
    assert [entry.texts.decode().captions for entry in entries[2:]] == [("one",), ("two",)]  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(20))
def test_every_member_is_in_a_sample_or_a_reject_whatever_it_is_called(
    tmp_path: Path, seed: int
) -> None:
    rng = Random(seed)
    image = picture(tmp_path)
    names = [
        rng.choice("ab")
        + "".join(rng.choice([".c", ".C", ".2", ".png", ".PNG"]) for _ in range(rng.randrange(3)))
        + rng.choice([".png", ".PNG", ".txt", ".TXT", ".json", ""])
        for _ in range(30)
    ]
    write_tar(tmp_path / "a.tar", [(name, image) for name in names])
    entries = list(build("webdataset", shards=str(tmp_path / "a.tar")).records())
    assert sum(entry.num_entries for entry in entries) == len(names)


def test_members_that_come_into_nothing_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(tmp_path)
    write_tar(
        tmp_path / "a.tar", [(f"{key}.{part}", image) for key in "ab" for part in ("png", "txt")]
    )
    found = webdataset_source._without_repeats
    monkeypatch.setattr(
        webdataset_source,
        "_without_repeats",
        lambda members: [dict([*found(members)[0].items()][:1])],
    )
    with pytest.raises(SourceError, match=r"a\.tar has 4: of 4 entries, 2 are in"):
        list(build("webdataset", shards=str(tmp_path / "a.tar")).records())


def test_members_that_are_no_plain_files_are_counted(tmp_path: Path) -> None:
    image = picture(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, payload in (("a.png", image), ("a.txt", b"words"), ("b.txt", b"words")):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
        for name, target in (("b.png", "a.png"), ("c.png", "a.png"), ("c.txt", "a.txt")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            tar.addfile(member)
        folder = tarfile.TarInfo("d.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = build("webdataset", shards=str(tmp_path / "a.tar"))
    assert reasons(source) == {"live": 1, "special-file": 2}
    details = [entry.detail for entry in source.records() if isinstance(entry, Reject)]
    assert all("a.tar: " in detail and "--hard-dereference" in detail for detail in details)


def test_sparse_images_are_told_and_the_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(colour(1))
    os.truncate(tmp_path / "a.png", 400_000)  # the rest is a hole
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.png").write_bytes(colour(2))
    (tmp_path / "b.txt").write_text("b")
    names = ["a.png", "a.txt", "b.png", "b.txt"]
    subprocess.run(["tar", "-cf", "a.tar", "--sparse", *names], check=True, cwd=tmp_path)
    source = build("webdataset", shards=str(tmp_path / "a.tar"))
    assert reasons(source) == {"live": 1, "sparse-member": 1}
    assert source.read(record(source, "b")) == colour(2)


def test_a_name_that_is_no_utf8_costs_its_record(tmp_path: Path) -> None:
    image = picture(tmp_path)
    members = [("a.png", image), ("a.txt", b"a"), ("caf\udce9.png", image), ("caf\udce9.txt", b"b"),
               ("d.\udce9.png", image), ("d.\udce9.txt", b"d")]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    for settings in ({}, {"in_place": False}):
        source = build("webdataset", shards=str(tmp_path / "a.tar"), **settings)
        report = ingested(source, tmp_path / str(len(settings)))
        assert (report.num_live, report.rejects) == (1, {"name-not-utf8": 2})
    entries = [entry for entry in source.records() if isinstance(entry, Reject)]
    assert r"caf\xe9" in entries[0].detail
    assert len({entry.key for entry in entries}) == 2


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 100_000,
        b'{"captions": ["\\ud800"]}',
        b'{"captions": ' + b"1" * 5000 + b"}",
        b"\xff\xfe{",
        b"",
        b"NaN",
        b'{"captions": ["a"], "captions": ["b"]}',
    ],
)
def test_malformed_json_costs_its_record(tmp_path: Path, payload: bytes) -> None:
    image = picture(tmp_path)
    members = [("a.png", image), ("a.txt", b"a"), ("b.json", payload), ("b.png", image)]
    write_tar(tmp_path / "a.tar", members)
    source = build("webdataset", shards=str(tmp_path / "a.tar"))
    report = ingested(source, tmp_path)
    assert report.num_live == 1
    assert report.num_rejects == 1
    assert set(report.rejects) <= {"malformed-texts", "no-texts"}


@pytest.mark.parametrize("last", ["9999999999", "9" * 5000])
def test_a_range_without_end_is_refused_before_it_is_written_out(last: str) -> None:
    with pytest.raises(SourceError, match="a range of over 1000000 tars"):
        list(build("webdataset", shards=f"x-{{000..{last}}}.tar").records())


def test_a_tar_whose_own_name_is_no_utf8_is_named(tmp_path: Path) -> None:
    members = [("a.png", picture(tmp_path)), ("a.txt", b"a")]
    write_tar(tmp_path / "tars" / "caf\udce9.tar", members)
    write_tar(tmp_path / "tars" / "b.tar", members)
    with pytest.raises(SourceError, match=r"caf\\xe9\.tar: its name is not UTF-8.*rename it"):
        ingested(build("webdataset", shards=str(tmp_path / "tars")), tmp_path)


def test_a_packed_tar_among_plain_ones_is_not_passed_over(tmp_path: Path) -> None:
    image = picture(tmp_path)
    write_tar(tmp_path / "tars" / "a.tar", [("a.png", image), ("a.txt", b"a")])
    write_tar(tmp_path / "tars" / "a.tar.gz", [], "w:gz")  # what a.tar was unpacked from
    assert reasons(build("webdataset", shards=str(tmp_path / "tars"))) == {"live": 1}
    write_tar(tmp_path / "tars" / "b.tar.gz", [], "w:gz")
    with pytest.raises(SourceError, match=r"b\.tar\.gz: a packed tar.*unpack it"):
        listed(build("webdataset", shards=str(tmp_path / "tars")))


def test_a_damaged_tar_stops_the_run_and_removes_nothing(tmp_path: Path) -> None:
    members = [(f"{number}.{suffix}", part) for number in range(6)
               for suffix, part in (("png", colour(number)), ("txt", b"words"))]  # fmt: skip
    write_tar(tmp_path / "tars" / "a.tar", members)
    write_tar(tmp_path / "tars" / "b.tar", [("b.png", colour(9)), ("b.txt", b"words")])
    whole = (tmp_path / "tars" / "a.tar").read_bytes()
    source = build("webdataset", shards=str(tmp_path / "tars"))
    first = ingested(source, tmp_path)
    at = whole.index(b"2.png")
    flipped = whole[: at + 150] + bytes([whole[at + 150] ^ 1]) + whole[at + 151 :]
    for damaged in (flipped, whole[: at + 200], whole[:at], whole + whole, whole[:at] + bytes(512)):
        (tmp_path / "tars" / "a.tar").write_bytes(damaged)
        with pytest.raises(SourceError, match=r"a\.tar: not a plain tar, or cut short: at byte"):
            ingested(source, tmp_path)
        manifest = Manifest.open(str(tmp_path / "dataset"))
        assert (manifest.version, manifest.samples().num_rows) == (first.version, 7)


def test_names_in_folders_are_apart_and_dots_in_folders_do_not_end_them(tmp_path: Path) -> None:
    image = picture(tmp_path)
    members = [(f"{folder}/0{part}", payload) for folder in ("v1.0", "v1.1")
               for part, payload in ((".png", image), (".txt", folder.encode()))]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    entries = list(build("webdataset", shards=str(tmp_path / "a.tar")).records())
    assert [entry.texts.decode().captions for entry in entries] == [("v1.0",), ("v1.1",)]  # type: ignore[union-attr]
    assert len({entry.key for entry in entries}) == 2


def test_an_image_part_may_be_named(tmp_path: Path) -> None:
    image = picture(tmp_path)
    members = [("a.left.png", b"no"), ("a.right.png", image), ("a.cls", b"3"), ("a.json", b"{}")]
    write_tar(tmp_path / "a.tar", members)
    settings: dict[str, Any] = {"image": "right.png", "texts": {"captions": "cls"}}
    source = build("webdataset", shards=[str(tmp_path / "a.tar")], **settings)
    found = record(source, "a")
    assert (source.read(found), found.suffix) == (image, "png")
    assert found.texts.decode().captions == ("3",)


def test_packed_and_cut_tars_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz", [("a.png", b"x")], "w:gz")
    with pytest.raises(SourceError, match=r"a\.tar\.gz: not a plain tar.*unpack it first"):
        listed(build("webdataset", shards=str(tmp_path / "a.tar.gz")))
    write_tar(tmp_path / "b.tar", [("a.png", b"x"), ("a.txt", b"y" * 5000), ("b.png", b"x")])
    payload = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(payload[: 512 * 4 + 2000])
    with pytest.raises(SourceError, match=r"b\.tar: not a plain tar, or cut short"):
        listed(build("webdataset", shards=str(tmp_path / "b.tar")))
    with pytest.raises(SourceError, match="found none"):
        (tmp_path / "empty").mkdir()
        listed(build("webdataset", shards=str(tmp_path / "empty")))


def test_tars_may_be_on_an_object_store(tmp_path: Path, object_store: str) -> None:
    image = picture(tmp_path)
    write_tar(tmp_path / "a.tar", [("a.png", image), ("a.json", json.dumps({"captions": ["x"]}).encode())])  # fmt: skip  # noqa: E501
    storage.write_bytes(f"{object_store}/a.tar", (tmp_path / "a.tar").read_bytes())
    source = build("webdataset", shards=object_store)
    assert source.read(record(source, "a")) == image


def test_preflight_looks_for_the_ends_of_a_range() -> None:
    settings = {"source": {"type": "webdataset", "shards": {"train": "s-{08..11}.tar"}}}
    source = check(DatasetPart, settings, "recipe").source
    assert source.locations() == {
        "shards.train": "s-08.tar",
        "shards.train.last": "s-11.tar",
    }


def test_an_image_part_that_is_no_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="'txt': expected one of"):
        build("webdataset", shards="s", image="txt")


def test_a_sample_may_be_a_video(tmp_path: Path) -> None:
    clip = video(5)
    members = [("a.mp4", clip), ("a.txt", b"a clip"), ("b.mp4", clip[:99]), ("b.txt", b"cut short")]
    write_tar(tmp_path / "s.tar", members)
    source = build("webdataset", shards=str(tmp_path / "s.tar"), validation_fraction=0.0)
    assert (record(source, "a").suffix, source.read(record(source, "a"))) == ("mp4", clip)
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (1, {"undecodable-video": 1})
    assert Dataset.open(str(tmp_path / "dataset")).split("train").image(0) == clip


def noise(side: int, seed: int) -> bytes:
    """A PNG of about 3 bytes a pixel, as nothing can be left out of noise."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), Random(seed).randbytes(3 * side * side)).save(file, "PNG")
    return file.getvalue()


def put_tar(url: str, folder: Path, images: list[bytes]) -> int:
    """Stores the images with a text each; returns the size of the tar in bytes."""
    parts = [(("png", image), ("txt", b"words")) for image in images]
    members = [(f"{n:04d}.{suffix}", part) for n, both in enumerate(parts) for suffix, part in both]
    write_tar(folder / "a.tar", members)
    payload = (folder / "a.tar").read_bytes()
    storage.write_bytes(f"{url}/a.tar", payload)
    return len(payload)


def test_many_small_images_in_a_remote_tar_are_few_requests(
    tmp_path: Path, object_store: str
) -> None:
    images = [noise(40, seed) for seed in range(150)]
    size_bytes = put_tar(object_store, tmp_path, images)
    source = build("webdataset", shards={"train": object_store})
    with ranges(object_store) as asked:
        assert ingested(source, tmp_path).num_live == 150
    assert len(asked) <= 12
    assert sum(map(len, asked)) <= 2 * size_bytes  # listed, then read
    assert [source.read(entry) for entry in source.records()] == images  # type: ignore[arg-type]


def test_large_images_in_a_remote_tar_are_not_fetched_until_they_are_read(
    tmp_path: Path, object_store: str
) -> None:
    images = [noise(400, seed) for seed in range(6)]
    size_bytes = put_tar(object_store, tmp_path, images)
    source = build("webdataset", shards={"train": object_store})
    with ranges(object_store) as asked:
        entries = list(source.records())
    assert sum(map(len, asked)) < size_bytes / 10
    with ranges(object_store) as asked:
        assert source.read(entries[3]) == images[3]  # type: ignore[arg-type]
    assert [len(each) for each in asked] == [len(images[3])]


def test_a_remote_tar_that_was_replaced_is_read_anew(tmp_path: Path, object_store: str) -> None:
    source = build("webdataset", shards={"train": object_store})
    for seeds in (range(3), range(3, 6)):
        images = [noise(40, seed) for seed in seeds]
        put_tar(object_store, tmp_path, images)
        assert [source.read(entry) for entry in list(source.records())] == images  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(source)).read(record(source, "0002")) == images[2]
