from collections import Counter
from itertools import combinations, product

from pipeline.data.sources.shapes_scene import (
    CELLS_PER_SIDE,
    COLORS,
    COUNTS_OF_COLOR,
    COUNTS_OF_SHAPE,
    COUNTS_OF_SIZE,
    SHAPES,
    Scene,
    SplitName,
    is_held_out,
    sample_scene,
)


def sample(split: SplitName, number: int = 3000) -> list[Scene]:
    return [sample_scene(0, split, index) for index in range(number)]


def has_held_out_pair(scene: Scene) -> bool:
    return any(is_held_out(a.kind, b.kind) for a, b in combinations(scene.things, 2))


def test_training_scenes_hold_no_held_out_pair() -> None:
    assert not any(has_held_out_pair(scene) for scene in sample("train"))


def test_every_validation_scene_holds_a_held_out_pair() -> None:
    assert all(has_held_out_pair(scene) for scene in sample("validation"))


def test_the_rule_is_symmetric_and_treats_all_kinds_alike() -> None:
    kinds = list(product(SHAPES, COLORS))
    partners = {kind: [other for other in kinds if is_held_out(kind, other)] for kind in kinds}
    assert {len(found) for found in partners.values()} == {2}
    assert all(kind in partners[other] for kind in kinds for other in partners[kind])


def test_training_scenes_show_every_kind_and_every_pair_that_is_not_held_out() -> None:
    pairs = set()
    for scene in sample("train", 6000):
        for first, second in combinations(scene.things, 2):
            pairs.add(frozenset((first.kind, second.kind)))
    kinds = list(product(SHAPES, COLORS))
    allowed = {frozenset(pair) for pair in combinations(kinds, 2) if not is_held_out(*pair)}
    assert allowed <= pairs


def test_things_lie_in_cells_of_their_own_from_left_to_right() -> None:
    for scene in sample("train", 300):
        places = [(thing.column, thing.row) for thing in scene.things]
        assert places == sorted(set(places))
        assert all(0 <= place < CELLS_PER_SIDE for cell in places for place in cell)


def test_some_thing_has_a_shape_and_some_thing_has_a_color_of_its_own() -> None:
    for split in ("train", "validation"):
        for scene in sample(split, 500):
            assert 1 in Counter(thing.shape for thing in scene.things).values()
            assert 1 in Counter(thing.color for thing in scene.things).values()


def test_the_counts_that_questions_ask_about_are_uniform_in_both_splits() -> None:
    for split in ("train", "validation"):
        scenes = sample(split)
        for counted, counts in (
            ("counted_shape", COUNTS_OF_SHAPE),
            ("counted_color", COUNTS_OF_COLOR),
            ("counted_size", COUNTS_OF_SIZE),
        ):
            found = Counter(len(scene.things_with(getattr(scene, counted))) for scene in scenes)
            assert set(found) == set(counts)
            for number in found.values():
                assert abs(number / len(scenes) - 1 / len(counts)) < 0.03


def test_shapes_and_colors_are_equally_frequent() -> None:
    for split in ("train", "validation"):
        things = [thing for scene in sample(split) for thing in scene.things]
        for attribute in ("shape", "color"):
            for number in Counter(getattr(thing, attribute) for thing in things).values():
                assert abs(number / len(things) - 1 / 6) < 0.015
