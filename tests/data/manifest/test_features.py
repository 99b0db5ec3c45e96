from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import FeaturePart, FeatureRow, from_table, to_table


def feature_rows(shard: str, *keys: str, offset: int = 512) -> pa.Table:
    parts = (FeaturePart("values", offset, 640),)
    rows = [FeatureRow(key=key, shard=shard, num_regions=9, parts=parts) for key in keys]
    return to_table(rows, FeatureRow)


def test_features_are_listed_for_each_extractor(tmp_path: Path) -> None:
    manifest = Manifest.create(str(tmp_path))
    assert manifest.extractors() == []
    assert manifest.features("grid-1").rows().num_rows == 0
    assert manifest.features("grid-1").commit(feature_rows("s1", "a", "b")) == 1
    assert manifest.features("grid-1").commit(feature_rows("s2", "c")) == 2
    assert manifest.extractors() == ["grid-1"]
    assert manifest.features("grid-1").shards() == {"s1", "s2"}
    assert manifest.features("pixels-2").shards() == set()


def test_a_sample_keeps_the_features_of_its_older_shard(tmp_path: Path) -> None:
    features = Manifest.create(str(tmp_path)).features("grid-1")
    features.commit(feature_rows("s1", "a"))
    features.commit(feature_rows("s2", "a"))
    features.commit(feature_rows("s2", "a", offset=1024))
    found = from_table(features.rows(), FeatureRow)
    assert sorted((row.shard, row.parts[0].offset) for row in found) == [
        ("s1", 512),
        ("s2", 1024),
    ]


def test_features_listed_twice_at_once_are_kept_once(tmp_path: Path) -> None:
    url = str(tmp_path)
    Manifest.create(url)

    def work(writer: int) -> None:
        for shard in ("s1", "s2", "s3"):
            Manifest.open(url).features("grid-1").commit(feature_rows(shard, "a", f"b{writer}"))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert Manifest.open(url).features("grid-1").rows().num_rows == 3 * 4
