from pathlib import Path

import pytest
import xxhash

from pipeline import digest
from pipeline.digest import digest_of, digest_of_file, digest_of_parts


def test_the_digest_is_the_same_of_bytes_of_their_parts_and_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "_CHUNK_BYTES", 3)
    (tmp_path / "file").write_bytes(b"sightline")
    expected = xxhash.xxh3_128_hexdigest(b"sightline")
    assert digest_of(b"sightline") == expected
    assert digest_of_parts([b"sight", b"", b"line"]) == expected
    assert digest_of_file(tmp_path / "file") == expected


def test_what_is_empty_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    expected = digest_of(b"")
    assert digest_of_parts([]) == digest_of_file(tmp_path / "file") == expected
