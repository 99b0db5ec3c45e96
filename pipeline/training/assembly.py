"""The parts of a training run: the module that is trained, its batches, its folder."""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import config, storage
from pipeline.data.load.loader import AnyOrder, AnySplit, Batch, Loader
from pipeline.data.load.mixture import MixedOrder, MixedSplit
from pipeline.data.load.order import Order
from pipeline.data.load.packing import cut_by_tokens
from pipeline.data.read.dataset import Dataset, Split, TextKind
from pipeline.data.read.images import LiveConfig
from pipeline.data.text.vocabulary import load_tokenizer
from pipeline.errors import ConfigError
from pipeline.models import families
from pipeline.models.base import ModelConfig
from pipeline.models.flops import EncodingFlops
from pipeline.objectives import stream
from pipeline.objectives.base import Objective
from pipeline.objectives.objective import ObjectivesConfig, by_stream
from pipeline.objectives.stream import ObjectiveModel, StreamCollator
from pipeline.pretrained import folder as model_folder
from pipeline.pretrained.card import ModelCard
from pipeline.pretrained.files import is_model, read_own
from pipeline.training.evaluation import Evaluate
from pipeline.training.feed.micro_batch import MicroBatch
from pipeline.training.held_out import evaluate, held_out_parts
from pipeline.training.spec import MixedIn, RankContext, TrainingSpec

MODEL = "model"  # RUN/<phase>/model


Batches = Callable[[int, int, int], Generator[Sequence[MicroBatch], None, None]]


@dataclass(frozen=True)
class Assembly:
    """The parts of a run.

    `module` maps a micro-batch to (mean loss, {objective: detached mean loss}). `batches` maps
    (start step, rank, world size) to the rank's micro-batches of each step from there to the last.
    `save` writes the model folder from fp32 weights, named as in the module, and their step.
    `evaluate` finds figures of held-out data; None: there is none. `flops` counts the operations of
    encoding a micro-batch, forward and backward; None: they cannot be told. `initial` says what was
    taken over of which weights, and what was not; empty if training began from nothing.
    """

    module: nn.Module
    batches: Batches
    save: Callable[[dict[str, Tensor], int], None]
    evaluate: Evaluate | None = None
    flops: Callable[[Any], int] | None = None
    initial: Mapping[str, Any] = field(default_factory=dict)


def assemble(spec: TrainingSpec) -> Assembly:
    """Builds the parts on this rank; every rank gets the same weights."""
    objectives = ObjectivesConfig.model_validate(spec.objectives).build()
    sizes: ModelConfig = config.check(families.FAMILIES[spec.family].config, spec.model, "model")
    torch.manual_seed(spec.seed)
    model = families.build(sizes, spec.backbone.backbone() if spec.backbone else None)
    model.checkpoint_layers = spec.training.recompute_layers
    initial: dict[str, Any] = {}
    if spec.initial is not None:
        taken = model_folder.initialise(model, spec.initial, _fresh_modules(spec, spec.initial))
        initial = {"initial": spec.initial, "summary": taken.summary(), **taken.to_json()}
    module = ObjectiveModel(model, objectives).train()

    def save(weights: dict[str, Tensor], step: int) -> None:
        names = [name for name, _ in model.named_parameters()]
        model_folder.save_model(
            storage.join(spec.folder, MODEL),
            config=sizes,
            parameters={name: weights[f"model.{name}"] for name in names},
            tokenizer=spec.tokenizer,
            answers=spec.answers,
            card=ModelCard(
                model_type=families.family_of(sizes).model_type,
                made={**spec.card, "step": step, **({"initial": initial} if initial else {})},
                num_parameters=sum(parameter.numel() for parameter in model.parameters()),
                num_answers=len(spec.answers),
            ),
            decoding=spec.decoding,
        )

    # Of a model part of which is not trained, the backward pass takes less than twice the forward.
    flops = None if spec.training.optimizer.freeze or spec.backbone else _flops(sizes)
    return Assembly(module, _batches(spec, objectives), save, _evaluation(spec), flops, initial)


def _flops(sizes: ModelConfig) -> Callable[[stream.CollatedBatch], int]:
    encoding = EncodingFlops(sizes)

    def flops(batch: stream.CollatedBatch) -> int:
        lengths: Counter[tuple[int, int]] = Counter()
        for one in batch.streams.values():
            num_tokens = (~one.inputs.token_padding).sum(dim=1).tolist()
            num_regions = (~one.inputs.region_padding).sum(dim=1).tolist()
            lengths.update(zip(num_tokens, num_regions, strict=True))
        return 3 * sum(count * encoding.of(*of_one) for of_one, count in lengths.items())

    return flops


@dataclass(frozen=True)
class _Feed:
    """A split, as these objectives read it: a loader for each kind of text, whose steps agree."""

    loaders: dict[TextKind, Loader]
    collators: list[StreamCollator]
    global_batch_size: int
    micro_batch_size: int
    tokens_per_micro_batch: int | None  # at most; None: all have as many samples

    def batches(
        self, start: int, stop: int, rank: int, world_size: int
    ) -> Generator[list[stream.CollatedBatch], None, None]:
        """Yields for each step in [start, stop) the rank's micro-batches."""
        self._require_one_pass(world_size)
        read_at_once = self.micro_batch_size
        if self.tokens_per_micro_batch is not None:  # all of the rank's share, to be cut here
            read_at_once = self.global_batch_size
        with contextlib.ExitStack() as opened:
            sources = [
                loader.batches(start, stop, rank, world_size, read_at_once)
                for loader in self.loaders.values()
            ]
            for source in sources:
                opened.enter_context(contextlib.closing(source))
            for step in zip(*sources, strict=True):  # for each kind, the step's batches
                read = [
                    dict(zip(self.loaders, of_kinds, strict=True))
                    for of_kinds in zip(*step, strict=True)
                ]
                collated = [self._collated(batches) for batches in read]
                if self.tokens_per_micro_batch is not None:
                    collated = self._cut(read[0], collated[0], self.tokens_per_micro_batch)
                yield collated

    def _require_one_pass(self, world_size: int) -> None:
        """Raises ConfigError if a global batch is cut that an objective needs whole."""
        whole = self.global_batch_size
        fits = whole <= self.micro_batch_size * world_size and whole % world_size == 0
        if fits and self.tokens_per_micro_batch is None:
            return
        for collate in self.collators:
            if collate.needs_global_batch:
                raise ConfigError(
                    f"objectives.{collate.objectives[0].name}: contrasts the whole global batch in "
                    "one pass, but a rank has several micro-batches a step; make "
                    "global_batch_size = micro_batch_size x ranks"
                )

    def _collated(self, batches: Mapping[TextKind, Batch]) -> stream.CollatedBatch:
        return stream.CollatedBatch(
            {
                collate.stream.name: collate(batches[collate.stream.kind])
                for collate in self.collators
            }
        )

    def _cut(
        self, share: Mapping[TextKind, Batch], collated: stream.CollatedBatch, max_tokens: int
    ) -> list[stream.CollatedBatch]:
        """Cuts a rank's share of a step by what its examples take as the model shall see them.

        How long a text comes to be is the objectives' doing, so the share is collated before it.
        """
        lengths = []
        for kind, batch in share.items():
            passes = [
                collated.streams[collate.stream.name].inputs
                for collate in self.collators
                if collate.stream.kind == kind
            ]
            taken = [
                (~inputs.token_padding).sum(dim=1).numpy() + inputs.region_padding.shape[1]
                for inputs in passes
                if len(inputs.tokens)  # else the step trains none of this pass's objectives
            ]
            lengths.append(np.stack(taken) if taken else np.zeros((1, len(batch.rows)), np.int64))
        return [
            self._part(collated, dict(zip(share, map(torch.from_numpy, of_kinds), strict=True)))
            for of_kinds in cut_by_tokens(lengths, max_tokens, self.micro_batch_size)
        ]

    def _part(
        self, whole: stream.CollatedBatch, samples: Mapping[TextKind, Tensor]
    ) -> stream.CollatedBatch:
        return stream.CollatedBatch(
            {
                collate.stream.name: collate.select(
                    whole.streams[collate.stream.name], samples[collate.stream.kind]
                )
                for collate in self.collators
            }
        )


def _feed(
    spec: TrainingSpec,
    objectives: list[Objective],
    split_name: str,
    features: str | LiveConfig | None,
    mixed_in: Sequence[MixedIn] = (),
    tokens_per_micro_batch: int | None = None,
) -> _Feed:
    tokenizer = load_tokenizer(spec.tokenizer)
    blind_dim = None
    if spec.blind:
        blind_dim = spec.model["feature_dim"]

    def opened(dataset: Dataset, split: str) -> Split:
        found = dataset.split(split, features)
        return found.without_features() if spec.blind else found  # no picture is read or varied

    dataset = Dataset.open(spec.dataset, spec.dataset_version)
    splits = {opened(dataset, split_name): 1.0}
    for other in mixed_in:
        more = Dataset.open(other.dataset, other.dataset_version)
        splits[opened(more, other.split)] = other.weight
    for objective in objectives:
        objective.open(dataset, split_name)
    collators = [
        StreamCollator(sharing, tokenizer, spec.max_tokens, spec.answers, blind_dim)
        for sharing in by_stream(objectives).values()
    ]
    training = spec.training
    loaders: dict[TextKind, Loader] = {}
    for kind in dict.fromkeys(objective.stream.kind for objective in objectives):
        split, order = _ordered(spec, kind, splits)
        loaders[kind] = Loader(
            split,
            order,
            global_batch_size=training.global_batch_size,
            seed=spec.seed,
            distractors=any(o.needs_distractors for o in objectives if o.stream.kind == kind),
            group_by=kind if training.loading.group_by_length else None,
            threads=training.loading.threads,
        )
    return _Feed(
        loaders,
        collators,
        training.global_batch_size,
        training.micro_batch_size,
        tokens_per_micro_batch,
    )


def _ordered(
    spec: TrainingSpec, kind: TextKind, splits: Mapping[Split, float]
) -> tuple[AnySplit, AnyOrder]:
    """Returns the splits that have texts of a kind, as one, and the order of their examples."""
    having = [split for split in splits if split.num_texts(kind)] or list(splits)
    window = spec.training.loading.shuffle_window_shards
    orders = [Order(split, kind, spec.seed, window) for split in having]
    if len(having) == 1:
        return having[0], orders[0]
    mixed = MixedSplit(having)
    return mixed, MixedOrder(mixed, orders, [splits[split] for split in having], spec.seed)


def _batches(spec: TrainingSpec, objectives: list[Objective]) -> Batches:
    features = spec.live or spec.features
    feed = _feed(
        spec,
        objectives,
        spec.split,
        features,
        spec.mixed_in,
        spec.training.loading.tokens_per_micro_batch,
    )

    def batches(
        start: int, rank: int, world_size: int
    ) -> Generator[list[stream.CollatedBatch], None, None]:
        return feed.batches(start, spec.training.steps, rank, world_size)

    return batches


def _evaluation(spec: TrainingSpec) -> Evaluate | None:
    """Returns the held-out losses of the same objectives, over the same examples each time."""
    if spec.held_out_split is None or spec.training.evaluation.every_steps is None:
        return None
    # objectives of its own: some open what they read of a split
    feed = _feed(
        spec,
        ObjectivesConfig.model_validate(spec.objectives).build(),
        spec.held_out_split,
        spec.live.whole() if spec.live else spec.features,
    )
    training = spec.training
    parts = held_out_parts(feed.loaders, feed.collators, spec.seed, training.evaluation.examples)

    def evaluate_held_out(module: nn.Module, rank_context: RankContext) -> dict[str, float]:
        return evaluate(module, parts, training, rank_context)

    return evaluate_held_out


def _fresh_modules(spec: TrainingSpec, initial: str) -> Sequence[str]:
    """Names what is not taken over from another model: an answer head for other answers.

    Of somebody else's weights it is not known what their answers were.
    """
    answers = read_own(initial)["answers"] if is_model(initial) else []
    return () if answers and tuple(answers) == spec.answers else ("answer_head",)
