"""Grid features: the map that a frozen torchvision network has at one of its nodes."""

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field

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
    IMAGENET_MEAN,
    IMAGENET_STD,
    CentreCrop,
    Prepared,
    Resize,
    ResizeShortSide,
    Step,
    cell_boxes,
    describe,
    prepare,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.vision.extractors.backbone import Backbone

NORMALIZE = {"step": "normalize", "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}


class GridConfig(NetworkConfig):
    """A node of a torchvision classification network: ResNet-50's `layer4` is 7 × 7 × 2048."""

    type: Literal["grid"] = Field(
        default="grid",
        description="a node of a torchvision classification network: ResNet-50's `layer4` is 7 "
        "× 7 × 2048",
    )
    network: str = Field(default="resnet50", description="the network's name in torchvision")
    node: str = Field(
        default="layer4",
        description="the node whose output it is; `avgpool`: the pooled feature, a grid of one "
        "cell",
    )
    weights: str = Field(
        default="default",
        description="torchvision's best for the network (`default`), a file (.safetensors, "
        ".pth) or `random`",
    )
    image_size: int = Field(
        default=224, ge=32, le=4096, description="pixels a side that the network sees"
    )
    fit: Literal["stretch", "crop"] = Field(
        default="stretch",
        description="stretch: the whole picture; crop: short side to 8/7 of image_size, then "
        "its middle, as the networks were evaluated on ImageNet",
    )

    def steps(self) -> tuple[Step, ...]:
        """What happens to the pixels before they are normalized."""
        if self.fit == "stretch":
            return (Resize(self.image_size),)
        return (ResizeShortSide(round(self.image_size * 8 / 7)), CentreCrop(self.image_size))

    def check(self) -> None:
        import torch

        super().check()
        with torch.device("meta"):
            network = _cut(self.network, self.node)
            _grid_shape(network, self)
        weights.check(self.weights, self.network)

    def load(self, device: str) -> "GridExtractor":
        return GridExtractor(self, device)

    def backbone(self) -> "Backbone":
        """Returns the network as a part of a model that is trained with it."""
        from pipeline.vision.extractors.backbone import Backbone

        return Backbone(_load(self).network, self.image_size)


class GridExtractor:
    """Computes (H * W, C) features, cells row by row, C channels each.

    Boxes of the cells follow from the grid if the whole picture is seen, and are given if only
    its middle is.
    """

    def __init__(self, config: GridConfig, device: str) -> None:
        import torch

        self._config = config
        self._device = device
        self.steps = config.steps()
        loaded = _load(config)
        network, self._weights, self._digest = loaded.network, loaded.weights, loaded.digest
        self._dim, self._grid = _grid_shape(network, config)
        self._network = network.to(memory_format=torch.channels_last).to(device)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )

    @property
    def name(self) -> str:
        return self.card().name

    def card(self) -> ExtractorCard:
        preprocessing = (*describe(self.steps, self._config.window), NORMALIZE)
        selection = {"network": self._config.network, "node": self._config.node}
        stored = describe_storage(self._config.storage)
        height, width = self._grid
        return ExtractorCard(
            type="grid",
            identity=identity("grid", self._digest, preprocessing, selection, stored),
            config=self._config.model_dump(mode="json") | {"weights": self._weights},
            weights=Weights(digest=self._digest, random=self._config.weights == "random"),
            preprocessing=preprocessing,
            selection=selection,
            storage=stored,
            dtype=stored["dtype"],
            dim=self._dim,
            num_regions=height * width,
            grid=(height, width),
            boxes="grid" if self._config.fit == "stretch" else "stored",
            parts=storage_parts(self._config.storage, self._dim),
            environments=(ExtractionEnvironment.here(self._device),),
        )

    def prepare(self, image: bytes) -> Prepared:
        return prepare(image, self.steps, self._config.window)

    def load(self, prepared: Sequence[Prepared]) -> "Tensor":
        """Returns pictures as the network takes them (B, 3, S, S), normalized, on its device."""
        import torch

        pixels = torch.from_numpy(np.stack([image.pixels for image in prepared]))
        # (B, S, S, 3) seen as (B, 3, S, S) is already in channels-last order
        images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
        return images.sub_(self._mean).div_(self._std)

    def forward(self, images: "Tensor") -> "Tensor":
        """Runs the network alone; returns the node's map (B, C, H, W) or (B, C)."""
        maps: Tensor = self._network(images)["map"]
        return maps

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        with exact_arithmetic():
            maps = self.forward(self.load(prepared))
            values = maps.flatten(2) if maps.ndim == 4 else maps.unsqueeze(2)
            cells = values.transpose(1, 2).contiguous()  # (B, H * W, C)
            try:
                features = to_storage(cells, self._config.storage)
            except FeatureError as error:
                raise FeatureError(f"{self.name}: {error}") from error
        if self._config.fit == "stretch":
            return features
        return [
            replace(feature, boxes=cell_boxes(self._grid, image.view))
            for feature, image in zip(features, prepared, strict=True)
        ]

    def exact(self) -> Self:
        twin = copy.copy(self)
        twin._config = self._config.model_copy(update={"storage": "float32"})
        return twin


@dataclass(frozen=True)
class _Loaded:
    network: "nn.Module"
    weights: str  # where they came from: default, random or a file
    digest: str


def _load(config: GridConfig) -> _Loaded:
    """Returns the network up to its node with its weights; FeatureError if they cannot be had."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights.RANDOM_SEED)
        network = _cut(config.network, config.node)
    if config.weights == "random":
        loaded = _Loaded(network, config.weights, weights.digest(network))
        weights.calibrate(network, network, config.image_size)
        return loaded
    location = weights.fill(network, config.network, config.weights)
    return _Loaded(network, location, weights.digest(network))


def _cut(name: str, node: str) -> "nn.Module":
    """Returns the network up to a node, in evaluation mode, initialised at random.

    Raises ConfigError for a name or node that torchvision does not know.
    """
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(
            f"extractor.network: found {name!r}; {suggest(name, known)}expected one of "
            f"{', '.join(known)}"
        )
    # These two were trained on another normalization, which they undo themselves if told to.
    inception = {"init_weights": True, "transform_input": True}
    options = inception if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    nodes = get_graph_node_names(model, suppress_diff_warning=True)[1]
    prefixes = {
        ".".join(n.split(".")[:depth]) for n in nodes for depth in range(1, n.count(".") + 2)
    }
    if node not in prefixes:
        top = sorted({n.split(".")[0] for n in nodes}, key=[n.split(".")[0] for n in nodes].index)
        raise ConfigError(
            f"extractor.node: {name} has no {node!r}; {suggest(node, sorted(prefixes))}"
            f"its top-level nodes are {', '.join(top)}"
        )
    network: nn.Module = create_feature_extractor(
        model, return_nodes={node: "map"}, suppress_diff_warning=True
    ).eval()
    return network


def _grid_shape(network: "nn.Module", config: GridConfig) -> tuple[int, tuple[int, int]]:
    """Returns C and (H, W) of the map, or raises ConfigError if the node gives something else."""
    import torch

    device = next(network.parameters()).device
    with torch.inference_mode():
        images = torch.zeros(1, 3, config.image_size, config.image_size, device=device)
        found = network(images)["map"]
    shape = tuple(found.shape) if torch.is_tensor(found) else ()
    if len(shape) == 2:
        return shape[1], (1, 1)
    if len(shape) != 4:
        raise ConfigError(
            f"extractor.node: {config.node!r} of {config.network} gives {shape or type(found)}; "
            "expected a map (images, channels, height, width) or pooled (images, channels)"
        )
    return shape[1], (shape[2], shape[3])


def suggest(name: str, known: Sequence[str]) -> str:
    """Returns the beginning of a sentence that offers the known name nearest to an unknown one."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""
