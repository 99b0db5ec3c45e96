import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.errors import ConfigError, FeatureError
from pipeline.vision.extractor import INVARIANCE_TOLERANCE, measure_invariance
from pipeline.vision.extractors.patches import PatchesConfig
from pipeline.vision.extractors.registry import from_card
from pipeline.vision.preprocess.image import PaddedCentreCrop, ResizeBicubic, ResizeShortSideTo

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = SIZES | {"vocab_size": 50, "hidden_size": 12, "max_position_embeddings": 8}
del TEXT["image_size"], TEXT["patch_size"]

Make = Callable[[], Any]
NETWORKS: dict[str, Make] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**SIZES)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2)
    ),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT, vision_config=SIZES)
    ),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(text_config=TEXT, vision_config=SIZES)
    ),
}
PREPROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder of random weights for every kind of network."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(1)
    for name, make in NETWORKS.items():
        make().save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return {name: str(folder / name) for name in NETWORKS}


@pytest.fixture(scope="module")
def photos(photographs: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in photographs[:5]]


@pytest.mark.parametrize(
    ("network", "prefix"),
    [("vit", 1), ("deit", 2), ("dinov2", 1), ("registers", 3), ("clip", 1), ("siglip", 0)],
)
def test_tokens_are_those_of_the_model_without_what_stands_before_the_patches(
    folders: dict[str, str], photos: list[bytes], network: str, prefix: int
) -> None:
    extractor = PatchesConfig(network=folders[network], storage="float32").build()
    prepared = [extractor.prepare(photo) for photo in photos]
    model: Any = transformers.AutoModel.from_pretrained(folders[network]).eval()
    tower = getattr(model, "vision_model", model)
    pixels = torch.stack([torch.tensor(image.pixels) for image in prepared]).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(PREPROCESSOR[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std")
    )
    with torch.inference_mode():
        expected = tower(pixel_values=(pixels / 255 - mean) / std).last_hidden_state
    assert expected.shape[1] == prefix + 16
    for feature, tokens in zip(extractor.extract(prepared), expected, strict=True):
        np.testing.assert_allclose(feature.values, tokens[prefix:], atol=1e-5)
        assert feature.boxes is None
    found = measure_invariance(extractor, prepared).largest_difference
    assert found <= INVARIANCE_TOLERANCE
    card = extractor.card()
    assert (card.grid, card.dim, card.num_regions) == ((4, 4), 24, 16)
    assert from_card(ExtractorCard.parse(card.plain(), "card")).card() == card


@pytest.mark.parametrize("network", ["vit", "dinov2", "clip", "siglip"])
def test_layers_count_as_hidden_states_do(
    folders: dict[str, str], photos: list[bytes], network: str
) -> None:
    names = set()
    values = {}
    for layer in (0, 2, -2, -4, None):
        config = PatchesConfig(network=folders[network], layer=layer, storage="float32")
        extractor = config.build()
        names.add(extractor.name)
        (feature,) = extractor.extract([extractor.prepare(photos[0])])
        values[layer] = feature.values
    np.testing.assert_array_equal(values[2], values[-2])
    np.testing.assert_array_equal(values[0], values[-4])
    assert len(names) == 3
    assert np.abs(values[0] - values[2]).max() > 0.01
    assert np.abs(values[2] - values[None]).max() > 0.01


def test_the_class_token_comes_first_with_the_whole_picture_as_its_box(
    folders: dict[str, str], photos: list[bytes]
) -> None:
    without = PatchesConfig(network=folders["deit"]).build()
    extractor = PatchesConfig(network=folders["deit"], class_token=True).build()
    (feature,) = extractor.extract([extractor.prepare(photos[0])])
    (patches,) = without.extract([without.prepare(photos[0])])
    assert feature.values.shape == (17, 24)
    np.testing.assert_array_equal(feature.values[1:], patches.values)
    assert feature.boxes is not None
    np.testing.assert_array_equal(feature.boxes[0], [0, 0, 1, 1])
    np.testing.assert_allclose(feature.boxes[6], [0.25, 0.25, 0.5, 0.5])
    assert (extractor.card().grid, extractor.card().boxes) == (None, "stored")
    with pytest.raises(ConfigError, match="has no such token"):
        PatchesConfig(network=folders["siglip"], class_token=True).build()


@pytest.mark.parametrize("network", ["vit", "dinov2", "clip"])
def test_another_image_size_gives_another_grid(
    folders: dict[str, str], photos: list[bytes], network: str
) -> None:
    extractor = PatchesConfig(network=folders[network], image_size=48, fit="crop").build()
    (feature,) = extractor.extract([extractor.prepare(photos[0])])
    assert extractor.card().grid == (6, 6)
    assert feature.values.shape == (36, 24)
    assert feature.boxes is not None
    with pytest.raises(ConfigError, match="not a multiple"):
        PatchesConfig(network=folders[network], image_size=50).build()


def test_identity_is_of_weights_that_matter_and_not_of_their_folder(
    folders: dict[str, str], tmp_path: Path
) -> None:
    model = transformers.ViTModel.from_pretrained(folders["vit"])
    for name, pooling in (("with", True), ("without", False)):
        copy = transformers.ViTModel(model.config, add_pooling_layer=pooling)
        copy.load_state_dict(model.state_dict(), strict=False)
        copy.save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    copied = PatchesConfig(network=str(tmp_path / "with")).build()
    assert copied.name == PatchesConfig(network=folders["vit"]).build().name
    without = [PatchesConfig(network=str(tmp_path / "without")).build() for _ in range(2)]
    assert without[0].name == without[1].name


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"num_attention_heads": 2}, False),
        ({"hidden_act": "relu"}, False),
        ({"layer_norm_eps": 1e-3}, False),
        ({"hidden_dropout_prob": 0.3}, True),
        ({"initializer_range": 0.5, "architectures": ["ViTForImageClassification"]}, True),
    ],
    ids=str,
)
def test_identity_is_of_settings_that_weights_do_not_show(
    folders: dict[str, str], tmp_path: Path, change: dict[str, Any], same: bool
) -> None:
    shutil.copytree(folders["vit"], tmp_path / "changed")
    document = json.loads((tmp_path / "changed" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps(document | change))
    changed = PatchesConfig(network=str(tmp_path / "changed")).build()
    assert (changed.name == PatchesConfig(network=folders["vit"]).build().name) == same


def test_a_hub_that_cannot_be_reached_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FeatureError, match=r"model\.safetensors of 'some/vit' cannot be had"):
        PatchesConfig(network="some/vit").check()


def test_weights_that_lack_a_block_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    model = transformers.ViTModel.from_pretrained(folders["vit"])
    state = {name: value for name, value in model.state_dict().items() if "layers.1." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    with pytest.raises(FeatureError, match=r"lack \d+ of the network's tensors"):
        PatchesConfig(network=str(tmp_path)).build()


def test_random_weights_need_only_the_config(folders: dict[str, str], tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((Path(folders["clip"]) / name).read_bytes())
    config = PatchesConfig(network=str(tmp_path), weights="random")
    config.check()
    assert config.build().name == config.build().name
    with pytest.raises(FeatureError, match=r"has no model\.safetensors"):
        config.model_copy(update={"weights": "default"}).check()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"network": "/nowhere/at-all"}, FeatureError, "cannot be had"),
        ({"layer": 3}, ConfigError, "expected 0 to 2 or -4 to -2, or null"),
        ({"layer": -1}, ConfigError, "or null"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_beforehand(
    folders: dict[str, str], change: dict[str, Any], error: type[Exception], words: str
) -> None:
    config = PatchesConfig.model_validate({"network": folders["vit"]} | change)
    with pytest.raises(error, match=words):
        config.check()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: {key: file[key] for key in ("image_mean", "resample")}, "say image_std"),
        (lambda file: file | {"resample": 9}, "resample 9: expected 0"),
        (lambda file: file | {"size": {"height": 32, "width": 24}}, "expected shortest_edge"),
        (
            lambda file: file | {"size": {"shortest_edge": 32}, "do_center_crop": False},
            "set extractor.fit to",
        ),
        (lambda file: file | {"image_processor_type": "Nobodys"}, "cannot be had"),
    ],
)
def test_a_preprocessor_that_cannot_be_followed_is_refused(
    folders: dict[str, str],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    words: str,
) -> None:
    (tmp_path / "config.json").write_bytes((Path(folders["vit"]) / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change(PREPROCESSOR)))
    with pytest.raises(FeatureError, match=words):
        PatchesConfig(network=str(tmp_path), weights="random").check()


# As the authors' files have them; sizes are those of small networks.
PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
    },
    "clip of before": {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 32,
        "crop_size": 32,
        "do_center_crop": True,
        "resample": 3,
    },
    "vit": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 2,
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
    },
    "deit": {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 40, "width": 40},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 3,
    },
    "a crop beyond the picture": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 25},
        "crop_size": {"height": 32, "width": 32},
        "resample": 1,
    },
    "neither rescaled nor normalized": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "do_rescale": False,
        "do_normalize": False,
        "resample": 0,
    },
    "to minus one and one": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "rescale_factor": 1 / 127.5,
        "image_mean": 1.0,
        "image_std": 1.0,
        "resample": 4,
    },
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_pictures_of_all_sizes_are_seen_as_transformers_shows_them(
    folders: dict[str, str], tmp_path: Path, processor: str
) -> None:
    shutil.copytree(folders["vit"], tmp_path / "network")
    document = {key: PREPROCESSOR[key] for key in ("image_mean", "image_std")}
    (tmp_path / "network" / "preprocessor_config.json").write_text(
        json.dumps(document | PROCESSORS[processor])
    )
    extractor = PatchesConfig(network=str(tmp_path / "network")).load("cpu")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "network", backend="pil")
    raw = theirs.from_dict(theirs.to_dict() | {"do_rescale": False, "do_normalize": False})
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (33, 40), (31, 20), (64, 47), (200, 33), (35, 300)]
    sizes += [tuple(side) for side in rng.integers(16, 120, (60, 2)).tolist()]
    for width, height in sizes:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        prepared = extractor.prepare(png(pixels))
        expected = raw(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
        assert np.array_equal(prepared.pixels, expected.transpose(1, 2, 0)), (width, height)
        x1, y1, x2, y2 = prepared.view
        assert 0 <= (x1 + x2) / 2 <= 1
        assert 0 <= (y1 + y2) / 2 <= 1
    seen: list[torch.Tensor] = []
    extractor._tower.register_forward_pre_hook(
        lambda _module, _inputs, options: seen.append(options["pixel_values"]), with_kwargs=True
    )
    extractor.extract([prepared])
    wanted = theirs(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    # Division by 255 against multiplication with its inverse: a unit in the last place.
    np.testing.assert_allclose(seen[0], wanted, rtol=1e-6, atol=1e-6)


def test_the_sizes_of_the_file_are_scaled_with_the_image_size(
    folders: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(folders["dinov2"], tmp_path / "network")
    (tmp_path / "network" / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR | PROCESSORS["dinov2"])
    )
    extractor = PatchesConfig(network=str(tmp_path / "network"), image_size=64).load("cpu")
    assert extractor.steps == (ResizeShortSideTo(72, "BICUBIC"), PaddedCentreCrop(64))
    stretched = PatchesConfig(network=str(tmp_path / "network"), fit="stretch").load("cpu")
    assert stretched.steps == (ResizeBicubic(32),)
    cropped = PatchesConfig(network=str(tmp_path / "network"), fit="crop").load("cpu")
    assert cropped.steps == (ResizeShortSideTo(32, "BICUBIC"), PaddedCentreCrop(32))
    (feature,) = extractor.extract([extractor.prepare(png(np.zeros((90, 50, 3), np.uint8)))])
    assert feature.boxes is not None
    assert (feature.boxes >= 0).all()
    assert (feature.boxes <= 1).all()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
