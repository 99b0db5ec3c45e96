"""The texts about a scene of shapes: its captions, its questions, its dialog.

Whether a question is asked depends on the scene, so the odds of its answers are kept even by
construction: yes or no is decided before a fitting question is looked for, or follows from an order
that a coin decides; counts are asked of what the scene counts (`Scene.counted_shape`, …); a shape
is asked of a thing named by its color or place, a color of a thing named by its shape or place.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.sample import Dialog, Question, Round, Texts
from pipeline.data.sources.shapes_scene import CELLS_PER_SIDE, COLORS, SHAPES, Scene, Thing

NUM_ANSWERS = 10  # VQA stores ten people's answers; here all ten agree

NUMERALS = ("zero", "one", "two", "three")

PLACES = (  # the grid's cells, column by column
    *("top left", "middle left", "bottom left"),
    *("top middle", "center", "bottom middle"),
    *("top right", "middle right", "bottom right"),
)


@dataclass(frozen=True)
class Direction:
    """A side of a thing, as one says it of a position and as one asks for what lies there."""

    words: str
    superlative: str
    step: tuple[int, int]  # columns to the right, rows down

    def distance(self, origin: Thing, other: Thing) -> int:
        """Returns how many cells `other` lies on this side of `origin`; negative: on the other."""
        columns, rows = other.column - origin.column, other.row - origin.row
        return columns * self.step[0] + rows * self.step[1]


DIRECTIONS = (
    Direction("left of", "leftmost", (-1, 0)),
    Direction("right of", "rightmost", (1, 0)),
    Direction("above", "highest", (0, -1)),
    Direction("below", "lowest", (0, 1)),
)


def texts_of(scene: Scene, image_id: str, rng: random.Random) -> Texts:
    """Returns all that is said about a scene; `rng` decides what, and in which words."""
    questions = [
        Question(
            question_id=f"{image_id}-{number}",
            question=asked.question,
            answers=(asked.answer,) * NUM_ANSWERS,
            question_type=asked.question_type,
            answer_type=_answer_type(asked.answer),
        )
        for number, asked in enumerate(_questions(scene, rng))
    ]
    return Texts(
        image_id=image_id,
        captions=_captions(scene, rng),
        questions=tuple(questions),
        dialogs=(_dialog(scene, rng),),
    )


# Captions


def _captions(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    return (
        _sentence(_listed(scene.things)),
        _caption_of_one(scene, rng),
        _caption_of_places(scene, rng),
        _caption_of_a_pair(scene, rng),
        _caption_of_a_count(scene, rng),
    )


def _caption_of_one(scene: Scene, rng: random.Random) -> str:
    thing = rng.choice(scene.things)
    return _sentence(f"a {thing.size} {thing.color} {thing.shape} at the {_place(thing)}")


def _caption_of_places(scene: Scene, rng: random.Random) -> str:
    things = rng.sample(scene.things, min(len(scene.things), 2))
    return _sentence(" and ".join(f"at the {_place(thing)} is {_a(thing)}" for thing in things))


def _caption_of_a_pair(scene: Scene, rng: random.Random) -> str:
    if len(scene.things) == 1:
        return _sentence(f"{_a(scene.things[0])} is alone")
    first, second = rng.sample(scene.things, 2)
    sides = [side for side in DIRECTIONS if side.distance(second, first) > 0]
    return _sentence(f"{_a(first)} is {rng.choice(sides).words} {_a(second)}")


def _caption_of_a_count(scene: Scene, rng: random.Random) -> str:
    total = NUMERALS[len(scene.things)]
    if total == "one":
        return _sentence(f"one object, and it is {scene.things[0].color}")
    value, number = rng.choice(Counter(thing.color for thing in scene.things).most_common())
    verb = "is" if number == 1 else "are"
    return _sentence(f"{total} objects, and {NUMERALS[number]} of them {verb} {value}")


# Questions


@dataclass(frozen=True)
class _Asked:
    question: str
    answer: str
    question_type: str


def _questions(scene: Scene, rng: random.Random) -> list[_Asked]:
    """Returns at most one question of each sort; some scenes leave no fair one of a sort."""
    asked = [
        _ask_color(scene, rng),
        _ask_shape(scene, rng),
        _ask_size(scene, rng),
        _ask_color_at_place(scene, rng),
        _ask_shape_at_place(scene, rng),
        *_ask_counts(scene),
        _ask_total(scene),
        _ask_whether_place_is_taken(scene, rng),
        _ask_whether_value_exists(scene, rng),
        _ask_whether_kind_exists(scene, rng),
        _ask_whether_more(scene, rng),
        _ask_whether_larger(scene, rng),
        _ask_whether_same_color(scene, rng),
        _ask_whether_on_side(scene, rng),
        _ask_what_is_on_side(scene, rng),
        _ask_outermost(scene, rng),
    ]
    return [question for question in asked if question is not None]


def _ask_color(scene: Scene, rng: random.Random) -> _Asked | None:
    things = _unique(scene.things, "shape")
    if not things:
        return None
    thing = rng.choice(things)
    return _Asked(f"What color is the {thing.shape}?", thing.color, "attribute")


def _ask_shape(scene: Scene, rng: random.Random) -> _Asked | None:
    things = _unique(scene.things, "color")
    if not things:
        return None
    thing = rng.choice(things)
    return _Asked(f"What shape is the {thing.color} object?", thing.shape, "attribute")


def _ask_size(scene: Scene, rng: random.Random) -> _Asked | None:
    things = _unique(scene.things, "shape")
    if not things:
        return None
    thing = rng.choice(things)
    return _Asked(f"Is the {thing.shape} large or small?", thing.size, "attribute")


def _ask_color_at_place(scene: Scene, rng: random.Random) -> _Asked:
    thing = rng.choice(scene.things)
    return _Asked(f"What color is the object at the {_place(thing)}?", thing.color, "attribute")


def _ask_shape_at_place(scene: Scene, rng: random.Random) -> _Asked:
    thing = rng.choice(scene.things)
    return _Asked(f"What shape is the object at the {_place(thing)}?", thing.shape, "attribute")


def _ask_counts(scene: Scene) -> list[_Asked]:
    if len(scene.things) == 1:
        return []
    shape, color, size = scene.counted_shape, scene.counted_color, scene.counted_size
    words = (
        (f"How many {_plural(shape)} are there?", shape),
        (f"How many {color} objects are there?", color),
        (f"How many {size} objects are there?", size),
    )
    return [_Asked(ask, str(len(scene.things_with(value))), "count") for ask, value in words]


def _ask_total(scene: Scene) -> _Asked:
    return _Asked("How many objects are there?", str(len(scene.things)), "count")


def _ask_whether_place_is_taken(scene: Scene, rng: random.Random) -> _Asked:
    answer = _coin(rng)
    taken = {_place(thing) for thing in scene.things}
    place = rng.choice([place for place in PLACES if (place in taken) == (answer == "yes")])
    return _Asked(f"Is there an object at the {place}?", answer, "existence")


def _ask_whether_value_exists(scene: Scene, rng: random.Random) -> _Asked:
    attribute, values = rng.choice((("shape", SHAPES), ("color", COLORS)))
    answer = _coin(rng)
    present = {getattr(thing, attribute) for thing in scene.things}
    value = rng.choice([value for value in values if (value in present) == (answer == "yes")])
    words = f"Is there a {value}?" if attribute == "shape" else f"Is there a {value} object?"
    return _Asked(words, answer, "existence")


def _ask_whether_kind_exists(scene: Scene, rng: random.Random) -> _Asked:
    answer = _coin(rng)
    kinds = {thing.kind for thing in scene.things}
    if answer == "yes":
        shape, color = rng.choice(sorted(kinds))
    else:  # of a shape and a color that the scene has, where it can be: the harder question
        absent = [(shape, color) for shape in SHAPES for color in COLORS]
        absent = [kind for kind in absent if kind not in kinds]
        shapes, colors = zip(*kinds, strict=True)
        near = [kind for kind in absent if kind[0] in shapes and kind[1] in colors]
        shape, color = rng.choice(near or absent)
    return _Asked(f"Is there a {color} {shape}?", answer, "existence")


def _ask_whether_more(scene: Scene, rng: random.Random) -> _Asked:
    counts = Counter(thing.shape for thing in scene.things)
    pairs = [(more, less) for more in SHAPES for less in SHAPES if counts[more] > counts[less]]
    more, less = rng.choice(pairs)
    answer = _coin(rng)
    first, second = (more, less) if answer == "yes" else (less, more)
    return _Asked(f"Are there more {_plural(first)} than {_plural(second)}?", answer, "comparison")


def _ask_whether_larger(scene: Scene, rng: random.Random) -> _Asked | None:
    things = _unique(scene.things, "shape")
    pairs = [(a, b) for a in things for b in things if a.size == "large" and b.size == "small"]
    if not pairs:
        return None
    large, small = rng.choice(pairs)
    answer, adjective = _coin(rng), rng.choice(("larger", "smaller"))
    in_order = (answer == "yes") == (adjective == "larger")
    first, second = (large, small) if in_order else (small, large)
    return _Asked(
        f"Is the {first.shape} {adjective} than the {second.shape}?", answer, "comparison"
    )


def _ask_whether_same_color(scene: Scene, rng: random.Random) -> _Asked | None:
    """Asks of the two things of the counted color, or of the one there is and another thing.

    Both are equally frequent, whichever shapes the things have.
    """
    if len(scene.things) == 1:
        return None
    counted = scene.things_with(scene.counted_color)
    others = [thing for thing in scene.things if thing not in counted]
    if len(counted) == 2:
        pair, answer = counted, "yes"
    elif len(counted) == 1:
        pair, answer = [counted[0], rng.choice(others)], "no"
    else:
        return None
    if not all(thing in _unique(scene.things, "shape") for thing in pair):
        return None
    first, second = rng.sample(pair, 2)
    words = f"Is the {first.shape} the same color as the {second.shape}?"
    return _Asked(words, answer, "comparison")


def _ask_whether_on_side(scene: Scene, rng: random.Random) -> _Asked | None:
    attribute = rng.choice(("shape", "color"))
    things = _unique(scene.things, attribute)
    side = rng.choice(DIRECTIONS)
    pairs = [(a, b) for a in things for b in things if side.distance(b, a) > 0]
    if not pairs:
        return None
    pair, answer = rng.choice(pairs), _coin(rng)
    first, second = pair if answer == "yes" else reversed(pair)
    words = f"Is {_named(first, attribute)} {side.words} {_named(second, attribute)}?"
    return _Asked(words, answer, "spatial")


def _ask_what_is_on_side(scene: Scene, rng: random.Random) -> _Asked | None:
    known, asked = rng.choice((("shape", "color"), ("color", "shape")))
    choices = []
    for origin in _unique(scene.things, known):
        for side in DIRECTIONS:
            found = _things_on(scene, origin, side)
            if len(found) == 1:
                choices.append((origin, side, found[0]))
    if not choices:
        return None
    origin, side, found_thing = rng.choice(choices)
    words = f"What {asked} is the object {side.words} {_named(origin, known)}?"
    return _Asked(words, getattr(found_thing, asked), "spatial")


def _ask_outermost(scene: Scene, rng: random.Random) -> _Asked | None:
    if len(scene.things) == 1:
        return None
    side = rng.choice(DIRECTIONS)
    origin = scene.things[0]
    ranked = sorted(scene.things, key=lambda thing: side.distance(origin, thing))
    if side.distance(ranked[-2], ranked[-1]) == 0:
        return None
    asked = rng.choice(("shape", "color"))
    words = f"What {asked} is the {side.superlative} object?"
    return _Asked(words, getattr(ranked[-1], asked), "spatial")


# The dialog


def _dialog(scene: Scene, rng: random.Random) -> Dialog:
    """Returns a dialog about one thing and what lies beside it, which it calls `it`, `that one`."""
    subject = rng.choice(scene.things)
    here, taken = _place(subject), {_place(thing) for thing in scene.things}
    rounds = [Round("How many objects are there?", NUMERALS[len(scene.things)])]
    if _coin(rng) == "yes":
        rounds.append(Round(f"Is there an object at the {here}?", "yes"))
        rounds.append(Round("What shape is it?", subject.shape))
    else:
        empty = rng.choice([place for place in PLACES if place not in taken])
        rounds.append(Round(f"Is there an object at the {empty}?", "no"))
        rounds.append(Round(f"What shape is the object at the {here}?", subject.shape))
    rounds.append(Round("What color is it?", subject.color))
    rounds.append(Round("Is it large or small?", subject.size))
    found = {side: _things_on(scene, subject, side) for side in DIRECTIONS}
    singles = [side for side in DIRECTIONS if len(found[side]) == 1]
    sides = rng.sample(DIRECTIONS, 2)
    if singles:
        sides = [rng.choice(singles)]
        sides.insert(0, rng.choice([side for side in DIRECTIONS if side not in sides]))
    for side in sides:
        rounds.append(Round(f"What is {side.words} it?", _listed(found[side])))
    if singles:
        rounds.append(Round("Is that one large or small?", found[sides[-1]][0].size))
    return Dialog(caption=_caption_of_a_pair(scene, rng), rounds=tuple(rounds))


def _things_on(scene: Scene, origin: Thing, side: Direction) -> list[Thing]:
    return [thing for thing in scene.things if side.distance(origin, thing) > 0]


# Words


def _place(thing: Thing) -> str:
    return PLACES[CELLS_PER_SIDE * thing.column + thing.row]


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _a(thing: Thing) -> str:
    return f"a {thing.color} {thing.shape}"


def _named(thing: Thing, attribute: str) -> str:
    return f"the {thing.shape}" if attribute == "shape" else f"the {thing.color} object"


def _unique(things: Sequence[Thing], attribute: str) -> list[Thing]:
    """Returns the things that share their shape, or their color, with no other."""
    counts = Counter(getattr(thing, attribute) for thing in things)
    return [thing for thing in things if counts[getattr(thing, attribute)] == 1]


def _coin(rng: random.Random) -> str:
    return rng.choice(("yes", "no"))


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _listed(things: Sequence[Thing]) -> str:
    """Returns the things by color and shape in their order, those alike together."""
    counts = Counter(thing.kind for thing in things)
    phrases = [
        f"a {color} {shape}" if number == 1 else f"{NUMERALS[number]} {color} {_plural(shape)}"
        for (shape, color), number in counts.items()
    ]
    *most, last = phrases or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"
