"""The one objective that a step trains, where each step trains one."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_SALT = zlib.crc32(b"turns")


@dataclass(frozen=True)
class Turns:
    """The steps that train objective `name`: a random share of all, as UNITER mixes its tasks.

    Which is a function of (seed, step) alone, so that all ranks train the same one and a resumed
    run goes on with the same (UNITER, arXiv:1909.11740, 3.2: one task per mini-batch).
    """

    name: str
    shares: Mapping[str, float]  # of all objectives, in any unit

    def has(self, seed: int, step: int) -> bool:
        """Whether this step trains it; exactly one of the objectives says so."""
        names = sorted(self.shares)  # not in the order of the recipe
        ends = np.cumsum([self.shares[name] for name in names])
        rng = np.random.default_rng(np.random.SeedSequence((seed, step), spawn_key=(_SALT,)))
        return names[int(np.searchsorted(ends, rng.random() * ends[-1], "right"))] == self.name
