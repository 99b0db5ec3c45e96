"""The index by shard: what it holds, that it is made once, and that it is not believed blindly."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.data.manifest import index_build
from pipeline.data.manifest.engine import Engine
from pipeline.data.manifest.index import ROW_NUMBERS, DamagedIndexError, Index
from pipeline.data.manifest.index_build import build_index, open_index
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.dataset import Dataset
from tests.data.tiny_dataset import EXTRACTOR, make_dataset, make_texts

FILES = ("files.arrow", "index.json", "rows.arrow", "shards.arrow")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def indexes(url: Path) -> list[Path]:
    return sorted((url / "manifest" / "index").iterdir())


@pytest.mark.parametrize("extractor", [None, EXTRACTOR])
def test_an_index_has_the_rows_of_every_shard_in_reading_order(
    tmp_path: Path, extractor: str | None
) -> None:
    written = make_dataset(str(tmp_path))
    manifest = Manifest.open(str(tmp_path))
    index = open_index(manifest, extractor, tmp_path / "cache")
    by_key = {row["key"]: row for row in manifest.samples().to_pylist()}
    features = manifest.features(EXTRACTOR).rows().to_pylist()
    found = []
    for number, totals in enumerate(index.shards.to_pylist()):
        rows = index.rows(number)
        if extractor is not None and totals["split"] == "val":
            assert (totals["num_rows"], totals["num_missing"]) == (0, 3)
            assert totals["first_missing"] == "sample-101"
            continue
        assert rows.keys.tolist() == written.shards[totals["shard"]]
        found += rows.keys.tolist()
        column = {name: rows.numbers[:, i] for i, name in enumerate(index.columns)}
        for i, key in enumerate(rows.keys):
            for name in ("image_offset", "image_size", "texts_offset", "texts_size"):
                assert column[name][i] == by_key[key][name]
            for name in ("image_file", "texts_file"):
                file = index.files.slice(column[name][i], 1).to_pylist()[0]
                assert (file["split"], file["shard"]) == (totals["split"], totals["shard"])
        texts = [make_texts(int(key.removeprefix("sample-"))) for key in rows.keys]
        assert totals["num_rows"] == len(texts)
        assert totals["num_captions"] == sum(len(each.captions) for each in texts)
        assert totals["num_with_captions"] == sum(bool(each.captions) for each in texts)
        assert totals["num_rounds"] == sum(each.num_rounds for each in texts)
    assert len(found) == (26 if extractor is None else 23)
    assert index.split_sizes() == {"train": 23, "val": 3}
    if extractor is None:
        assert index.columns == ROW_NUMBERS
    else:
        assert index.columns == (*ROW_NUMBERS, "num_regions", "values_offset", "values_size")
        assert len(features) == 23


def test_the_rows_are_an_arrow_stream_that_any_reader_reads(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    open_index(Manifest.open(str(tmp_path)), None, tmp_path / "cache")
    (folder,) = indexes(tmp_path)
    with pa.ipc.open_stream((folder / "rows.arrow").read_bytes()) as reader:
        rows = reader.read_all()
    dataset = Dataset.open(str(tmp_path))
    expected = [key for split in ("train", "val") for key in dataset.split(split).each_key()]
    assert rows["key"].to_pylist() == expected


def test_the_same_version_gives_the_same_bytes_whatever_the_order_of_its_rows(
    tmp_path: Path,
) -> None:
    make_dataset(str(tmp_path))
    manifest = Manifest.open(str(tmp_path))
    for name in ("one", "two"):
        build_index(manifest, EXTRACTOR, str(tmp_path / name))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert sorted(bytes_of(tmp_path / "one")) == [*FILES]


def test_an_index_is_made_once_by_one_of_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(str(tmp_path))
    made = []

    def counted(*how: object) -> None:
        made.append(how)
        build_index(*how)  # type: ignore[arg-type]

    monkeypatch.setattr(index_build, "build_index", counted)
    manifest = Manifest.open(str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: open_index(manifest, None, tmp_path / "cache"), range(4)))
    assert len(made) == 1
    assert {index.folder for index in found} == {str(indexes(tmp_path)[0])}
    assert open_index(Manifest.open(str(tmp_path)), None, tmp_path / "cache")
    assert len(made) == 1


def test_another_version_or_other_features_have_another_index(tmp_path: Path) -> None:
    written = make_dataset(str(tmp_path))
    url = str(tmp_path)
    Dataset.open(url).split("train")
    Dataset.open(url).split("train", EXTRACTOR)
    assert len(indexes(tmp_path)) == 2
    shard = written.add_shard("train", [50, 51])
    assert Dataset.open(url).split("train").num_samples == 25
    assert len(indexes(tmp_path)) == 3
    written.add_features(shard, lambda _: np.zeros((6, 8), np.float16))
    assert Dataset.open(url).split("train", EXTRACTOR).num_samples == 25
    assert len(indexes(tmp_path)) == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, name: str, damage: str) -> None:
    make_dataset(str(tmp_path))
    whole = Dataset.open(str(tmp_path)).split("train")
    (folder,) = indexes(tmp_path)
    before = bytes_of(folder)
    path = folder / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(before[name][: len(before[name]) * 2 // 3])
    else:
        middle = len(before[name]) // 2
        path.write_bytes(
            before[name][:middle] + bytes([before[name][middle] ^ 1]) + before[name][middle + 1 :]
        )
    for split in (Dataset.open(str(tmp_path)).split("train"), whole):
        assert sorted(split.keys(range(23))) == sorted(f"sample-{n}" for n in range(23))
        assert split.texts(range(23)) == [
            make_texts(int(key.removeprefix("sample-"))) for key in split.keys(range(23))
        ]
    assert bytes_of(folder) == before or damage == "changed"


def test_an_index_of_another_format_is_made_anew(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    open_index(Manifest.open(str(tmp_path)), None, tmp_path / "cache")
    (folder,) = indexes(tmp_path)
    card = (folder / "index.json").read_text()
    (folder / "index.json").write_text(card.replace('"format":1', '"format":7'))
    with pytest.raises(DamagedIndexError, match="of format 7"):
        Index.read(str(folder))
    open_index(Manifest.open(str(tmp_path)), None, tmp_path / "cache")
    assert (folder / "index.json").read_text() == card


def test_a_dataset_that_cannot_be_written_has_its_index_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    make_dataset(str(data))
    (data / "manifest" / "index").write_bytes(b"")  # no folder can be made there
    for _ in range(2):
        assert Dataset.open(str(data), cache=cache).split("train").num_samples == 23
        monkeypatch.setattr(index_build, "build_index", None)  # the second time it is there
    assert len([*cache.rglob("rows.arrow")]) == 1


def test_an_index_in_an_object_store_is_read_by_ranges(
    tmp_path: Path, object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(object_store, num_samples=11)
    split = Dataset.open(object_store, cache=tmp_path).split("train")
    read = []
    read_range = storage.read_range

    def counted(location: str, offset: int, size_bytes: int) -> bytes:
        read.append(location)
        return read_range(location, offset, size_bytes)

    monkeypatch.setattr(storage, "read_range", counted)
    split = Dataset.open(object_store, cache=tmp_path).split("train")
    assert sorted(split.keys(range(11))) == sorted(f"sample-{n}" for n in range(11))
    assert len(read) == 3
    assert all(name.startswith(f"{object_store}/manifest/index/") for name in read)
    assert not [*tmp_path.rglob("*.arrow")]


def test_what_is_built_does_not_depend_on_the_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(str(tmp_path))
    manifest = Manifest.open(str(tmp_path))
    build_index(manifest, EXTRACTOR, str(tmp_path / "one"))
    monkeypatch.setattr(index_build, "Engine", lambda: Engine(memory_bytes=32 << 20))
    build_index(manifest, EXTRACTOR, str(tmp_path / "two"))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_an_empty_dataset_has_an_index_without_shards(tmp_path: Path) -> None:
    index = open_index(Manifest.create(str(tmp_path)), None, tmp_path / "cache")
    assert index.split_sizes() == {}
    shutil.rmtree(index.folder)
