import gzip
import io
from pathlib import Path

import pytest

from pipeline.data.sources.readers import gzip_file
from pipeline.data.sources.readers.gzip_file import is_gzip, unpacked, unpacking
from pipeline.data.sources.readers.json_file import read_json_list
from pipeline.data.sources.readers.tables import rows
from pipeline.errors import SourceError

LINE = b'{"image": "a.jpg", "caption": "words"}\n'


def test_files_unpack_to_what_was_packed_in_one_member_or_several() -> None:
    payload = gzip.compress(LINE) + gzip.compress(LINE * 3)
    assert is_gzip(payload)
    assert not is_gzip(LINE)
    assert unpacked(payload, "x") == LINE * 4
    assert list(unpacking(io.BytesIO(payload), "x")) == [LINE] * 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "followed"])
def test_a_cut_or_damaged_file_is_named(damage: str) -> None:
    packed = gzip.compress(LINE * 1000)
    damaged = {
        "cut": packed[:-9],
        "flipped": packed[:40] + bytes([packed[40] ^ 8]) + packed[41:],
        "followed": packed + b"\x1f\x8b and more",
    }[damage]
    with pytest.raises(SourceError, match="x: cannot be unpacked as gzip"):
        unpacked(damaged, "x")


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.csv.gz", "t.json.gz"])
def test_a_bomb_is_refused_before_it_has_gone_off(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gzip_file, "ANY_RATIO_BYTES", 1 << 20)
    path = tmp_path / name
    with gzip.open(path, "wb") as file:
        for _ in range(64):
            file.write(b" " * (1 << 20))
    with pytest.raises(SourceError, match=f"{name}: unpacked to over .* expected at most 100"):
        if name == "t.json.gz":
            read_json_list(str(path), "a list")
        else:
            list(rows(str(path), ["a"], "a"))


def test_small_files_may_have_any_ratio_and_none_may_be_endless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(unpacked(gzip.compress(b" " * 10_000_000), "x")) == 10_000_000
    monkeypatch.setattr(gzip_file, "MAX_BYTES", 1000)
    with pytest.raises(SourceError, match="and 1000 in all"):
        unpacked(gzip.compress(LINE * 50), "x")
