"""Masked region modelling: what is hidden of the image, and what is asked about it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pipeline.data.load.loader import Batch
from pipeline.errors import FeatureError, ModelError
from pipeline.models.inputs import Inputs
from pipeline.objectives.base import Vocabulary
from pipeline.objectives.mrm import Labels, MaskedRegionModelling, MrmConfig, RegionTarget
from pipeline.objectives.stream import ObjectiveModel, encode_texts, make_inputs
from tests.objectives.tiny import (
    collated,
    make_batch,
    make_family,
    make_objectives,
    make_tokenizer,
)

NOTHING: Any = None
EVERYTHING: dict[str, Any] = {"features": {}, "classes": {}, "attributes": {}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def many_regions(count: int = 400, step: int = 0) -> Batch:
    """Two images, the second with fewer regions; no two regions are alike."""
    batch = make_batch(2, step=step)
    assert batch.features is not None
    values = 1.0 + np.arange(2 * count * 3, dtype=np.float32).reshape(2, count, 3)
    num_regions = np.array([count, count - 7], np.int32)
    values[1, count - 7 :] = 0
    boxes = np.zeros((2, count, 4), np.float32)
    return replace(
        batch,
        features=replace(
            batch.features,
            values=values,
            boxes=boxes,
            num_regions=num_regions,
            classes=None,
            attributes=None,
        ),
    )


def hidden(batch: Batch, tokenizer: Any, **settings: Any) -> tuple[Inputs, Inputs, RegionTarget]:
    """Returns the inputs before and after, and the target."""
    objective = MaskedRegionModelling(MrmConfig.model_validate({"features": {}} | settings))
    vocabulary = Vocabulary.of(tokenizer)
    texts = ["a"] * len(batch.keys)
    encodings = encode_texts(texts, "captions", tokenizer, vocabulary, 9)
    drawn = objective.draw(batch)
    same, target = objective.prepare(batch, encodings, vocabulary, drawn)
    assert same is encodings  # the text stays as it is
    inputs = make_inputs(encodings, batch.features)
    before = replace(inputs, features=inputs.features.clone())
    after = objective.hide(batch, inputs, drawn)
    assert torch.equal(inputs.features, before.features)  # what is read again stays whole
    return before, after, target


def test_what_is_not_chosen_is_shown_and_what_is_asked_for_is_what_was_there(
    tokenizer: Any,
) -> None:
    before, after, target = hidden(many_regions(), tokenizer, zeroed=0.8, exchanged=0.1)
    assert torch.equal(after.features[~target.chosen], before.features[~target.chosen])
    assert target.features is not None
    assert torch.equal(target.features, before.features[target.chosen])
    assert not target.chosen[after.region_padding].any()
    assert after.masked_regions is not None
    assert (after.features[after.masked_regions] == 0).all()
    assert target.chosen[after.masked_regions].all()


def test_the_published_shares_are_zeroed_exchanged_and_kept(tokenizer: Any) -> None:
    counts = np.zeros(4)
    for step in range(40):
        before, after, target = hidden(
            many_regions(step=step), tokenizer, zeroed=0.8, exchanged=0.1
        )
        now, then = after.features[target.chosen], before.features[target.chosen]
        is_zero, is_kept = (now == 0).all(1), (now == then).all(1)
        is_other = ~is_zero & ~is_kept
        counts += [len(now), *(int(fate.sum()) for fate in (is_zero, is_kept, is_other))]
        own = [set(map(tuple, image.tolist())) for image in before.features]
        for image, row in zip(*torch.nonzero(target.chosen, as_tuple=True), strict=True):
            shown = tuple(after.features[image, row].tolist())
            assert shown in own[image] or set(shown) == {0}
    num_chosen, *fates = counts
    assert num_chosen / (40 * 793) == pytest.approx(0.15, abs=0.01)
    assert (np.array(fates) / num_chosen).tolist() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_at_least_one_region_is_chosen_and_none_of_an_image_without(tokenizer: Any) -> None:
    for step in range(20):
        batch = many_regions(count=8, step=step)  # the second image has one region
        _, _, target = hidden(batch, tokenizer)
        assert target.chosen.any(1).all()
    assert batch.features is not None
    none = replace(batch, features=replace(batch.features, num_regions=np.array([8, 0], np.int32)))
    _, _, target = hidden(none, tokenizer)
    assert target.chosen.any(1).tolist() == [True, False]


def test_the_choice_depends_on_seed_step_and_position_only(tokenizer: Any) -> None:
    def choice(**place: int) -> torch.Tensor:
        return hidden(make_batch(**place), tokenizer)[2].chosen

    assert torch.equal(choice(size=6)[3:5, :5], choice(size=2, first=3))
    assert not torch.equal(choice(size=6), choice(size=6, step=9))


def test_hidden_pixels_are_grey(tokenizer: Any) -> None:
    batch = many_regions(count=9)
    assert batch.features is not None
    pixels = replace(batch.features, values=np.full((2, 9, 3), 7, np.uint8))
    _, after, _ = hidden(replace(batch, features=pixels), tokenizer)
    assert after.masked_regions is not None
    assert (after.features[after.masked_regions] == 128).all()


def test_the_true_feature_of_a_hidden_region_reaches_no_state(tokenizer: Any) -> None:
    for family in ("uniter", "lxmert", "vilbert"):
        model, states = make_family(family, len(tokenizer)), []
        for change in (0.0, 100.0):
            batch = make_batch(3)
            assert batch.features is not None
            chosen = hidden(batch, tokenizer)[2].chosen.numpy()
            values = np.where(
                chosen[..., None], batch.features.values + change, batch.features.values
            )
            changed = replace(batch, features=replace(batch.features, values=values))
            with torch.no_grad():
                states.append(model.encode(hidden(changed, tokenizer)[1]).regions)
        assert torch.equal(*states), family


def test_the_losses_are_the_published_ones_averaged_over_the_chosen_regions() -> None:
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    probabilities = torch.tensor([[0.7, 0.3], [0.0, 1.0], [0.5, 0.5]])
    features = torch.randn(3, 4)
    likeliest = Labels(torch.tensor([0, 1, 0]), torch.tensor([0.7, 1.0, 0.5]))
    logits, predicted = torch.randn(3, 2), torch.randn(3, 4)
    model: Any = type(
        "Model",
        (),
        {"region_predictions": lambda *_: {"objects": logits, "features": predicted}},
    )()
    encoded: Any = type("Encoded", (), {"regions": torch.zeros(2, 3, 5)})

    def losses(**terms: Any) -> torch.Tensor:
        objective = MaskedRegionModelling(MrmConfig.model_validate(terms))
        is_label = terms.get("classes", {}).get("distance") == "label"
        classes = likeliest if is_label else probabilities
        true = RegionTarget(chosen, features, classes, None)
        return objective.loss(model, encoded, NOTHING, true)

    def by_sample(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values[:2].mean(), values[2]])

    mse = ((predicted - features) ** 2).mean(1)
    smooth = F.smooth_l1_loss(predicted, features, reduction="none").mean(1)
    log = logits.log_softmax(1)
    kl = (probabilities * (probabilities.clamp(min=1e-30).log() - log)).sum(1)
    label = -torch.stack([0.7 * log[0, 0], log[1, 1], 0.5 * log[2, 0]])
    torch.testing.assert_close(losses(features={}), by_sample(mse))
    torch.testing.assert_close(losses(features={"distance": "smooth-l1"}), by_sample(smooth))
    torch.testing.assert_close(losses(classes={}), by_sample(kl))
    torch.testing.assert_close(losses(classes={"distance": "label"}), by_sample(label))
    torch.testing.assert_close(
        losses(features={"weight": 2}, classes={"weight": 3}), by_sample(2 * mse + 3 * kl)
    )


def test_the_likeliest_class_is_the_detectors_label_where_it_gives_no_probabilities(
    tokenizer: Any,
) -> None:
    batch = make_batch(3)
    assert batch.features is not None
    assert batch.features.classes is not None
    classes = batch.features.classes
    given = replace(
        batch.features,
        classes=None,
        labels=classes[..., 1:].argmax(-1).astype(np.int32) + 1,  # never background
        scores=classes[..., 1:].max(-1),
    )
    losses, found = [], []
    for features in (batch.features, given):
        objectives = make_objectives(mrm={"classes": {"distance": "label"}})
        module = ObjectiveModel(make_family("uniter", len(tokenizer)), objectives)
        moved = collated(objectives, tokenizer, replace(batch, features=features))
        losses.append(module(moved)[0].detach())
        found.append(module.measure(moved)["mrm/similarity"])
    assert losses[0] > 0
    torch.testing.assert_close(losses[0], losses[1])
    assert found[0] == pytest.approx(found[1])
    with pytest.raises(FeatureError, match="they have labels, for distance: label"):
        hidden(replace(batch, features=given), tokenizer, classes={})


def test_background_is_never_what_a_region_is(tokenizer: Any) -> None:
    batch = make_batch(3)
    assert batch.features is not None
    assert batch.features.classes is not None
    classes = 0.1 * batch.features.classes
    classes[..., 0] = 0.9  # the likeliest everywhere
    features = replace(batch.features, classes=classes)
    target = hidden(replace(batch, features=features), tokenizer, classes={"distance": "label"})[2]
    named = torch.from_numpy(classes[..., 1:])[target.chosen].max(-1)
    assert isinstance(target.classes, Labels)
    assert torch.equal(target.classes.label, named.indices + 1)
    torch.testing.assert_close(target.classes.confidence, named.values.float())


def test_a_label_beyond_the_models_classes_is_refused(tokenizer: Any) -> None:
    batch = make_batch(2)
    assert batch.features is not None
    labels = np.full(batch.features.values.shape[:2], 11, np.int32)
    given = replace(batch.features, classes=None, labels=labels)
    objectives = make_objectives(mrm={"classes": {"distance": "label"}})
    module = ObjectiveModel(make_family("uniter", len(tokenizer)), objectives)
    with pytest.raises(ModelError, match="the model predicts 9, the features have 12"):
        module(collated(objectives, tokenizer, replace(batch, features=given)))


def test_an_image_without_regions_costs_nothing(tokenizer: Any) -> None:
    batch = make_batch(2)
    assert batch.features is not None
    none = replace(batch.features, num_regions=np.array([0, 2], np.int32))
    objectives = make_objectives(mrm={"features": {}})
    module = ObjectiveModel(make_family("uniter", len(tokenizer)), objectives)
    moved = collated(objectives, tokenizer, replace(batch, features=none))
    assert torch.isfinite(module(moved)[0])
    assert np.isfinite(module.measure(moved)["mrm/similarity"])


def test_features_without_classes_are_refused(tokenizer: Any) -> None:
    with pytest.raises(FeatureError, match=r"mrm\.classes: these features have no classes"):
        hidden(many_regions(), tokenizer, classes={})


@pytest.mark.parametrize(
    ("family", "terms", "message"),
    [
        ("vilbert", {"features": {}}, "mrm.features: this family does not predict it"),
        ("uniter", {"attributes": {}}, "it predicts objects, features"),
        ("visualbert", {"features": {}}, "no heads for regions"),
    ],
)
def test_a_family_that_does_not_predict_it_is_refused(
    tokenizer: Any, family: str, terms: dict[str, Any], message: str
) -> None:
    objectives = make_objectives(mrm=terms)
    module = ObjectiveModel(make_family(family, len(tokenizer)), objectives)
    with pytest.raises(ModelError, match=message):
        module(collated(objectives, tokenizer, make_batch()))


def test_a_head_for_other_classes_is_refused(tokenizer: Any) -> None:
    objectives = make_objectives(mrm={"classes": {}})
    module = ObjectiveModel(make_family("uniter", len(tokenizer), num_objects=5), objectives)
    with pytest.raises(ModelError, match="the model predicts 5, the features have 9"):
        module(collated(objectives, tokenizer, make_batch()))


def test_all_of_a_families_region_heads_are_trained(tokenizer: Any) -> None:
    objectives = make_objectives(mrm=EVERYTHING)
    model = make_family("lxmert", len(tokenizer))
    ObjectiveModel(model, objectives)(collated(objectives, tokenizer, make_batch()))[0].backward()
    heads = {
        name
        for name, weight in model.named_parameters()
        if "region_head" in name and weight.grad is None
    }
    assert not heads
