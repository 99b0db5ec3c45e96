"""The digest of what there is to learn from."""

from pathlib import Path

import pyarrow.compute as pc
import pytest
import xxhash

from pipeline.data.manifest import content as content_module
from pipeline.data.manifest.content import content, kept_content
from pipeline.data.manifest.manifest import Manifest
from tests.data.tiny_dataset import make_dataset


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_the_digest_is_that_of_the_lines_sorted_by_key(tmp_path: Path, split: str | None) -> None:
    make_dataset(str(tmp_path))
    manifest = Manifest.open(str(tmp_path))
    samples = manifest.samples(("key", "split", "digest", "texts_fingerprint")).sort_by("key")
    if split is not None:
        samples = samples.filter(pc.equal(samples["split"], split))
    lines = [
        "\t".join([row["key"], row["split"], row["digest"], row["texts_fingerprint"], "\n"])
        for row in samples.to_pylist()
    ]
    expected = xxhash.xxh3_128_hexdigest("".join(lines).encode())
    assert content(manifest, split) == expected


def test_it_is_found_out_once_and_a_damaged_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(str(tmp_path))
    manifest, folder = Manifest.open(str(tmp_path)), tmp_path / "kept"
    first = kept_content(manifest, "train", str(folder))
    assert kept_content(manifest, None, str(folder)) != first
    (folder / "content-train").write_bytes(first[:20].encode())
    assert kept_content(manifest, "train", str(folder)) == first
    monkeypatch.setattr(content_module, "content", None)
    assert kept_content(manifest, "train", str(folder)) == first
