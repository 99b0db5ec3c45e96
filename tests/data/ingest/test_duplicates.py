import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.ingest.duplicates import Duplicates, Neighbours
from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.ingest.ingest_plan import HOLDERS

EXACT, NEAR = FilterConfig(duplicates="exact"), FilterConfig(duplicates="near", near_distance=3)


def images(**hashes: tuple[int, int]) -> pa.Table:
    """Rows by key, of a file's number and a perceptual hash."""
    return pa.table(
        {
            "key": list(hashes),
            "source_digest": [f"{file:016x}{0:016x}" for file, _ in hashes.values()],
            "perceptual_hash": [look for _, look in hashes.values()],
        },
        HOLDERS,
    )


def found(duplicates: Duplicates, table: pa.Table) -> list[tuple[str, str] | None]:
    return [copy and (copy.reason, copy.of) for copy in duplicates.find(table)]


def brute_force(held: np.ndarray, asked: np.ndarray, distance: int) -> list[int]:
    apart = np.bitwise_count(asked[:, None] ^ held[None, :])
    nearest = apart.argmin(axis=1)
    close = apart[np.arange(len(asked)), nearest] <= distance
    expected: list[int] = np.where(close, nearest, -1).tolist()
    return expected


@pytest.mark.parametrize("distance", [0, 1, 4, 10])
def test_neighbours_are_those_that_a_comparison_with_all_finds(distance: int) -> None:
    random = np.random.default_rng(distance)
    held = random.integers(0, 2**64, 3000, np.uint64)
    asked = held[random.integers(0, 3000, 200)]
    for bit in random.integers(0, 64, (200, distance + 1)).T:
        asked = asked ^ (np.uint64(1) << bit.astype(np.uint64))
    asked[:50] = held[:50]
    neighbours = Neighbours(distance)
    for start in range(0, 3000, 170):
        part = held[start : start + 170]
        neighbours.add(part, np.arange(start, start + len(part)))
    expected = brute_force(held, asked, distance)
    assert neighbours.nearest(asked).tolist() == expected
    assert 50 <= np.count_nonzero(np.array(expected) >= 0) < 200


def test_the_held_image_stays_and_of_new_ones_the_first() -> None:
    duplicates = Duplicates(images(held=(1, 0)), EXACT)
    table = images(a=(1, 0), b=(2, 0), c=(2, 0), d=(3, 0))
    assert found(duplicates, table) == [
        ("duplicate-image", "held"),
        None,
        ("duplicate-image", "b"),
        None,
    ]
    assert found(duplicates, images(e=(3, 0), f=(4, 0))) == [("duplicate-image", "d"), None]


def test_pictures_that_look_alike_are_near_duplicates() -> None:
    duplicates = Duplicates(images(held=(1, 0b0)), NEAR)
    table = images(a=(2, 0b111), b=(3, 0b1111), c=(4, 0b11111), d=(1, -1), e=(5, -1), f=(6, -8))
    assert found(duplicates, table) == [
        ("near-duplicate", "held"),
        None,
        ("near-duplicate", "b"),
        ("duplicate-image", "held"),
        None,
        ("near-duplicate", "e"),
    ]


def test_a_copy_of_a_copy_is_compared_with_what_is_held_alone() -> None:
    duplicates = Duplicates(images(held=(1, 0b0)), NEAR)
    assert found(duplicates, images(a=(2, 0b111), b=(3, 0b111111))) == [
        ("near-duplicate", "held"),
        None,
    ]


def test_the_cut_into_parts_makes_no_difference() -> None:
    random = np.random.default_rng(0)
    looks = random.integers(0, 2**40, 500)
    looks[250:] = looks[:250] ^ (1 << random.integers(0, 40, 250))
    rows = {f"key-{n}": (n % 400, int(look)) for n, look in enumerate(looks)}
    table = images(**rows)
    at_once = found(Duplicates(HOLDERS.empty_table(), NEAR), table)
    in_parts = Duplicates(HOLDERS.empty_table(), NEAR)
    bit_by_bit = [each for row in range(500) for each in found(in_parts, table.slice(row, 1))]
    assert at_once == bit_by_bit
    assert sum(each is not None for each in at_once) == 250
