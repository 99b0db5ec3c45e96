"""A training spec to the parts of a run: the module that is trained, its batches, its folder."""

import contextlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline import config, storage
from pipeline.data.dataset import Dataset, Split, TextKind
from pipeline.data.loader import Loader
from pipeline.data.order import Order
from pipeline.data.vocabulary import load_tokenizer
from pipeline.models import families
from pipeline.models.base import ModelConfig
from pipeline.objectives import stream
from pipeline.objectives.base import Objective
from pipeline.objectives.objective import ObjectivesConfig, by_stream
from pipeline.objectives.stream import ObjectiveModel, StreamCollator
from pipeline.training import model_folder
from pipeline.training.spec import TrainingSpec

MODEL = "model"  # RUN/<phase>/model


class MicroBatch(Protocol):
    """What a rank holds in one forward pass."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Real tokens and regions."""
        ...

    @property
    def num_places(self) -> int:
        """The same with their padding."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Returns what the module's forward takes, on a device, in its weights' dtype."""
        ...


Batches = Callable[[int, int, int], Generator[Sequence[MicroBatch], None, None]]


@dataclass(frozen=True)
class Assembly:
    """The parts of a run.

    `module` maps a micro-batch to (mean loss, {objective: detached mean loss}). `batches` maps
    (start step, rank, world size) to the rank's micro-batches of each step from there to the last.
    `save` writes the model folder from fp32 weights named as in the module.
    """

    module: nn.Module
    batches: Batches
    save: Callable[[dict[str, Tensor]], None]


def assemble(spec: TrainingSpec) -> Assembly:
    """Builds the parts on this rank; every rank gets the same weights."""
    objectives = ObjectivesConfig.model_validate(spec.objectives).build()
    sizes: ModelConfig = config.check(families.FAMILIES[spec.family].config, spec.model, "model")
    torch.manual_seed(spec.seed)
    model = families.build(sizes)
    if spec.initial is not None:
        model_folder.initialise(model, spec.initial, _fresh_modules(spec, spec.initial))
    module = ObjectiveModel(model, objectives).train()

    def save(weights: dict[str, Tensor]) -> None:
        names = [name for name, _ in model.named_parameters()]
        model_folder.save_model(
            storage.join(spec.folder, MODEL),
            config=sizes,
            parameters={name: weights[f"model.{name}"] for name in names},
            tokenizer=spec.tokenizer,
            answers=spec.answers,
            card=spec.card,
        )

    return Assembly(module, _batches(spec, objectives), save)


def _batches(spec: TrainingSpec, objectives: list[Objective]) -> Batches:
    tokenizer = load_tokenizer(spec.tokenizer)
    dataset = Dataset.open(spec.dataset, spec.dataset_version)
    split = dataset.split(spec.split, spec.features)
    for objective in objectives:
        objective.open(dataset, spec.split)
    collators = [
        StreamCollator(sharing, tokenizer, spec.max_tokens, spec.answers, spec.blind)
        for sharing in by_stream(objectives).values()
    ]
    loaders = {
        kind: _loader(spec, split, kind, [o for o in objectives if o.stream.kind == kind])
        for kind in dict.fromkeys(objective.stream.kind for objective in objectives)
    }

    def batches(
        start: int, rank: int, world_size: int
    ) -> Generator[list[stream.MicroBatch], None, None]:
        size = spec.training.micro_batch_size
        with contextlib.ExitStack() as opened:
            sources = [
                loader.batches(start, spec.training.steps, rank, world_size, size)
                for loader in loaders.values()
            ]
            for source in sources:
                opened.enter_context(contextlib.closing(source))
            for step in zip(*sources, strict=True):  # for each kind, the step's batches
                yield [
                    stream.MicroBatch(
                        {
                            collate.stream.name: collate(batches[collate.stream.kind])
                            for collate in collators
                        }
                    )
                    for batches in (
                        dict(zip(loaders, of_kinds, strict=True))
                        for of_kinds in zip(*step, strict=True)
                    )
                ]

    return batches


def _loader(
    spec: TrainingSpec, split: Split, kind: TextKind, objectives: list[Objective]
) -> Loader:
    return Loader(
        split,
        Order(split, kind, spec.seed, spec.training.shuffle_window_shards),
        global_batch_size=spec.training.global_batch_size,
        seed=spec.seed,
        distractors=any(objective.needs_distractors for objective in objectives),
        threads=spec.training.loader_threads,
    )


def _fresh_modules(spec: TrainingSpec, initial: str) -> Sequence[str]:
    """Names what is not taken over from another model: an answer head for other answers."""
    own = storage.join(initial, model_folder.OWN)
    answers = json.loads(storage.read_bytes(own))["answers"] if storage.exists(own) else []
    return () if tuple(answers) == spec.answers else ("answer_head",)
