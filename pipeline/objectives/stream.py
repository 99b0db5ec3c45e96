"""A loader's batch to model inputs with targets, and these to a loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.dataset import TextKind
from pipeline.data.features import FeatureBatch
from pipeline.data.loader import Batch
from pipeline.errors import FeatureError
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Inputs
from pipeline.objectives.base import Encodings, Objective, Vocabulary
from pipeline.objectives.objective import by_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class StreamBatch:
    """One stream's share of a micro-batch: B samples, and what each objective wants of them."""

    inputs: Inputs
    targets: Mapping[str, Tensor]  # objective -> (B, ...)


@dataclass(frozen=True)
class MicroBatch:
    """What a rank holds in one forward pass: a batch for each stream that is trained."""

    streams: Mapping[str, StreamBatch]

    @property
    def num_samples(self) -> int:
        return sum(len(stream.inputs.tokens) for stream in self.streams.values())

    @property
    def num_tokens(self) -> int:
        """Real tokens and regions."""
        return sum(int((~padding).sum()) for padding in self._paddings())

    @property
    def num_places(self) -> int:
        """The same with their padding."""
        return sum(padding.numel() for padding in self._paddings())

    def to(self, device: torch.device, dtype: torch.dtype) -> "MicroBatch":
        """Returns it on a device, features and boxes in a dtype; pixels stay uint8."""
        return MicroBatch(
            {
                name: StreamBatch(
                    moved(stream.inputs, device, dtype),
                    {
                        objective: target.to(device, non_blocking=True)
                        for objective, target in stream.targets.items()
                    },
                )
                for name, stream in self.streams.items()
            }
        )

    def _paddings(self) -> list[Tensor]:
        inputs = [stream.inputs for stream in self.streams.values()]
        return [one.token_padding for one in inputs] + [one.region_padding for one in inputs]


class StreamCollator:
    """Turns batches of one stream into inputs and targets of its objectives."""

    def __init__(
        self,
        objectives: Sequence[Objective],
        tokenizer: "PreTrainedTokenizerFast",
        max_tokens: int,
        answers: Sequence[str] = (),
        blind: bool = False,
    ) -> None:
        (self.stream,) = {objective.stream for objective in objectives}
        self._objectives = objectives
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._vocabulary = Vocabulary.of(tokenizer, answers)
        self._blind = blind

    def __call__(self, batch: Batch) -> StreamBatch:
        texts = own_texts(batch, self.stream.kind)
        for objective in self._objectives:
            texts = objective.choose_texts(batch, texts)
        encodings = encode_texts(
            texts, self.stream.kind, self._tokenizer, self._vocabulary, self._max_tokens
        )
        targets = {}
        for objective in self._objectives:
            encodings, targets[objective.name] = objective.prepare(
                batch, encodings, self._vocabulary
            )
        return StreamBatch(make_inputs(encodings, batch.features, self._blind), targets)


class ObjectiveModel(nn.Module):
    """A model with its losses: what is trained. Every parameter is used inside its forward."""

    def __init__(self, model: VisionLanguageModel, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.model = model
        self._streams = by_stream(list(objectives))

    def forward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum of the objectives' mean losses, and each mean, detached."""
        losses: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for name, objectives in self._streams.items():
            stream = batch.streams[name]
            encoded = self.model.encode(stream.inputs, mask=objectives[0].stream.mask)
            for objective in objectives:
                loss = objective.loss(
                    self.model, encoded, stream.inputs, stream.targets[objective.name]
                ).mean()
                losses[objective.name] = loss.detach()
                total = total + objective.weight * loss
        return total, losses


def own_texts(batch: Batch, kind: TextKind) -> list[str]:
    """Returns the caption or question (B,) that each example of a batch is about."""
    pairs = zip(batch.texts, batch.text_index, strict=True)
    if kind == "captions":
        return [texts.captions[index] for texts, index in pairs]
    assert kind == "questions", kind
    return [texts.questions[index].question for texts, index in pairs]


def encode_texts(
    texts: Sequence[str],
    kind: TextKind,
    tokenizer: "PreTrainedTokenizerFast",
    vocabulary: Vocabulary,
    max_tokens: int,
) -> Encodings:
    """Writes captions as "[CLS] ... [SEP]" and questions as "[CLS] ... [MASK] [SEP]".

    A text of more than `max_tokens` with these is cut at its end; special tokens are never cut,
    nor read out of a text that spells them. The answer is read at the [MASK], as in VisualBERT.
    """
    closing = [vocabulary.mask, vocabulary.sep] if kind == "questions" else [vocabulary.sep]
    room = max_tokens - 1 - len(closing)
    assert room > 0, f"max_tokens={max_tokens} leaves no room for a word"
    rows: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=True,
        verbose=False,
    )["input_ids"]
    lengths = np.array([min(len(row), room) for row in rows])
    width = int(lengths.max()) + 1 + len(closing)
    tokens = np.full((len(rows), width), vocabulary.pad, dtype=np.int64)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[i, : 1 + length + len(closing)] = [vocabulary.cls, *row[:length], *closing]
    place, ends = np.arange(width), lengths[:, None]
    return Encodings(
        tokens=tokens,
        padding=place >= ends + 1 + len(closing),
        is_word=(place >= 1) & (place < ends + 1),
    )


def make_inputs(encodings: Encodings, features: FeatureBatch | None, blind: bool) -> Inputs:
    """Puts token sequences (B, T) and features (B, R, D) together; `blind` leaves no region.

    Raises FeatureError if there are no features.
    """
    if features is None:
        raise FeatureError("this batch has no features; open the split with an extractor's name")
    places = np.arange(features.values.shape[1])
    inputs = Inputs(
        tokens=torch.from_numpy(encodings.tokens),
        token_padding=torch.from_numpy(encodings.padding),
        features=torch.from_numpy(features.values),
        boxes=torch.from_numpy(features.boxes),
        region_padding=torch.from_numpy(places >= features.num_regions[:, None]),
    )
    return inputs.without_image() if blind else inputs


def moved(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Returns inputs on a device, features and boxes in a dtype; pixels stay uint8."""
    inputs = inputs.to(device)
    features, boxes = inputs.features, inputs.boxes
    if features.dtype != torch.uint8:
        features = features.to(dtype)
    return replace(inputs, features=features, boxes=boxes.to(dtype))
