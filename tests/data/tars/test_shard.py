import io
import os
import resource
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash

from pipeline import storage
from pipeline.data.sample import Sample
from pipeline.data.tars.shard import ShardWriter, shard_location, sidecar_location
from pipeline.errors import ShardError, StorageError

SAMPLES = [
    Sample("coco-41", {"jpg": b"\xff" * 513, "json": b"{}"}),
    Sample("coco-42", {"json": b'{"a":1}', "jpg": b""}),
    Sample("coco_43", {"png": b"p" * 512}),
]


def write(folder: Path, samples: list[Sample], name: str | None = None) -> ShardWriter:
    with ShardWriter(str(folder), name) as writer:
        for sample in samples:
            writer.write(sample)
    return writer


def test_the_same_samples_give_the_same_bytes_under_the_same_name(tmp_path: Path) -> None:
    one = write(tmp_path / "one", SAMPLES).shard
    reordered = [Sample(s.key, dict(reversed(list(s.parts.items())))) for s in SAMPLES]
    other = write(tmp_path / "other", reordered).shard
    assert one == other
    payload = (tmp_path / "one" / f"{one.name}.tar").read_bytes()
    assert payload == (tmp_path / "other" / f"{one.name}.tar").read_bytes()
    assert one.digest == xxhash.xxh3_128_hexdigest(payload)
    assert one.name == one.digest[:16]
    assert (one.size_bytes, one.num_samples) == (len(payload), 3)


def test_parts_of_any_size_lie_behind_each_other(tmp_path: Path) -> None:
    sizes = (0, 5, 511, 512, 16 * 1024 - 1, 16 * 1024, 16 * 1024 + 1, 70_000, 2_000_000)
    samples = [
        Sample(f"{n}-{m}", {"a": bytes([n + 1]) * size, "b": bytes([m + 101]) * other})
        for n, size in enumerate(sizes)
        for m, other in enumerate(sizes)
    ]
    shard = write(tmp_path, samples).shard
    payload = (tmp_path / f"{shard.name}.tar").read_bytes()
    assert (shard.digest, shard.size_bytes) == (xxhash.xxh3_128_hexdigest(payload), len(payload))
    with tarfile.open(tmp_path / f"{shard.name}.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    parts = {f"{s.key}.{suffix}": part for s in samples for suffix, part in s.parts.items()}
    assert found == parts


def test_a_refused_sample_leaves_no_trace_in_a_shard_that_goes_on(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "one")) as writer:
        writer.write(SAMPLES[0])
        with pytest.raises(ShardError, match="lower-case"):
            writer.write(Sample("b", {"a": b"x" * 20_000, "B": b""}))
        writer.write(SAMPLES[1])
    assert writer.shard == write(tmp_path / "other", SAMPLES[:2]).shard


def test_members_lie_where_the_writer_says(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path)) as writer:
        placed = [(sample, writer.write(sample)) for sample in SAMPLES]
    location = storage.join(str(tmp_path), f"{writer.shard.name}.tar")
    for sample, members in placed:
        assert set(members) == set(sample.parts)
        for suffix, member in members.items():
            found = storage.read_range(location, member.offset, member.size)
            assert found == sample.parts[suffix]


def test_headers_are_those_of_tarfile(tmp_path: Path) -> None:
    name = write(tmp_path, SAMPLES).shard.name
    with tarfile.open(tmp_path / f"{name}.tar") as tar:
        payload = (tmp_path / f"{name}.tar").read_bytes()
        for member in tar.getmembers():
            expected = member.tobuf(tarfile.USTAR_FORMAT)
            assert payload[member.offset : member.offset + 512] == expected
            assert (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
        assert tar.getnames() == [
            "coco-41.jpg",
            "coco-41.json",
            "coco-42.jpg",
            "coco-42.json",
            "coco_43.png",
        ]


def test_plain_webdataset_reads_a_shard(tmp_path: Path) -> None:
    name = write(tmp_path, SAMPLES).shard.name
    dataset = webdataset.WebDataset(str(tmp_path / f"{name}.tar"), shardshuffle=False)
    found = [
        {name: part for name, part in sample.items() if not name.startswith("__")}
        for sample in dataset
    ]
    assert found == [dict(sample.parts) for sample in SAMPLES]


def test_plain_webdataset_decodes_a_sidecar(tmp_path: Path) -> None:
    values = np.arange(15, dtype=np.float16).reshape(3, 5)
    boxes = np.ones((3, 4), np.float32)

    def npy(array: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    write(tmp_path, [Sample("a", {"npy": npy(values), "boxes.npy": npy(boxes)})], "0011")
    dataset = webdataset.WebDataset(str(tmp_path / "0011.tar"), shardshuffle=False).decode()
    (sample,) = dataset
    assert np.array_equal(sample["npy"], values)
    assert np.array_equal(sample["boxes.npy"], boxes)


def test_gnu_tar_lists_a_shard(tmp_path: Path) -> None:
    name = write(tmp_path, SAMPLES).shard.name
    listing = subprocess.run(
        ["tar", "tf", str(tmp_path / f"{name}.tar")], check=True, capture_output=True, text=True
    )
    assert listing.stdout.split()[0] == "coco-41.jpg"
    assert listing.stderr == ""


@pytest.mark.parametrize(
    ("sample", "match"),
    [
        (Sample("coco.42", {"jpg": b""}), r"coco\.42"),
        (Sample("größe", {"jpg": b""}), "ASCII"),
        (Sample("coco-41", {"jpg": b""}), "already"),
        (Sample("b", {}), "no parts"),
        (Sample("b", {"JPG": b""}), "lower-case"),
        (Sample("b" * 80, {"a" * 20: b""}), "100 characters"),
    ],
)
def test_a_shard_is_absent_after_a_sample_is_refused(
    tmp_path: Path, sample: Sample, match: str
) -> None:
    with pytest.raises(ShardError, match=match), ShardWriter(str(tmp_path)) as writer:
        writer.write(SAMPLES[0])
        writer.write(sample)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_published_without_samples(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path)) as writer:
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ShardError, match="no shard"):
        _ = writer.shard


def test_nothing_is_visible_before_the_shard_is_whole(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path)) as writer:
        writer.write(SAMPLES[0])
        assert list(tmp_path.glob("*.tar")) == []
    assert len(list(tmp_path.glob("*.tar"))) == 1


def test_a_short_write_is_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole", SAMPLES).shard

    def write_a_little(descriptor: int, pieces: list[bytes]) -> int:
        return os.write(descriptor, b"".join(pieces)[:700])

    monkeypatch.setattr("os.writev", write_a_little)
    assert write(tmp_path / "short", SAMPLES).shard == whole
    assert (tmp_path / "short" / f"{whole.name}.tar").stat().st_size == whole.size_bytes


def test_a_sample_of_more_parts_than_the_system_writes_at_once_is_whole(tmp_path: Path) -> None:
    large = {f"p{number}": bytes([number % 256]) * 16_384 for number in range(600)}
    with ShardWriter(str(tmp_path)) as writer:
        placed = [(s, writer.write(s)) for s in (*SAMPLES, Sample("large", large), Sample("z", {"a": b"1"}))]  # fmt: skip  # noqa: E501
    location = storage.join(str(tmp_path), f"{writer.shard.name}.tar")
    assert xxhash.xxh3_128_hexdigest(storage.read_bytes(location)) == writer.shard.digest
    for sample, members in placed:
        for suffix, member in members.items():
            found = storage.read_range(location, member.offset, member.size)
            assert found == sample.parts[suffix]


@pytest.mark.parametrize("size_bytes", [100, 3_000_000])  # written at the end, or before
def test_a_disk_without_room_leaves_nothing(tmp_path: Path, size_bytes: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(StorageError, match="cannot be written"),
            ShardWriter(str(tmp_path)) as w,
        ):
            w.write(Sample("a", {"jpg": bytes(size_bytes)}))
            w.write(Sample("b", {"jpg": bytes(size_bytes)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_shards_reach_an_object_store(object_store: str) -> None:
    with ShardWriter(f"{object_store}/shards/train") as writer:
        member = writer.write(SAMPLES[0])["jpg"]
    location = shard_location(object_store, "train", writer.shard.name)
    assert storage.read_range(location, member.offset, member.size) == SAMPLES[0].parts["jpg"]


def test_places_of_shards_and_sidecars() -> None:
    assert shard_location("s3://b/d", "train", "00ff") == "s3://b/d/shards/train/00ff.tar"
    assert sidecar_location("d", "grid-1", "00ff") == "d/features/grid-1/00ff.tar"
