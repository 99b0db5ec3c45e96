"""The estimates of `sightline check`: bytes, samples, steps and hours of a training.

What depends on the data is told of the dataset as it lies there; what cannot be known yet is named
as unknown. It builds the run's tokenizer, which the run wants anyway, trains a few steps in
RUN/check, which is removed, and writes nothing else.
"""

import contextlib
import itertools
import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from pipeline import storage
from pipeline.cluster import ClusterConfig, resources
from pipeline.data.read.dataset import Split
from pipeline.data.text.vocabulary import load_tokenizer
from pipeline.errors import ConfigError, FeatureError, ManifestError, StoppedError
from pipeline.models import families
from pipeline.objectives.objective import ObjectivesConfig
from pipeline.recipe import Recipe
from pipeline.stages.data_inputs import DataInputs
from pipeline.stages.estimate import (
    GB,
    STAGES,
    WAIT_WORTH_TELLING,
    Data,
    Machine,
    Measured,
    Phase,
    Report,
)
from pipeline.stages.phase_spec import check_fits, phase_specs
from pipeline.stages.preflight import initial_weights, preflight, small_validation
from pipeline.stages.progress import StageProgress
from pipeline.training.assembly import assemble
from pipeline.training.config import (
    CheckpointsConfig,
    EvaluationConfig,
    ScheduleConfig,
    TrainingConfig,
)
from pipeline.training.engine.memory import FP32_BYTES, state_bytes
from pipeline.training.engine.optimizer import freeze
from pipeline.training.engine.requirements import require_swapping
from pipeline.training.feed.micro_batch import MicroBatch
from pipeline.training.launch.launch import launch_all
from pipeline.training.spec import TrainingSpec
from pipeline.vision.extractors.live import backbone_config

FOLDER = "check"  # RUN/check, while it lasts
WARM_UP_STEPS, TIMED_STEPS = 2, 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(recipe: Recipe, console: Console) -> Report:
    """Looks at a recipe before a long run, with real steps where the data is there.

    Raises ConfigError naming the key, what was found and what to do for settings with which the
    run could not be made.
    """
    preflight(recipe)
    machine = _machine(recipe.cluster)
    if recipe.cluster.address is None:  # else the swap files will be on other machines
        for training in (recipe.training.pretrain, recipe.training.finetune):
            if training is not None:
                require_swapping(training, machine.rank)
    unknown: list[str] = []
    if machine.bytes_per_rank is None:
        unknown.append(f"the memory of {machine.name}; compare the bytes with it yourself")
    try:
        inputs = DataInputs.open(recipe)
    except (ManifestError, FeatureError) as error:
        unknown.append(
            f"samples, epochs, activations and hours: {error}; run `sightline ingest` and "
            "`sightline extract` with this recipe first"
        )
        phases = _phases_without_data(recipe, machine, unknown)
    else:
        phases = _phases_of_data(recipe, inputs, machine)
    for phase in phases:
        _require_memory(machine, phase)
    _require_disk(recipe, phases)
    lacking = _lacking(recipe.cluster)
    if lacking:
        unknown.append(f"hours: {lacking}")
    elif any(phase.data for phase in phases):
        phases = _timed(recipe, inputs, phases, console)
    advice = [line for phase in phases for line in _advice(recipe, machine, phase)]
    initial = initial_weights(recipe)
    if initial is not None:
        advice.append(f"model.initial: {initial.summary()}")
    warning = small_validation(recipe, inputs.dataset) if phases and phases[0].data else None
    if warning is not None:
        advice.append(warning)
    return Report(recipe.name, machine, tuple(phases), tuple(unknown), tuple(advice))


def activation_bytes(module: nn.Module, batch: MicroBatch, dtype: torch.dtype) -> int:
    """Returns what a forward pass on the CPU keeps for the backward pass, weights aside."""
    module = module.to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = module(batch.to(torch.device("cpu"), dtype))
    del loss  # until now it kept all of them alive, so that no address came twice
    return sum(kept.values())


def _phases_of_data(recipe: Recipe, inputs: DataInputs, machine: Machine) -> list[Phase]:
    phases = []
    for spec in phase_specs(recipe, inputs):
        split = inputs.split(spec.split)
        check_fits(spec, inputs, recipe.cluster.workers)
        assembly = assemble(spec)
        phase = _phase(spec.phase, spec.training, machine, assembly.module)
        with contextlib.closing(assembly.batches(0, 0, machine.workers)) as batches:
            micro_batch = next(batches)[0]
        dtype = DTYPES[spec.training.resolved_precision(machine.device)]
        phase = replace(
            phase,
            activation_bytes=activation_bytes(assembly.module, micro_batch, dtype),
            data=_data(spec, split),
        )
        phases.append(phase)
    return phases


def _phases_without_data(recipe: Recipe, machine: Machine, unknown: list[str]) -> list[Phase]:
    """Tells what the recipe alone decides, with as many words and answers as it allows."""
    try:
        card = recipe.features.card()
    except FeatureError as error:
        unknown.append(f"parameters and bytes: {error}")
        return []
    given, vqa = recipe.model.tokenizer, recipe.benchmarks.vqa
    sizes = recipe.model.config(
        vocab_size=len(load_tokenizer(given)) if given else recipe.model.vocab_size,
        feature_dim=card.dim,
        num_answers=vqa.max_answers if vqa else 0,
    )
    trainings = {"pretrain": recipe.training.pretrain, "finetune": recipe.training.finetune}
    network = backbone_config(card)
    backbone = network.backbone() if network else None
    phases = []
    for name, training in trainings.items():
        if training is not None:
            with torch.device("meta"):
                module = nn.ModuleDict({"model": families.build(sizes, backbone)})
            phases.append(_phase(name, training, machine, module))
    return phases


def _phase(name: str, training: TrainingConfig, machine: Machine, module: nn.Module) -> Phase:
    freeze(module, training.optimizer.freeze)
    parameters = list(module.parameters())
    num_parameters = sum(parameter.numel() for parameter in parameters)
    num_trained = sum(p.numel() for p in parameters if p.requires_grad)
    by_stage: dict[str, int | None] = {}
    offloaded = swapped = 0
    for stage in STAGES:
        changed = training.model_copy(update={"zero_stage": stage})
        refused = stage == 0 and changed.resolved_precision(machine.device) != "fp32"
        if refused:
            by_stage[str(stage)] = None
            continue
        found = state_bytes(changed, machine.rank, num_parameters, num_trained)
        by_stage[str(stage)] = found.device
        if stage == training.zero_stage:
            offloaded, swapped = found.offloaded, found.swapped
    copies = 2 + (training.optimizer.ema_decay is not None)
    return Phase(
        name=name,
        steps=training.steps,
        samples_per_step=training.global_batch_size,
        accumulation_steps=training.accumulation_steps(machine.workers),
        zero_stage=training.zero_stage,
        precision=training.resolved_precision(machine.device),
        parameters=num_parameters,
        trained_parameters=num_trained,
        state_bytes=by_stage,
        offloaded_bytes=offloaded,
        swapped_bytes=swapped,
        checkpoint_bytes=FP32_BYTES * (num_parameters + copies * num_trained),
    )


def _data(spec: TrainingSpec, split: Split) -> Data:
    objectives = ObjectivesConfig.model_validate(spec.objectives).build()
    kinds = dict.fromkeys(objective.stream.kind for objective in objectives)
    examples = {str(kind): split.num_texts(kind) for kind in kinds}
    taken = spec.training.steps * spec.training.global_batch_size
    return Data(
        samples=split.num_samples,
        shards=split.num_shards,
        examples=examples,
        epochs={kind: round(taken / number, 2) for kind, number in examples.items()},
    )


def _timed(
    recipe: Recipe, inputs: DataInputs, phases: list[Phase], console: Console
) -> list[Phase]:
    """Trains a few steps of every phase, just as the run will, in a folder that is removed."""
    folder = storage.join(recipe.run, FOLDER)
    steps = WARM_UP_STEPS + TIMED_STEPS
    changes = {
        "steps": steps,
        "schedule": ScheduleConfig(),
        "log_every_steps": 1,
        "checkpoints": CheckpointsConfig(every_steps=steps),
        "evaluation": EvaluationConfig(),
    }
    specs = [
        spec.model_copy(
            update={
                "folder": storage.absolute(storage.join(folder, spec.phase)),
                "training": spec.training.model_copy(update=changes),
            }
        )
        for spec in phase_specs(recipe, inputs)
    ]
    lines: dict[str, list[dict[str, Any]]] = {spec.phase: [] for spec in specs}
    storage.remove(folder)
    try:
        with StageProgress(console, "check") as progress:

            def follow(line: dict[str, Any]) -> None:
                lines[line["phase"]].append(line)
                if "loss" in line:
                    progress.update(line["step"], steps, phase=f"check {line['phase']}")

            results = launch_all(specs, recipe.cluster, follow)
    finally:
        storage.remove(folder)
    if any(result.state == "stopped" for result in results):
        raise StoppedError("the check was told to stop; it leaves nothing behind")
    return [replace(phase, measured=_measured(lines[phase.name])) for phase in phases]


def _measured(lines: list[dict[str, Any]]) -> Measured:
    logged = [line for line in lines if "loss" in line]
    times = [line["time"] for line in logged[WARM_UP_STEPS - 1 :]]
    counted = logged[WARM_UP_STEPS:]
    rate = statistics.fmean(line["samples_per_second"] for line in counted)
    return Measured(
        seconds_per_step=statistics.median(
            after - before for before, after in itertools.pairwise(times)
        ),
        data_wait_fraction=statistics.fmean(line["data_wait_fraction"] for line in counted),
        tokens_per_sample=statistics.fmean(line["tokens_per_second"] for line in counted) / rate,
        checkpoint_seconds=max(
            line["seconds_written"] for line in lines if line.get("event") == "checkpoint"
        ),
    )


def _machine(cluster: ClusterConfig) -> Machine:
    """Returns what a rank has; raises ConfigError if GPUs are wanted here that are not here."""
    wanted = cluster.workers * cluster.gpus_per_worker
    if cluster.address is not None:
        what = "GPUs" if wanted else "machines"
        name = f"the {what} at {cluster.address}"
        return Machine("cuda" if wanted else "cpu", name, None, cluster.workers)
    if not wanted:
        return Machine("cpu", "this machine", host_bytes() // cluster.workers, cluster.workers)
    here = torch.cuda.device_count()
    if wanted > here:
        raise ConfigError(
            f"cluster.gpus_per_worker: {cluster.workers} workers want {wanted} GPUs, and this "
            f"machine has {here}; use 0 or fewer workers, or give the address of a cluster"
        )
    found = torch.cuda.get_device_properties(0)
    return Machine("cuda", found.name, found.total_memory, cluster.workers)


def host_bytes() -> int:
    """Returns this machine's memory, or what its container may use of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return whole if allowed == "max" else min(whole, int(allowed))


def _lacking(cluster: ClusterConfig) -> str:
    """Says what ranks need and a cluster has not, so that a start would wait; or nothing."""
    if cluster.address is None:
        return ""
    needed = {
        "CPU": cluster.workers * cluster.cpus_per_worker,
        "GPU": cluster.workers * cluster.gpus_per_worker,
    }
    found = resources(cluster)
    short = [
        f"{number} {name}s are wanted and {found.get(name, 0):g} are there"
        for name, number in needed.items()
        if found.get(name, 0) < number
    ]
    if not short:
        return ""
    return f"{cluster.address}: {' and '.join(short)}; a run would wait for more nodes"


def _require_memory(machine: Machine, phase: Phase) -> None:
    """Refuses what the device cannot hold, naming the first stage that it can."""
    needed = phase.bytes_at(phase.zero_stage)
    if machine.bytes_per_rank is None or needed is None or needed <= machine.bytes_per_rank:
        return
    sizes = {stage: phase.bytes_at(stage) for stage in STAGES}
    fitting = [
        stage
        for stage, size in sizes.items()
        if stage > phase.zero_stage and size is not None and size <= machine.bytes_per_rank
    ]
    state = phase.state_bytes[str(phase.zero_stage)] or 0
    if fitting:
        advice = f"zero_stage={fitting[0]} fits"
    elif state < machine.bytes_per_rank:
        advice = "a smaller micro_batch_size fits"
    else:
        advice = (
            "use more workers with zero_stage=3, a smaller model, or "
            "deepspeed.zero_optimization.offload_optimizer"
        )
    raise ConfigError(
        f"training.{phase.name}: a rank would hold {needed / GB:.1f} GB with "
        f"zero_stage={phase.zero_stage}, and {machine.name} has "
        f"{machine.bytes_per_rank / GB:.1f} GB for each of {machine.workers}; {advice}"
    )


def _require_disk(recipe: Recipe, phases: list[Phase]) -> None:
    """Refuses a run whose checkpoints would fill the disk."""
    if not storage.is_local(recipe.run):
        return
    folder = storage.local_path(recipe.run).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = 0
    for phase in phases:
        training = (
            recipe.training.pretrain if phase.name == "pretrain" else recipe.training.finetune
        )
        assert training is not None
        # one more is written before the oldest is removed; the model folder is fp32
        kept = training.checkpoints.keep_last + training.checkpoints.keep_best + 1
        needed += kept * phase.checkpoint_bytes + FP32_BYTES * phase.parameters
    if needed > free:
        raise ConfigError(
            f"run: its checkpoints and models take up to {needed / GB:.1f} GB, and {folder} has "
            f"{free / GB:.1f} GB left; use another folder, or a smaller checkpoints.keep_last"
        )


def _advice(recipe: Recipe, machine: Machine, phase: Phase) -> Iterator[str]:
    cheaper = [
        stage
        for stage in STAGES
        if 1 <= stage < phase.zero_stage
        and machine.bytes_per_rank is not None
        and (phase.bytes_at(stage) or 0) < 0.8 * machine.bytes_per_rank
    ]
    if cheaper and not phase.offloaded_bytes:
        yield (
            f"{phase.name}: zero_stage={cheaper[0]} fits too, and its ranks have less to say to "
            "each other"
        )
    if phase.data is not None:
        for kind, epochs in phase.data.epochs.items():
            if epochs < 1:
                yield f"{phase.name}: it ends before it has seen all {kind} ({epochs:.0%} of them)"
    if phase.measured is not None and phase.measured.data_wait_fraction > WAIT_WORTH_TELLING:
        yield (
            f"{phase.name}: ranks wait for data {phase.measured.data_wait_fraction:.0%} of the "
            "time; raise loading.threads and loading.prefetch_steps, or give each more "
            "cpus_per_worker"
        )
    cpus = os.cpu_count() or 1
    wanted = recipe.cluster.workers * recipe.cluster.cpus_per_worker
    if recipe.cluster.address is None and wanted > cpus:
        yield f"{phase.name}: {wanted} CPUs are wanted and {cpus} are here; ranks take turns"
