import msgspec
import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.manifest.schema import (
    FEATURES,
    SAMPLES,
    FeaturePart,
    FeatureRow,
    SampleRow,
    State,
    foreign_tars,
    from_table,
    judgements,
    matching_rows,
    part_places,
    part_suffix,
    row_codes,
    to_table,
)
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.errors import ManifestError
from pipeline.reason import Reason

ONE, OTHER = ForeignTar("/a.tar", "1-1", "x", 3), ForeignTar("/a.tar", "2-1", "x", 3)


def row(key: str, **fields: object) -> SampleRow:
    known = {"key": key, "split": "train", "state": State.LIVE}
    known |= {"image_fingerprint": "1", "texts_fingerprint": "2"}
    return msgspec.convert(known | fields, SampleRow)


ROWS = [
    row("live", suffix="jpg", image_offset=0, num_captions=0, perceptual_hash=-1, tar=ONE),
    row("other", state=State.REJECT, reason=Reason.NO_TEXTS, detail="none"),
    row("gone", state=State.REMOVED, sequence=7),
]


def test_rows_survive_being_columns() -> None:
    table = to_table(ROWS, SampleRow)
    assert table.schema == SAMPLES
    assert list(from_table(table, SampleRow)) == ROWS
    features = [
        FeatureRow(key="a", shard="s", num_regions=0, parts=(FeaturePart("values", 512, 9),)),
        FeatureRow(key="b", shard="s", reason=Reason.NOT_FINITE, detail="nan"),
    ]
    assert to_table(features, FeatureRow).schema == FEATURES
    assert list(from_table(to_table(features, FeatureRow), FeatureRow)) == features
    assert list(from_table(to_table([], SampleRow), SampleRow)) == []


def test_what_a_row_lacks_is_null() -> None:
    table = to_table(ROWS, SampleRow)
    assert table["suffix"].to_pylist() == ["jpg", None, None]
    assert table["image_offset"].to_pylist() == [0, None, None]
    assert table["num_captions"].to_pylist() == [0, None, None]
    assert table["perceptual_hash"].to_pylist() == [-1, None, None]
    assert table["reason"].to_pylist() == [None, "no-texts", None]
    assert table["sequence"].to_pylist() == [None, None, 7]


def test_some_columns_make_rows_too() -> None:
    names = ["key", "split", "state", "image_fingerprint", "texts_fingerprint"]
    (found,) = from_table(to_table(ROWS, SampleRow).select(names).slice(2), SampleRow)
    assert found == row("gone", state=State.REMOVED)


def test_a_value_of_a_later_release_is_named() -> None:
    table = to_table(ROWS, SampleRow)
    index = table.schema.get_field_index("reason")
    table = table.set_column(index, "reason", pa.array([None, "too-ugly", None]))
    with pytest.raises(ManifestError, match=r"does not know .*too-ugly"):
        list(from_table(table, SampleRow))


def test_only_what_was_listed_as_a_reject_is_a_judgement() -> None:
    examined = row("bad", state=State.REJECT, reason=Reason.NOT_AN_IMAGE, suffix="jpg")
    assert judgements(to_table([*ROWS, examined], SampleRow)).to_pylist() == [
        "",
        "no-texts",
        "",
        "",
    ]


def test_parts_are_found_by_name() -> None:
    assert [part_suffix(name) for name in ("values", "boxes", "segments")] == [
        "npy",
        "boxes.npy",
        "segments.json",
    ]
    rows = [
        FeatureRow(
            key="a", shard="s", parts=(FeaturePart("values", 1, 2), FeaturePart("boxes", 3, 4))
        ),
        FeatureRow(key="b", shard="s", reason=Reason.NOT_FINITE),
        FeatureRow(key="c", shard="s", parts=(FeaturePart("values", 5, 6),)),
    ]
    parts = to_table(rows, FeatureRow)["parts"]
    for name, offsets, sizes in (
        ("values", [1, -1, 5], [2, -1, 6]),
        ("boxes", [3, -1, -1], [4, -1, -1]),
    ):
        found = part_places(parts, name)
        assert [each.tolist() for each in found] == [offsets, sizes]


def test_tars_are_told_apart_by_all_that_is_known_of_them() -> None:
    rows = [row("a", tar=OTHER), row("b"), row("c", tar=ONE), row("d", tar=OTHER)]
    tars, number = foreign_tars(to_table(rows, SampleRow)["tar"])
    assert tars == [ONE, OTHER]
    assert number.tolist() == [1, -1, 0, 1]
    assert foreign_tars(to_table([row("b")], SampleRow)["tar"])[0] == []


def test_rows_are_matched_by_several_columns() -> None:
    random = np.random.default_rng(0)
    keys = random.integers(0, 30, (2, 200))
    tables = [
        pa.table(
            {"key": [f"k{key // 5}" for key in part], "shard": [f"s{key % 5}" for key in part]}
        )
        for part in keys
    ]
    names = ["key", "shard"]
    alike = row_codes(tables[0], names)
    assert ((alike[:, None] == alike[None]) == (keys[0][:, None] == keys[0][None])).all()
    place = matching_rows(tables[0], tables[1], names)
    known = set(keys[1].tolist())
    for key, found in zip(keys[0].tolist(), place.tolist(), strict=True):
        assert keys[1][found] == key if key in known else found == -1
