import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.errors import ConfigError, FeatureError
from pipeline.vision.extractor import Extractor, measure_invariance
from pipeline.vision.extractors.detection.regions import RegionsConfig
from pipeline.vision.extractors.registry import from_card

SMALL = RegionsConfig(
    network="fasterrcnn_mobilenet_v3_large_320_fpn",
    weights="random",
    num_classes=5,
    short_side=64,
    long_side=96,
    num_proposals=30,
    min_regions=7,
    max_regions=7,
)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return SMALL.build()


@pytest.fixture(scope="module")
def photos(photographs: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in photographs[:5]]


def png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_regions_of_photographs_are_boxes_with_features_and_classes(
    extractor: Extractor, photos: list[bytes]
) -> None:
    card = extractor.card()
    assert (card.dim, card.num_regions, card.grid) == (1024, 7, None)
    for feature in extractor.extract([extractor.prepare(photo) for photo in photos]):
        assert feature.values.shape == (7, 1024)
        assert feature.values.dtype == np.float16
        assert np.abs(feature.values).max() > 0.01
        assert feature.boxes is not None
        assert (feature.boxes[:, :2] < feature.boxes[:, 2:]).all()
        assert 0 <= feature.boxes.min() <= feature.boxes.max() <= 1
        np.testing.assert_allclose(feature.parts["classes"].sum(axis=1), 1, atol=2e-3)
        foreground = feature.parts["classes"][:, 1:].astype(np.float32)
        np.testing.assert_allclose(feature.parts["scores"], foreground.max(1), rtol=1e-3)
        assert set(feature.parts["labels"].tolist()) <= {1, 2, 3, 4}
        for name, layout in card.parts.items():
            shape = tuple(7 if axis == "R" else axis for axis in layout.shape)
            assert (feature.parts[name].shape, feature.parts[name].dtype.name) == (
                shape,
                layout.dtype,
            )


def test_a_feature_is_bit_for_bit_the_same_beside_pictures_of_other_sizes(
    extractor: Extractor, photos: list[bytes]
) -> None:
    prepared = [extractor.prepare(image) for image in (*photos, png(64, 64), png(300, 20))]
    assert len({image.pixels.shape for image in prepared}) > 2
    assert measure_invariance(extractor, prepared).largest_difference == 0


def test_a_feature_does_not_depend_on_the_first_picture_a_network_sees(photos: list[bytes]) -> None:
    features = []
    for first in (png(40, 33), photos[0]):  # the pooler remembers scales of the first one
        extractor = SMALL.build()
        extractor.extract([extractor.prepare(first)])
        features += extractor.extract([extractor.prepare(photos[1])])
    np.testing.assert_array_equal(features[0].values, features[1].values)


@pytest.mark.parametrize(
    "network", ["fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"]
)
def test_boxes_features_and_probabilities_are_those_of_torchvision(
    network: str, tmp_path: Path
) -> None:
    """Against torchvision's own forward, set up as for its published weights."""
    torch.manual_seed(0)
    reference: Any = torchvision.models.get_model(
        network,
        weights=None,
        weights_backbone=None,
        num_classes=5,
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=20,
    ).eval()
    for norm in reference.modules():
        if isinstance(norm, nn.BatchNorm2d):  # tiny variances, which show a wrong epsilon
            nn.init.uniform_(norm.get_buffer("running_var"), 1e-5, 3e-5)
            nn.init.uniform_(norm.weight, 1e-3, 4e-3)
            norm.eps = 0.0 if network == "fasterrcnn_resnet50_fpn" else 1e-5
    state = {name: value for name, value in reference.state_dict().items() if "tracked" not in name}
    torch.save(state, tmp_path / "weights.pth")
    config = SMALL.model_copy(
        update={"network": network, "weights": str(tmp_path / "weights.pth"), "num_proposals": 20}
    )
    extractor = config.load("cpu")
    prepared = extractor.prepare(png(80, 64))  # a size that the resize leaves as it is
    seen: dict[str, Any] = {}

    def remember(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _module, _given, made: seen.update({name: made}))

    remember("proposals", reference.rpn)
    remember("values", reference.roi_heads.box_head)
    remember("predicted", reference.roi_heads.box_predictor)
    with torch.inference_mode():
        found = extractor.detector.detect(extractor.detector.load(prepared.pixels))
        reference([torch.tensor(prepared.pixels).permute(2, 0, 1) / 255])
    torch.testing.assert_close(found.boxes, seen["proposals"][0][0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.values, seen["values"], rtol=1e-4, atol=1e-5)
    assert float(seen["values"].abs().max()) > 1e-3
    logits, deltas = seen["predicted"]
    torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    refined = reference.roi_heads.box_coder.decode(deltas, seen["proposals"][0])
    inside = torch.minimum(refined.clamp_min(0), torch.tensor([80.0, 64.0, 80.0, 64.0]))
    torch.testing.assert_close(found.refinements, inside, rtol=1e-5, atol=1e-3)


def test_adaptive_regions_differ_in_number_and_fixed_ones_do_not(photos: list[bytes]) -> None:
    extractor = SMALL.build()
    prepared = [extractor.prepare(photo) for photo in photos]
    scores = np.concatenate([f.parts["scores"] for f in extractor.extract(prepared)])
    threshold = float(np.median(scores))
    adaptive = SMALL.model_copy(
        update={"min_regions": 2, "max_regions": 20, "score_threshold": threshold}
    ).build()
    features = adaptive.extract(prepared)
    counts = [len(feature.values) for feature in features]
    assert len(set(counts)) > 1
    assert all(2 <= count <= 20 for count in counts)
    for feature in features:
        assert (np.diff(feature.parts["scores"]) <= 1e-6).mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"short_side": 80},
        {"nms_threshold": 0.5},
        {"min_regions": 5},
        {"boxes": "refined"},
        {"num_proposals": 29},
        {"storage": "int8"},
    ],
    ids=str,
)
def test_identity_changes_with_whatever_changes_features(change: dict[str, Any]) -> None:
    changed = RegionsConfig.model_validate(SMALL.model_dump() | change)
    assert changed.build().name != SMALL.build().name


def test_a_threshold_that_decides_nothing_does_not_change_the_identity() -> None:
    fixed = [SMALL.model_copy(update={"score_threshold": share}) for share in (0.1, 0.4)]
    assert fixed[0].build().name == fixed[1].build().name
    adaptive = [config.model_copy(update={"max_regions": 9}) for config in fixed]
    assert adaptive[0].build().name != adaptive[1].build().name


def test_extractor_comes_back_from_its_card(extractor: Extractor) -> None:
    card = ExtractorCard.parse(extractor.card().plain(), "card")
    assert from_card(card).card() == card


def test_int8_values_are_near_the_exact_ones(photos: list[bytes]) -> None:
    extractor = SMALL.model_copy(update={"storage": "int8"}).build()
    prepared = [extractor.prepare(photos[0])]
    (stored,), (exact,) = extractor.extract(prepared), extractor.exact().extract(prepared)
    assert stored.quantized is not None
    assert exact.values.dtype == np.float32
    np.testing.assert_array_equal(stored.boxes, exact.boxes)
    error = np.linalg.norm(stored.values - exact.values) / np.linalg.norm(exact.values)
    assert 1e-4 < error < 0.02
    assert stored.size_bytes < exact.size_bytes / 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"network": "fasterrcnn_resnet50_fpn_v3"}, ConfigError, "did you mean 'fasterrcnn_res"),
        ({"network": "maskrcnn_resnet50_fpn"}, ConfigError, r"extractor\.network"),
        ({"weights": "absent.pth"}, FeatureError, "no such file"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_beforehand(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    config = RegionsConfig.model_validate(SMALL.model_dump() | change)
    with pytest.raises(error, match=words):
        config.check()


@pytest.mark.parametrize(
    "change", [{"min_regions": 9}, {"max_regions": 31}, {"short_side": 200}], ids=str
)
def test_impossible_bounds_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"over long_side|does not hold"):
        RegionsConfig.model_validate(SMALL.model_dump() | change)


def test_weights_of_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    other = SMALL.model_copy(update={"num_classes": 9}).load("cpu")
    path = tmp_path / "nine.pth"
    torch.save(other.detector.model.state_dict(), path)
    with pytest.raises(FeatureError, match=r"of another shape.*cls_score"):
        SMALL.model_copy(update={"weights": str(path)}).build()
