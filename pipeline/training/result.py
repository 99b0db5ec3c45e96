"""The result of a run: its model folder, and the file that says it is complete."""

import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError, TrainingError
from pipeline.training.assembly import MODEL, Assembly
from pipeline.training.checkpoints import checkpoint
from pipeline.training.checkpoints.run_state import RunState
from pipeline.training.continuation import changed
from pipeline.training.engine.engine import Engine
from pipeline.training.spec import RankContext, TrainingResult, TrainingSpec, training_key
from pipeline.training.tracking.metrics_log import last_loss

RESULT = "result.json"


def finished_result(spec: TrainingSpec) -> TrainingResult | None:
    """Returns how a run ended, if it has with these settings and its model is there.

    Raises CheckpointError if another run is there, or the file that tells is damaged.
    """
    where, model_folder = (storage.join(spec.folder, name) for name in (RESULT, MODEL))
    if not (storage.exists(where) and storage.exists(model_folder)):
        return None
    try:
        document = json.loads(storage.read_bytes(where))
        name = "sequence" if "sequence" in document else "reproducibility_key"  # it was the former
        reproducibility_key = dict(document[name])
        result = TrainingResult(
            **document["result"], model_folder=model_folder, already_finished=True
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{where}: damaged: {error}; remove it, and the run ends anew from its last checkpoint"
        ) from error
    if changed(spec, reproducibility_key, spec.folder):
        return None
    return result


def write_result(
    spec: TrainingSpec,
    rank_context: RankContext,
    assembly: Assembly,
    engine: Engine,
    run_state: RunState,
    step: int,
) -> TrainingResult:
    """Writes the model folder and, last, the file that says the run is complete: collective.

    `step` is the last. Raises TrainingError if no step was logged whose loss is finite, and
    CheckpointError if the checkpoint is damaged whose weights the model is to have.
    """
    best = run_state.best_step
    chosen = best if spec.training.evaluation.restore_best and best is not None else step
    ema = spec.training.model_weights == "average"
    is_first = rank_context.rank == 0
    if chosen == step:
        weights = engine.weights(ema)
    else:
        weights = _earlier_weights(spec, chosen, ema) if is_first else {}
    if is_first:
        loss, steps = last_loss(spec.folder), spec.training.steps
        if not math.isfinite(loss):
            raise TrainingError(
                f"{spec.folder}: metrics.jsonl has no finite loss of any step, so this is "
                "no finished run; was it removed, or was every step skipped?"
            )
        assembly.save(weights, chosen)
        figures = run_state.evaluation.items()
        finite = {name: value for name, value in figures if math.isfinite(value)}
        document = {
            "reproducibility_key": spec.reproducibility_key(),
            "result": {"state": "finished", "step": step, "steps": steps, "loss": loss},
            "run_state": asdict(run_state) | {"evaluation": finite},
        }
        payload = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode()
        storage.write_bytes(storage.join(spec.folder, RESULT), payload)
    dist.barrier()
    finished = finished_result(spec)
    assert finished is not None
    return replace(finished, already_finished=False)


def _earlier_weights(spec: TrainingSpec, step: int, ema: bool) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint."""
    location = storage.join(spec.folder, checkpoint.CHECKPOINTS, checkpoint.name_of(step))
    with tempfile.TemporaryDirectory(prefix="sightline-") as cache:
        try:
            manifest = checkpoint.verify(location, Path(cache))
        except CheckpointError as error:
            training = training_key(spec.phase)
            raise CheckpointError(
                f"{error}\nIt has the weights of the best evaluation, which the model is to "
                "have. Put an undamaged copy of it back; or give the same command with "
                f"`{training}.evaluation.restore_best=false` and `--from-checkpoint`, for "
                "a model of the last step's weights"
            ) from error
        read = checkpoint.reader(location, manifest, Path(cache))
        return checkpoint.weights(manifest, read, ema)
