import numpy as np
import pyarrow as pa

from pipeline.data.ingest.listing_spool import ListingSpool
from pipeline.data.manifest.schema import arrow_schema
from pipeline.data.sources.columns import LISTED
from pipeline.data.tars.foreign_tar import ForeignTar


def batch(keys: list[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"key": key} for key in keys], LISTED)


def test_records_are_taken_by_their_numbers() -> None:
    with ListingSpool() as spool:
        for keys in (["a", "b", "c"], [], ["d"], ["e", "f"]):
            spool.add(batch(keys))
        spool.finish()
        assert spool.num_listed == 6
        assert spool.take(np.array([0, 2, 3, 5]))["key"].to_pylist() == ["a", "c", "d", "f"]
        assert spool.take(np.array([], np.int64)).schema == LISTED


def test_a_listed_tar_has_the_columns_of_the_manifests() -> None:
    assert LISTED.field("tar").type == pa.struct(list(arrow_schema(ForeignTar)))
