"""Model inputs with targets, collated from a loader's batch, and their loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.load.loader import Batch
from pipeline.data.read.dataset import TextKind
from pipeline.data.read.features import FeatureBatch
from pipeline.errors import ConfigError, FeatureError
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.tensors import mapped
from pipeline.objectives.base import Encodings, Objective, Vocabulary
from pipeline.objectives.objective import by_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class StreamBatch:
    """One stream's share of a micro-batch: B samples, and what each objective wants of them.

    A step that trains none of a stream's objectives has no samples in it and no targets.
    """

    inputs: Inputs
    targets: Mapping[str, Any]  # objective -> its target
    is_matched: Tensor  # (B,) bool: the text is the image's own


@dataclass(frozen=True)
class CollatedBatch:
    """A micro-batch of objectives: a batch for each stream that has a part in it."""

    streams: Mapping[str, StreamBatch]

    @property
    def num_samples(self) -> int:
        return sum(len(stream.inputs.tokens) for stream in self.streams.values())

    @property
    def num_tokens(self) -> int:
        """Real tokens and regions."""
        return sum(int((~padding).sum()) for padding in self._paddings())

    @property
    def num_tokens_with_padding(self) -> int:
        """The same with their padding."""
        return sum(padding.numel() for padding in self._paddings())

    def to(self, device: torch.device, dtype: torch.dtype) -> "CollatedBatch":
        """Returns it on a device, features and boxes in a dtype; pixels stay uint8."""
        there = mapped(self, lambda tensor: tensor.to(device, non_blocking=True))
        return CollatedBatch(
            {
                name: replace(stream, inputs=_cast(stream.inputs, dtype))
                for name, stream in there.streams.items()
            }
        )

    def _paddings(self) -> list[Tensor]:
        inputs = [stream.inputs for stream in self.streams.values()]
        return [one.token_padding for one in inputs] + [one.region_padding for one in inputs]


class StreamCollator:
    """Turns batches of one stream into inputs and targets of its objectives.

    `blind_dim` is the `feature_dim` of a model that is trained without the image, if it is.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        tokenizer: "PreTrainedTokenizerFast",
        max_tokens: int,
        answers: Sequence[str] = (),
        blind_dim: int | None = None,
    ) -> None:
        (self.stream,) = {objective.stream for objective in objectives}
        for objective in objectives:
            if blind_dim is not None and objective.needs_regions:
                raise ConfigError(f"objectives.{objective.name}: a blind model has no regions")
            objective.check(tokenizer, answers)
        self.objectives = objectives
        self.needs_global_batch = any(one.needs_global_batch for one in objectives)
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._vocabulary = Vocabulary.of(tokenizer, answers)
        self._blind_dim = blind_dim

    def is_due(self, seed: int, step: int) -> bool:
        """Whether a step trains any of its objectives."""
        return any(one.is_due(seed, step) for one in self.objectives)

    def __call__(self, batch: Batch) -> StreamBatch:
        due = [one for one in self.objectives if one.is_due(batch.seed, batch.step)]
        if not due:
            return _nothing()
        drawn = {objective.name: objective.draw(batch) for objective in due}
        own = texts = own_texts(batch, self.stream.kind)
        for objective in due:
            texts = objective.choose_texts(texts, drawn[objective.name])
        encodings = encode_texts(
            texts, self.stream.kind, self._tokenizer, self._vocabulary, self._max_tokens
        )
        targets = {}
        for objective in due:
            encodings, targets[objective.name] = objective.prepare(
                batch, encodings, self._vocabulary, drawn[objective.name]
            )
        inputs = make_inputs(encodings, batch.features, self._blind_dim)
        for objective in due:
            inputs = objective.hide(batch, inputs, drawn[objective.name])
        matched = [text == shown for text, shown in zip(own, texts, strict=True)]
        return StreamBatch(inputs, targets, torch.tensor(matched))

    def select(self, batch: StreamBatch, samples: Tensor) -> StreamBatch:
        """Returns these samples (N,) of a batch it made, as it would make them by themselves."""
        if not batch.targets:
            return batch
        inputs = batch.inputs.select(samples)
        num_tokens = inputs.tokens.shape[1]
        targets = {
            objective.name: objective.select(batch.targets[objective.name], samples, num_tokens)
            for objective in self.objectives
            if objective.name in batch.targets
        }
        return StreamBatch(inputs, targets, batch.is_matched[samples])


class ObjectiveModel(nn.Module):
    """A model with its losses: what is trained. Every parameter is used inside its forward.

    `learned` is what objectives train beside the model; it is not part of the model folder.
    """

    def __init__(self, model: VisionLanguageModel, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.model = model
        attached = {objective.name: objective.attach(model) for objective in objectives}
        self.learned = nn.ModuleDict(
            {name: module for name, module in attached.items() if module is not None}
        )
        self._streams = by_stream(list(objectives))

    def forward(self, batch: CollatedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum of the objectives' mean losses, and each mean, detached."""
        losses: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for stream, due in self._due(batch):
            encoded = self._encode(stream, due)
            for objective in due:
                per_sample = objective.loss(
                    self.model, encoded, stream.inputs, stream.targets[objective.name]
                )
                if objective.matched_only:
                    per_sample = per_sample * stream.is_matched
                loss = per_sample.mean()
                losses[objective.name] = loss.detach()
                total = total + objective.weight * loss
        return total, losses

    @torch.no_grad()
    def measure(self, batch: CollatedBatch) -> dict[str, float]:
        """Returns each objective's metric, as `itm/accuracy`, over the samples that have one.

        NaN if none has. The caller has called `eval()`.
        """
        metrics = {}
        for stream, due in self._due(batch):
            encoded = self._encode(stream, due)
            for objective in due:
                values = objective.metric(
                    self.model, encoded, stream.inputs, stream.targets[objective.name]
                )
                if objective.matched_only:
                    values = values[stream.is_matched]
                metrics[f"{objective.name}/{objective.metric_name}"] = float(values.nanmean())
        return metrics

    def _due(self, batch: CollatedBatch) -> list[tuple[StreamBatch, list[Objective]]]:
        """Returns the streams of this step, each with the objectives that have a target in it."""
        return [
            (stream, [one for one in objectives if one.name in stream.targets])
            for name, objectives in self._streams.items()
            if (stream := batch.streams.get(name)) is not None and stream.targets
        ]

    def _encode(self, stream: StreamBatch, objectives: Sequence[Objective]) -> Encoded:
        return self.model.encode(
            stream.inputs,
            mask=objectives[0].stream.mask,
            attention=any(objective.needs_attention for objective in objectives),
        )


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
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=True,
        verbose=False,
    )
    rows: list[list[int]] = encoded["input_ids"]
    lengths = np.array([min(len(row), room) for row in rows])
    width = int(lengths.max()) + 1 + len(closing)
    tokens = np.full((len(rows), width), vocabulary.pad, dtype=np.int64)
    words = np.zeros_like(tokens)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[i, : 1 + length + len(closing)] = [vocabulary.cls, *row[:length], *closing]
        words[i, 1 : 1 + length] = encoded.word_ids(i)[:length]
    column, ends = np.arange(width), lengths[:, None]
    return Encodings(
        tokens=tokens,
        padding=column >= ends + 1 + len(closing),
        is_word=(column >= 1) & (column < ends + 1),
        words=words,
    )


def make_inputs(
    encodings: Encodings, features: FeatureBatch | None, blind_dim: int | None = None
) -> Inputs:
    """Puts token sequences (B, T) and features (B, R, D) together.

    For a blind model of so many dimensions there is no region, and what features there are is not
    looked at. For any other, raises FeatureError if there are none.
    """
    if blind_dim is not None:
        features = _no_regions(len(encodings.tokens), blind_dim)
    if features is None:
        raise FeatureError("this batch has no features; open the split with an extractor's name")
    columns = np.arange(features.values.shape[1])
    return Inputs(
        tokens=torch.from_numpy(encodings.tokens),
        token_padding=torch.from_numpy(encodings.padding),
        features=torch.from_numpy(features.values),
        boxes=torch.from_numpy(features.boxes),
        region_padding=torch.from_numpy(columns >= features.num_regions[:, None]),
        pixels=None if features.pixels is None else torch.from_numpy(features.pixels),
    )


def _no_regions(count: int, feature_dim: int) -> FeatureBatch:
    return FeatureBatch(
        values=np.zeros((count, 0, feature_dim), np.float32),
        boxes=np.zeros((count, 0, 4), np.float32),
        num_regions=np.zeros(count, np.int32),
    )


def _nothing() -> StreamBatch:
    """A stream without a sample."""
    empty = torch.zeros(0, 0, dtype=torch.bool)
    inputs = Inputs(
        tokens=torch.zeros(0, 0, dtype=torch.long),
        token_padding=empty,
        features=torch.zeros(0, 0, 0),
        boxes=torch.zeros(0, 0, 4),
        region_padding=empty,
    )
    return StreamBatch(inputs, {}, is_matched=empty.flatten())


def moved(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Returns inputs on a device, features and boxes in a dtype; pixels stay uint8."""
    return _cast(inputs.to(device), dtype)


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    is_pixels = inputs.features.dtype == torch.uint8
    features = inputs.features if is_pixels else inputs.features.to(dtype)
    return replace(inputs, features=features, boxes=inputs.boxes.to(dtype))
