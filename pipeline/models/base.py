"""The interface of a model family: objectives, benchmarks and generation know no more."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import Config
from pipeline.errors import ModelError
from pipeline.models.inputs import Cache, Encoded, Inputs

MaskKind = Literal["full", "prefix"]
Size = Annotated[int, Field(gt=0)]


BACKBONE = "backbone"  # a module's name, before that of each of its parameters


class ModelConfig(Config):
    """The sizes that every family has; the defaults are BERT-base with 2048-d regions."""

    vocab_size: Size = Field(default=30522, description="word pieces of the tokenizer")
    width: Size = Field(default=768, description="values of a token's state")
    num_heads: Size = Field(default=12, description="attention heads of a layer")
    intermediate_size: Size = Field(
        default=3072, description="width of a layer's feed-forward part"
    )
    feature_dim: Size = Field(
        default=2048, description="values of one region, as its extractor's card says"
    )
    max_positions: Size = Field(default=512, description="the longest text, in tokens")
    type_vocab_size: Size = Field(default=2, description="segments that a token may belong to")
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="of states and attention, in training"
    )
    initializer_range: float = Field(
        default=0.02,
        gt=0,
        description="standard deviation of new weights; BERT's suits a width of 768, narrow "
        "models learn sooner from about 1 / sqrt(width)",
    )
    num_answers: int = Field(
        default=0, ge=0, description="answers of the answer head; 0: there is none"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        return self


class VisionLanguageModel(nn.Module, ABC):
    """Encodes a batch of text and image regions, and scores words, matches and answers.

    B samples, T tokens, R regions, D width, V words, A answers.
    """

    config: ModelConfig
    match_index: ClassVar[
        int
    ]  # the column of match_logits that says text and image belong together
    masks: ClassVar[tuple[MaskKind, ...]] = ("full",)  # what encode can be asked for
    checkpoint_layers: bool = False  # recompute each layer's activations in the backward pass

    def __init__(self) -> None:
        super().__init__()
        # What makes the features of pictures (B, S, S, 3) uint8, or of None, which is none of
        # them: (B, R, F). None: features come with the batch.
        self.backbone: nn.Module | None = None

    @abstractmethod
    def encode(
        self, inputs: Inputs, *, mask: MaskKind = "full", attention: bool = False
    ) -> Encoded:
        """Encodes a batch.

        Under the "prefix" mask regions see regions only, and a token sees the regions and the
        tokens up to itself; a family that cannot raises ModelError. `attention` asks for each
        layer's attention maps.
        """

    @abstractmethod
    def token_logits(self, states: Tensor) -> Tensor:
        """Maps text states (N, D), gathered from the positions that matter, to (N, V)."""

    @abstractmethod
    def match_logits(self, encoded: Encoded) -> Tensor:
        """Returns (B, 2); `match_index` says which column means that text and image match."""

    @abstractmethod
    def answer_logits(self, encoded: Encoded, inputs: Inputs) -> Tensor:
        """Returns (B, A), or raises ModelError for a model built without answers."""

    def region_predictions(self, states: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Maps region states (N, D) to what the family predicts of a hidden region.

        "objects" and "attributes" are logits, "features" is the feature itself; a family without
        such heads raises ModelError.
        """
        raise ModelError(f"region_predictions: {type(self).__name__} has no heads for regions")

    def region_features(self, inputs: Inputs) -> Tensor:
        """Returns the features of regions (B, R, F), which the backbone makes if there is one."""
        if self.backbone is None:
            return inputs.features
        made: Tensor = self.backbone(inputs.pixels)
        # A blind model is given no picture and no region; its backbone has a part in the graph.
        return made.reshape(*inputs.features.shape[:2], made.shape[2])

    def run_layer(self, layer: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a layer, or, if so set, a version of it that keeps only its inputs."""
        if self.checkpoint_layers and self.training:
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def positions(self, tokens: Tensor) -> Tensor:
        """Returns 0 … T-1 for tokens (B, T); raises ModelError if T exceeds the position table."""
        num_tokens = tokens.shape[1]
        if num_tokens > self.config.max_positions:
            raise ModelError(
                f"tokens: a text of {num_tokens}, but max_positions={self.config.max_positions}; "
                "shorten the texts or widen the model"
            )
        return torch.arange(num_tokens, device=tokens.device)

    def require_mask(self, mask: MaskKind) -> None:
        """Raises ModelError for a mask that this family cannot encode under."""
        if mask not in self.masks:
            raise ModelError(f"mask {mask!r}: {type(self).__name__} knows {', '.join(self.masks)}")

    def require_answers(self) -> None:
        """Raises ModelError if the model was built without an answer head."""
        if not self.config.num_answers:
            raise ModelError("answer_logits: this model was built with num_answers=0")


class Decoder(Protocol):
    """A model that writes text one token at a time, remembering what it has read."""

    training: bool

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""

    def start(self, inputs: Inputs) -> tuple[Tensor, Cache]:
        """Reads image and prefix tokens; returns logits (B, V) of each row's next token."""

    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Reads one more token per row (B,); returns the next logits (B, V)."""
