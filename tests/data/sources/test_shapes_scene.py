from collections import Counter
from itertools import product

from pipeline.data.sources.shapes_scene import (
    CELLS_PER_SIDE,
    COLORS,
    COUNTS,
    NUMBERS_OF_THINGS,
    SHAPES,
    Scene,
    SplitName,
    Thing,
    is_held_out,
    sample_scene,
)

CELLS = range(CELLS_PER_SIDE**2)


def sample(split: SplitName, number: int = 3000) -> list[Scene]:
    return [sample_scene(0, split, index) for index in range(number)]


def cell(thing: Thing) -> int:
    return CELLS_PER_SIDE * thing.column + thing.row


def holds_held_out(scene: Scene) -> bool:
    return any(is_held_out(thing.shape, thing.color, cell(thing)) for thing in scene.things)


def test_training_scenes_hold_no_held_out_placing() -> None:
    assert not any(holds_held_out(scene) for scene in sample("train"))


def test_every_validation_scene_holds_a_held_out_placing() -> None:
    assert all(holds_held_out(scene) for scene in sample("validation"))


def test_in_every_cell_each_shape_lacks_one_color_and_each_color_one_shape() -> None:
    for place in CELLS:
        lacking = [kind for kind in product(SHAPES, COLORS) if is_held_out(*kind, place)]
        assert sorted(shape for shape, _ in lacking) == sorted(SHAPES)
        assert sorted(color for _, color in lacking) == sorted(COLORS)


def test_training_scenes_show_every_placing_that_is_not_held_out() -> None:
    things = [thing for scene in sample("train", 6000) for thing in scene.things]
    placings = {(thing.shape, thing.color, cell(thing)) for thing in things}
    assert placings == {
        placing for placing in product(SHAPES, COLORS, CELLS) if not is_held_out(*placing)
    }


def test_things_lie_in_cells_of_their_own_from_left_to_right() -> None:
    for scene in sample("train", 300):
        places = [(thing.column, thing.row) for thing in scene.things]
        assert places == sorted(set(places))
        assert all(0 <= place < CELLS_PER_SIDE for pair in places for place in pair)


def test_scenes_of_one_two_and_three_things_are_equally_frequent() -> None:
    for split in ("train", "validation"):
        found = Counter(len(scene.things) for scene in sample(split))
        assert set(found) == set(NUMBERS_OF_THINGS)
        assert max(found.values()) - min(found.values()) < 150


def test_the_counts_that_questions_ask_about_are_uniform_in_both_splits() -> None:
    for split in ("train", "validation"):
        scenes = [scene for scene in sample(split) if len(scene.things) > 1]
        for counted in ("counted_shape", "counted_color", "counted_size"):
            found = Counter(len(scene.things_with(getattr(scene, counted))) for scene in scenes)
            assert set(found) == set(COUNTS)
            for number in found.values():
                assert abs(number / len(scenes) - 1 / len(COUNTS)) < 0.04


def test_shapes_and_colors_are_equally_frequent() -> None:
    for split in ("train", "validation"):
        things = [thing for scene in sample(split, 9000) for thing in scene.things]
        for attribute in ("shape", "color"):
            for number in Counter(getattr(thing, attribute) for thing in things).values():
                assert abs(number / len(things) - 1 / 6) < 0.015
