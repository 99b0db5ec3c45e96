"""Random damage to random inputs: no error but one's own, nothing lost in silence, bounded memory.

`SIGHTLINE_CHAOS_SEED` sets the seed of another series, `SIGHTLINE_CHAOS_SECONDS` its length.
"""

import os
import re
import resource
import time
from pathlib import Path
from random import Random

import pytest

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from pipeline.errors import PipelineError
from tests.data.chaos import BUILDERS, NUM_IMAGES, damage
from tests.data.sources.built import build

SEED = os.environ.get("SIGHTLINE_CHAOS_SEED", "0")
SECONDS = float(os.environ.get("SIGHTLINE_CHAOS_SECONDS", "39")) / len(BUILDERS)
MAX_ROUNDS = 40
MAX_GROWTH_KIB = 256 * 1024

CONFIG = IngestConfig(shards_in_flight=0, samples_per_shard=4, max_reject_fraction=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_random_damage_is_refused_or_told_and_costs_what_it_touched(
    tmp_path: Path, name: str
) -> None:
    ends = time.monotonic() + SECONDS
    for number in range(MAX_ROUNDS):
        if number and time.monotonic() > ends:
            break
        play_round(tmp_path / str(number), name, f"{SEED}-{name}-{number}")


def play_round(folder: Path, name: str, seed: str) -> None:
    """Ingests an input, damages it and ingests it again, then a few more times."""
    random = Random(seed)
    inputs, url = folder / "inputs", str(folder / "data")
    settings = BUILDERS[name](inputs)
    settings.pop("validation_fraction", None)
    kind = settings.pop("type")
    report = ingest(build(kind, **settings), url, CONFIG)
    assert (report.num_live, report.num_rejects) == (NUM_IMAGES, 0), f"{name}: undamaged"
    touched: set[str] = set()
    for turn in range(random.randint(1, 3)):
        how, names = damage(inputs, random)
        touched |= names
        told = f"seed {seed}, damage {turn + 1}: {how}"
        print(told)
        before = live(url)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for place in (url, str(folder / f"fresh-{turn}")):
            try:
                report = ingest(build(kind, **settings), place, CONFIG)
            except PipelineError as error:
                print(f"refused: {str(error)[:300]}")
                continue
            except BaseException as error:
                pytest.fail(f"{told}: {type(error).__name__}: {error}")
            assert report.num_live + report.num_rejects == report.num_listed, told
            after = live(place)
            assert len(after) == report.num_live, told
            if place == url:
                gone = before.keys() - after.keys()
                rejected = {row["key"] for row in Manifest.open(url).rejects(["key"]).to_pylist()}
                assert len(gone - rejected) <= report.num_removed, f"{told}: {gone} left untold"
                assert len(gone - rejected) <= max(0.2 * len(before), 1), f"{told}: {gone}"
            if is_about_images(touched):
                whole = {key for key in before if own_file(key) not in touched}
                assert whole <= after.keys(), f"{told}: {whole - after.keys()} were whole"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        assert grown < MAX_GROWTH_KIB, f"{told}: memory grew by {grown} KiB"


def live(url: str) -> dict[str, str]:
    """Returns the digest of each live sample's image, by key."""
    rows = Manifest.open(url).samples(["key", "digest"]).to_pylist()
    return {row["key"]: row["digest"] for row in rows}


def is_about_images(touched: set[str]) -> bool:
    """Whether nothing but images was touched, each of them one record's own."""
    return all(name.endswith(".png") and name[:-4].isdecimal() for name in touched)


def own_file(key: str) -> str:
    """Returns the image that a key is that of: its number stands alone in it, or with zeros."""
    number = re.search(r"(?:^|-)0*(\d{1,2})(?:-|$)", key)
    return f"{number[1]}.png" if number else key
