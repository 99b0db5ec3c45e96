"""Patch features: the tokens that a frozen vision transformer has at a layer."""

import copy
import inspect
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline import storage
from pipeline.data.read.extractor_card import (
    ExtractionEnvironment,
    ExtractorCard,
    Weights,
    identity,
)
from pipeline.errors import ConfigError, FeatureError
from pipeline.vision.compress.storage_dtype import describe_storage, storage_parts, to_storage
from pipeline.vision.extractors import weights
from pipeline.vision.extractors.arithmetic import exact_arithmetic
from pipeline.vision.extractors.network import NetworkConfig
from pipeline.vision.feature import Feature
from pipeline.vision.preprocess.image import (
    PaddedCentreCrop,
    Prepared,
    Resize,
    ResizeBicubic,
    ResizeShortSideTo,
    ResizeTo,
    Step,
    cell_boxes,
    describe,
    prepare,
)

# Layers that make one vector of all tokens. Published weights often lack them; no feature is
# computed by them.
_POOLING = ("pooler.", "head.")


# Settings of a network by which no feature is computed: where it came from, how it was trained.
_NOT_ARCHITECTURE = (
    *("_", "architectures", "attn_implementation", "drop_path", "dropout", "dtype", "id2label"),
    *("initializer", "label2id", "problem_type", "torch_dtype", "transformers_version"),
    *("attention_probs_dropout", "hidden_dropout", "layerscale_value", "logit_scale_init"),
)


class PatchesConfig(NetworkConfig):
    """A ViT, DeiT, CLIP, SigLIP or DINOv2 in transformers' layout; of two towers, the images'."""

    type: Literal["patches"] = Field(
        default="patches",
        description="a ViT, DeiT, CLIP, SigLIP or DINOv2 in transformers' layout; of two "
        "towers, that of images",
    )
    network: str = Field(description="a folder, or a name on the Hugging Face hub")
    weights: Literal["default", "random"] = Field(
        default="default",
        description="default: the network's own; random: only its config is taken",
    )
    layer: int | None = Field(
        default=None,
        description="as transformers' `hidden_states` count: 0 is the embedded patches, -2 what "
        "the last block but one gives; null: the model's own output, with its last norm if it "
        "has one",
    )
    class_token: bool = Field(
        default=False, description="whether it is put first, with the whole picture as its box"
    )
    image_size: int | None = Field(
        default=None,
        ge=16,
        le=4096,
        description="pixels a side that the network takes; null: what the processor's file "
        "says, or the network's own; the file's sizes are scaled by as much",
    )
    fit: Literal["processor", "stretch", "crop"] = Field(
        default="processor",
        description="processor: as preprocessor_config.json says, the whole picture if it "
        "states no size; stretch: the whole picture; crop: the short side to image_size, then "
        "its middle",
    )

    def check(self) -> None:
        import torch

        super().check()
        processor = _processor(self.network)
        with torch.device("meta"):
            tower = _vision_tower(_random_model(self))
        _layer(self, tower)
        _steps(self, processor, int(tower.config.image_size))
        if self.weights == "default" and Path(self.network).is_dir():
            found = [path.name for path in Path(self.network).iterdir()]
            if not any(name.endswith((".safetensors", ".bin")) for name in found):
                raise FeatureError(
                    f"extractor.network: {self.network} has no model.safetensors, only "
                    f"{', '.join(sorted(found))}"
                )

    def load(self, device: str) -> "PatchesExtractor":
        return PatchesExtractor(self, device)


class PatchesExtractor:
    """Computes (R, D) tokens, patches row by row; other tokens than the class token are left out.

    Boxes follow from the grid if the whole picture is seen and there is no class token.
    """

    def __init__(self, config: PatchesConfig, device: str) -> None:
        import torch

        self._config = config
        self._device = device
        self._processor = _processor(config.network)
        absent: set[str] = set()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights.RANDOM_SEED)
            if config.weights == "random":
                model = _random_model(config)
            else:
                model, absent = _trained_model(config)
        tower = _vision_tower(model)
        self._digest = weights.digest(tower, absent)
        self._layer = _layer(config, tower)
        self.steps, self._image_size = _steps(config, self._processor, int(tower.config.image_size))
        patch_size = int(tower.config.patch_size)
        if self._image_size % patch_size:
            raise ConfigError(
                f"extractor.image_size={self._image_size} is not a multiple of the network's "
                f"patches of {patch_size} pixels"
            )
        self._per_side = self._image_size // patch_size
        self._options = {"output_hidden_states": True} if self._layer is not None else {}
        if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            own_size = self._image_size == int(tower.config.image_size)
            self._options["interpolate_pos_encoding"] = not own_size
        self._tower = tower.to(device).eval()
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in (self._processor.mean, self._processor.std)
        )
        self._dim = int(tower.config.hidden_size)
        self._num_prefix = self._count_prefix()

    @property
    def name(self) -> str:
        return self.card().name

    def card(self) -> ExtractorCard:
        config = self._config
        normalize = {
            "step": "normalize",
            "mean": self._processor.mean,
            "std": self._processor.std,
            "divided_by": self._processor.divisor,
        }
        preprocessing = (*describe(self.steps, config.window), normalize)
        selection = {
            "model": _architecture(self._tower.config),
            "layer": self._layer,
            "class_token": config.class_token,
        }
        stored = describe_storage(config.storage)
        settings = config.model_dump(mode="json")
        if Path(config.network).is_dir():
            settings["network"] = storage.absolute(config.network)
        return ExtractorCard(
            type="patches",
            identity=identity("patches", self._digest, preprocessing, selection, stored),
            config=settings,
            weights=Weights(digest=self._digest, random=config.weights == "random"),
            preprocessing=preprocessing,
            selection=selection,
            storage=stored,
            dtype=stored["dtype"],
            dim=self._dim,
            num_regions=self._per_side**2 + config.class_token,
            grid=None if config.class_token else (self._per_side, self._per_side),
            boxes="grid" if self._boxes_implied() else "stored",
            parts=storage_parts(config.storage, self._dim),
            environments=(ExtractionEnvironment.here(self._device, "transformers"),),
        )

    def prepare(self, image: bytes) -> Prepared:
        return prepare(image, self.steps, self._config.window)

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        import torch

        pixels = torch.from_numpy(np.stack([image.pixels for image in prepared]))
        images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
        images.div_(self._processor.divisor)
        with exact_arithmetic():
            tokens = self._tokens(images.sub_(self._mean).div_(self._std))
            patches = tokens[:, self._num_prefix :]
            if self._config.class_token:
                patches = torch.cat([tokens[:, :1], patches], dim=1)
            try:
                features = to_storage(patches.contiguous(), self._config.storage)
            except FeatureError as error:
                raise FeatureError(f"{self.name}: {error}") from error
        if self._boxes_implied():
            return features
        return [
            replace(feature, boxes=self._boxes(image))
            for feature, image in zip(features, prepared, strict=True)
        ]

    def exact(self) -> Self:
        twin = copy.copy(self)
        twin._config = self._config.model_copy(update={"storage": "float32"})
        return twin

    def _tokens(self, images: Any) -> Any:
        """Maps normalized images (B, 3, S, S) to all tokens (B, T, D) of the layer."""
        output = self._tower(pixel_values=images, **self._options)
        return (
            output.last_hidden_state if self._layer is None else output.hidden_states[self._layer]
        )

    def _count_prefix(self) -> int:
        """Returns how many tokens stand before the patches: class, distillation, registers."""
        import torch

        with exact_arithmetic():
            images = torch.zeros(1, 3, self._image_size, self._image_size, device=self._device)
            shape = tuple(self._tokens(images).shape)
        prefix = (shape[1] if len(shape) == 3 else 0) - self._per_side**2
        if prefix < 0:
            raise ConfigError(
                f"extractor.network: {self._config.network} gives {shape}; expected a token for "
                f"each of {self._per_side} × {self._per_side} patches"
            )
        if self._config.class_token and not prefix:
            raise ConfigError(
                f"extractor.class_token: {self._config.network} has no such token; leave it out"
            )
        return prefix

    def _boxes_implied(self) -> bool:
        whole = not any(isinstance(step, PaddedCentreCrop) for step in self.steps)
        return whole and not self._config.class_token

    def _boxes(self, image: Prepared) -> np.ndarray:
        cells = cell_boxes((self._per_side, self._per_side), image.view).clip(0, 1)
        if not self._config.class_token:
            return cells
        return np.concatenate([np.array([image.view], np.float32).clip(0, 1), cells])


_KINDS = frozenset({"image_processor_type", "feature_extractor_type"})


@dataclass(frozen=True)
class _Processor:
    """What a preprocessor_config.json says, with transformers' defaults for its kind."""

    filter: str  # Pillow's name
    short_side: int | None  # to which the shorter side is scaled
    square: int | None  # or to which both are; None for both: the file states no size
    crop: int | None  # pixels a side of the middle that is kept
    divisor: float  # of pixels, before mean and deviation
    mean: list[float]
    std: list[float]

    def final_size(self) -> int | None:
        """Returns the pixels a side that the network is given; None if the file does not say."""
        return self.crop or self.square


def _processor(network: str) -> _Processor:
    """Reads what transformers would do to a picture; FeatureError for what is not done here."""
    from transformers import AutoImageProcessor, ViTImageProcessorPil
    from transformers.image_processing_base import ImageProcessingMixin

    _check_reachable(network)
    try:
        stated, _ = ImageProcessingMixin.get_image_processor_dict(network)
        if "size" in stated or not _KINDS.isdisjoint(stated):
            found = AutoImageProcessor.from_pretrained(network, backend="pil")
        else:  # mean, deviation and filter alone, which are read alike of all kinds
            found = ViTImageProcessorPil.from_dict(stated)
    except (OSError, ValueError) as error:  # ValueError: a kind that transformers lacks
        raise _not_found(network, "preprocessor_config.json", error) from error
    where = f"{network}: preprocessor_config.json"
    names = ["resample"] if found.do_resize else []
    names += ["image_mean", "image_std"] if found.do_normalize else []
    absent = [name for name in names if stated.get(name) is None]
    if absent:
        raise FeatureError(f"{where}: does not say {', '.join(absent)}")
    if found.do_resize and found.resample not in list(Image.Resampling):
        numbers = ", ".join(f"{each.value} ({each.name})" for each in Image.Resampling)
        raise FeatureError(f"{where}: resample {found.resample}: expected {numbers}")
    if found.do_pad:
        raise FeatureError(f"{where}: do_pad is true, and pictures are not padded here")
    short_side, square = _sizes(found.size, where) if found.do_resize else (None, None)
    crop = _square(found.crop_size, f"{where}: crop_size") if found.do_center_crop else None
    if "size" not in stated:  # transformers' default is of its first model, not of this one
        short_side = square = crop = None
    elif (crop or square) is None:
        raise FeatureError(
            f"{where}: pictures keep their proportions or their size, and networks are given "
            "squares here; set extractor.fit to stretch or crop"
        )
    return _Processor(
        filter=Image.Resampling(found.resample).name if found.do_resize else "BILINEAR",
        short_side=short_side,
        square=square,
        crop=crop,
        divisor=1 / found.rescale_factor if found.do_rescale else 1.0,
        mean=_three(found.image_mean) if found.do_normalize else [0.0] * 3,
        std=_three(found.image_std) if found.do_normalize else [1.0] * 3,
    )


def _sizes(size: Any, where: str) -> tuple[int | None, int | None]:
    """Returns the shorter side, or the side of a square, that pictures are scaled to."""
    if size.shortest_edge and not size.longest_edge:
        return int(size.shortest_edge), None
    return None, _square(size, f"{where}: size")


def _square(size: Any, where: str) -> int:
    if not size.height or size.height != size.width:
        known = {name: value for name, value in dict(size).items() if value}
        raise FeatureError(f"{where}: expected shortest_edge, or height = width, found {known}")
    return int(size.height)


def _three(values: Any) -> list[float]:
    return [
        float(value) for value in (values if isinstance(values, list | tuple) else [values] * 3)
    ]


def _steps(
    config: PatchesConfig, processor: _Processor, network_size: int
) -> tuple[tuple[Step, ...], int]:
    """Returns what happens to the pixels, and how many a side there are in the end."""
    stated = processor.final_size() if config.fit == "processor" else None
    size = config.image_size or stated or network_size
    if config.fit == "crop":
        return (ResizeShortSideTo(size, processor.filter), PaddedCentreCrop(size)), size
    if stated is None:
        return (_whole(size, processor.filter),), size

    def scaled(side: int) -> int:
        return round(side * size / stated)

    steps: list[Step] = []
    if processor.short_side is not None:
        steps.append(ResizeShortSideTo(scaled(processor.short_side), processor.filter))
    if processor.square is not None:
        steps.append(_whole(scaled(processor.square), processor.filter))
    if processor.crop is not None:
        steps.append(PaddedCentreCrop(size))
    return tuple(steps), size


def _whole(size: int, filter_name: str) -> Step:
    known: dict[str, Step] = {"BILINEAR": Resize(size), "BICUBIC": ResizeBicubic(size)}
    return known.get(filter_name) or ResizeTo(size, size, filter_name)


def _random_model(config: PatchesConfig) -> Any:
    from transformers import AutoConfig, AutoModel

    try:
        return AutoModel.from_config(AutoConfig.from_pretrained(config.network))
    except (OSError, ValueError) as error:  # ValueError: a model_type that transformers lacks
        raise _not_found(config.network, "config.json", error) from error


def _trained_model(config: PatchesConfig) -> tuple[Any, set[str]]:
    """Returns the model and the names in its vision tower that the weights lack.

    Raises FeatureError if a feature would depend on one of those, which are random.
    """
    import torch
    from transformers import AutoModel

    try:
        model, loading = AutoModel.from_pretrained(
            config.network, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _not_found(config.network, "model.safetensors", error) from error
    prefix = "vision_model." if hasattr(model, "vision_model") else ""
    absent = {
        name.removeprefix(prefix) for name in loading["missing_keys"] if name.startswith(prefix)
    }
    needed = sorted(name for name in absent if not name.startswith(_POOLING))
    if needed:
        raise FeatureError(
            f"{config.network}: the weights lack {len(needed)} of the network's tensors: "
            f"{', '.join(needed[:3])}"
        )
    return model, absent


def _vision_tower(model: Any) -> Any:
    tower = getattr(model, "vision_model", model)
    for name in ("image_size", "patch_size", "hidden_size"):
        if not isinstance(getattr(tower.config, name, None), int):
            raise ConfigError(
                f"extractor.network: a {tower.config.model_type} model, whose config has no "
                f"single {name}, gives no square patches"
            )
    return tower


def _architecture(config: Any) -> dict[str, Any]:
    """Returns the settings by which a network computes, and which its weights do not show.

    Those that are the defaults of its model_type are left out, as transformers adds some.
    """
    return {"model_type": config.model_type} | {
        name: value
        for name, value in config.to_diff_dict().items()
        if not name.startswith(_NOT_ARCHITECTURE) and not name.endswith("dropout")
    }


def _layer(config: PatchesConfig, tower: Any) -> int | None:
    """Returns the layer counted from the front, or raises ConfigError."""
    if config.layer is None:
        return None
    depth = int(tower.config.num_hidden_layers)
    layer = config.layer if config.layer >= 0 else depth + 1 + config.layer
    if not 0 <= layer < depth:
        raise ConfigError(
            f"extractor.layer: found {config.layer}; expected 0 to {depth - 1} or {-depth - 1} to "
            "-2, or null for the network's output"
        )
    return layer


def _check_reachable(network: str) -> None:
    """Raises FeatureError at once where the hub's client would try for a minute."""
    from huggingface_hub import constants, errors, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(network, "config.json")
    except errors.HFValidationError:  # a path: transformers says what is wrong with it
        return
    if Path(network).exists() or isinstance(cached, str):
        return
    url = f"{constants.ENDPOINT}/{network}/resolve/main/config.json"
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=weights.CONNECT_TIMEOUT_SECONDS):
            return
    except urllib.error.HTTPError:  # the hub is there: its client says what is wrong
        return
    except OSError as error:
        raise _not_found(network, "model.safetensors", error) from error


def _not_found(network: str, file: str, error: Exception) -> FeatureError:
    # transformers lists all it knows
    what = str(error).splitlines()[0].partition(". Should have")[0]
    return FeatureError(
        f"extractor.network: {file} of {network!r} cannot be had ({what}). Give a folder with "
        "config.json, preprocessor_config.json and model.safetensors, fetched where the Hugging "
        "Face hub can be reached (hf download NAME), or another name"
    )
