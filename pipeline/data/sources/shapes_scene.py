"""A scene of coloured shapes as data: which things it holds, where they lie, which split it is for.

Nothing here draws or speaks. The distributions are chosen such that a question's words alone say
nothing of its answer: every shape, and separately every color, can be exchanged for the next one
in its list without changing the odds, and the counts that questions ask about are uniform.
"""

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "yellow", "green", "blue", "purple", "black")
SIZES = ("large", "small")

CELLS_PER_SIDE = 4  # things lie in distinct cells of a 4 x 4 grid, never across two
NUMBERS_OF_THINGS = (3, 4, 5)
COUNTS_OF_SHAPE = (0, 1, 2)
COUNTS_OF_COLOR = (0, 1, 2)
COUNTS_OF_SIZE = (0, 1, 2, 3)

SplitName = Literal["train", "validation"]


@dataclass(frozen=True)
class Thing:
    """One object. Cells count from the top left; the offset is in fractions of a cell."""

    shape: str
    color: str
    size: str
    column: int
    row: int
    offset: tuple[float, float]
    shade: float  # brightness relative to the color's own, about 1

    @property
    def kind(self) -> tuple[str, str]:
        return self.shape, self.color


@dataclass(frozen=True)
class Scene:
    """Things from left to right, then top to bottom.

    The number of things that have `counted_shape` is uniform over COUNTS_OF_SHAPE, and so on for
    the color and the size: a fair question about a count is about these.
    """

    things: tuple[Thing, ...]
    counted_shape: str
    counted_color: str
    counted_size: str
    background: tuple[int, int, int]  # RGB at the centre of the picture

    def things_with(self, value: str) -> list[Thing]:
        """Returns the things whose shape, color or size is `value`."""
        return [thing for thing in self.things if value in (thing.shape, thing.color, thing.size)]


def is_held_out(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two (shape, color) kinds meet in validation scenes only.

    They do when one's shape and color are both one place after the other's in SHAPES and COLORS
    (the first follows the last): a red circle never meets a yellow square while training. That is
    36 of the 630 pairs. Each kind, and so each shape and color, is in two of them.
    """
    shapes = SHAPES.index(second[0]) - SHAPES.index(first[0])
    colors = COLORS.index(second[1]) - COLORS.index(first[1])
    steps = (shapes % len(SHAPES), colors % len(COLORS))
    return steps in ((1, 1), (len(SHAPES) - 1, len(COLORS) - 1))


def sample_scene(seed: int, split: SplitName, index: int) -> Scene:
    """Returns the scene at a place in a split: a pure function of the arguments.

    A training scene holds no held-out pair of things; a validation scene holds at least one.
    Every scene has a thing of a shape of its own, and one of a color of its own, to ask about.
    """
    rng = random.Random(f"shapes/{seed}/{split}/{index}")
    number = rng.choice(NUMBERS_OF_THINGS)
    shape, color, size = rng.choice(SHAPES), rng.choice(COLORS), rng.choice(SIZES)
    num_shape, num_color = rng.choice(COUNTS_OF_SHAPE), rng.choice(COUNTS_OF_COLOR)
    num_size = rng.choice(COUNTS_OF_SIZE)
    while True:  # only what is not counted is drawn again, so the counts stay uniform
        shapes = _values(rng, SHAPES, shape, num_shape, number)
        colors = _values(rng, COLORS, color, num_color, number)
        kinds = list(zip(shapes, colors, strict=True))
        if not (_has_a_unique(shapes) and _has_a_unique(colors)):
            continue
        if any(is_held_out(*pair) for pair in combinations(kinds, 2)) == (split == "validation"):
            break
    sizes = _values(rng, SIZES, size, num_size, number)
    cells = sorted(rng.sample(range(CELLS_PER_SIDE**2), number))
    things = tuple(
        Thing(
            shape=kind[0],
            color=kind[1],
            size=size_,
            column=cell // CELLS_PER_SIDE,
            row=cell % CELLS_PER_SIDE,
            offset=(rng.uniform(-1, 1) * _SLACK[size_], rng.uniform(-1, 1) * _SLACK[size_]),
            shade=rng.uniform(0.92, 1.08),
        )
        for kind, size_, cell in zip(kinds, sizes, cells, strict=True)
    )
    tint = (rng.randint(226, 244), rng.randint(226, 244), rng.randint(226, 244))
    return Scene(things, shape, color, size, tint)


_SLACK = {"large": 0.04, "small": 0.14}  # in cells: how far a thing may lie from the cell's centre


def _values(
    rng: random.Random, values: tuple[str, ...], counted: str, times: int, number: int
) -> list[str]:
    """Returns `number` values in random order, of which exactly `times` are `counted`."""
    others = [value for value in values if value != counted]
    drawn = [counted] * times + [rng.choice(others) for _ in range(number - times)]
    rng.shuffle(drawn)
    return drawn


def _has_a_unique(values: list[str]) -> bool:
    return any(values.count(value) == 1 for value in values)
