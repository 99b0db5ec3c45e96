"""A scene of coloured shapes: which things it holds, where they lie, which split it is for.

Nothing here draws or speaks. The distributions are chosen such that a question's words alone say
nothing of its answer: every shape, and separately every color, can be exchanged for the next one
in its list without changing the odds, and the counts that questions ask about are uniform.
"""

import random
from dataclasses import dataclass
from typing import Literal

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "yellow", "green", "blue", "purple", "white")
SIZES = ("large", "small")

CELLS_PER_SIDE = 3  # things lie in distinct cells of a 3 x 3 grid, never across two
NUMBERS_OF_THINGS = (1, 2, 3)
COUNTS = (0, 1, 2)  # that questions ask about; of scenes that hold so many things

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

    Where there is more than one thing, the number of those that have `counted_shape` is uniform
    over COUNTS, and so on for the color and the size: a fair question about a count is about these.
    """

    things: tuple[Thing, ...]
    counted_shape: str
    counted_color: str
    counted_size: str
    background: tuple[int, int, int]  # RGB, darker than any thing in each of the three

    def things_with(self, value: str) -> list[Thing]:
        """Returns the things whose shape, color or size is `value`."""
        return [thing for thing in self.things if value in (thing.shape, thing.color, thing.size)]


def is_held_out(shape: str, color: str, cell: int) -> bool:
    """Whether things of this kind lie in this cell in validation scenes only.

    They do when the color is as many places after the shape, in COLORS and SHAPES, as the cell's
    number says (the first follows the last). Each cell lacks each shape in one color, and each
    color in one shape, so that neither a cell nor a shape tells a color.
    """
    places = COLORS.index(color) - SHAPES.index(shape)
    return places % len(COLORS) == cell % len(COLORS)


def sample_scene(seed: int, split: SplitName, index: int) -> Scene:
    """Returns the scene at a place in a split: a pure function of the arguments.

    A training scene holds no kind of thing in a cell that is held out; a validation scene does.
    """
    rng = random.Random(f"shapes/{seed}/{split}/{index}")
    number = rng.choice(NUMBERS_OF_THINGS)
    shape, color, size = rng.choice(SHAPES), rng.choice(COLORS), rng.choice(SIZES)
    shapes = _values(rng, SHAPES, shape, number)
    colors = _values(rng, COLORS, color, number)
    sizes = _values(rng, SIZES, size, number)
    while True:  # only the cells are drawn again, so the counts stay uniform
        cells = rng.sample(range(CELLS_PER_SIDE**2), number)
        held_out = [is_held_out(*placing) for placing in zip(shapes, colors, cells, strict=True)]
        if any(held_out) == (split == "validation"):
            break
    things = tuple(
        Thing(
            shape=shape_,
            color=color_,
            size=size_,
            column=cell // CELLS_PER_SIDE,
            row=cell % CELLS_PER_SIDE,
            offset=(rng.uniform(-1, 1) * _SLACK[size_], rng.uniform(-1, 1) * _SLACK[size_]),
            shade=rng.uniform(0.92, 1.08),
        )
        for cell, shape_, color_, size_ in sorted(zip(cells, shapes, colors, sizes, strict=True))
    )
    dark = (rng.randint(16, 32), rng.randint(16, 32), rng.randint(16, 32))
    return Scene(things, shape, color, size, dark)


_SLACK = {"large": 0.04, "small": 0.14}  # in cells: how far a thing may lie from the cell's centre


def _values(rng: random.Random, values: tuple[str, ...], counted: str, number: int) -> list[str]:
    """Returns values in random order; how many of several are `counted` is drawn from COUNTS."""
    others = [value for value in values if value != counted]
    times = rng.choice(COUNTS) if number > 1 else 1
    drawn = [counted] * times + [rng.choice(others) for _ in range(number - times)]
    rng.shuffle(drawn)
    return drawn
