"""The training loop: the order of a step, the same on one process and on a cluster.

A step is: take the micro-batches, forward and backward each, clip, update, log. Nothing random
outlives a step: data and corruption are functions of the step, and dropout is seeded from
(seed, step, rank) when the step begins. So the step number, the run state and the tensors of a
checkpoint are all that a run is, and it goes on bit-identically on the same number of ranks.

On another number of ranks, or with other micro-batches, data, corruption, rates and, without
dropout, the loss to rounding are the same (1e-6); with dropout its draws are others, and the loss
is off by their noise (0.03 to 0.5 %), as it would be with another seed for dropout. To draw them
for each sample by itself, fused attention kernels would have to be given up, which have random
numbers of their own, and the language models of others too, whose dropout is theirs.
"""

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError, ConfigError, LostError, TrainingError
from pipeline.training.assembly import MODEL, Assembly, assemble
from pipeline.training.checkpoints import checkpoint
from pipeline.training.checkpoints.manager import CheckpointManager
from pipeline.training.checkpoints.run_state import RunState
from pipeline.training.continuation import Difference, differences, fixed
from pipeline.training.engine.engine import Engine
from pipeline.training.engine.peak import peak_flops
from pipeline.training.feed.device_feed import device_feed
from pipeline.training.feed.micro_batch import MicroBatch
from pipeline.training.lease import IsLost, only_writer
from pipeline.training.spec import Environment, TrainingResult, TrainingSpec, training_key
from pipeline.training.stop_request import StopRequest
from pipeline.training.tracking.metrics_log import MetricsLog, Stretch, last_loss

CHECKPOINTS = "checkpoints"
RESULT = "result.json"

# With another value of one of these, evaluations are no longer of the same thing.
_EVALUATED = {
    "dataset.validation_split",
    "evaluation.examples",
    "evaluation.best_by",
    "evaluation.best_is",
    "model_weights",
}


def train(
    spec: TrainingSpec,
    environment: Environment,
    assembled: Callable[[TrainingSpec], Assembly] = assemble,
) -> TrainingResult:
    """Trains to the end, or to a requested stop, from the newest checkpoint if there is one.

    Collective: every rank calls it, inside a process group. A run that was finished before is
    reported and left as it is. With settings that may change along a run, it goes on from its
    checkpoint as a new stretch: whether that is wanted is asked before (`pipeline.stages.train`).
    Raises CheckpointError if the folder holds another run, LostError if it is taken away, and
    TrainingError naming step, rank and objective if a loss is not finite and the config's policy
    for that is, or comes to, the end of the run.
    """
    finished = finished_result(spec)
    if finished is not None:
        return finished
    with contextlib.ExitStack() as stack:
        is_first = environment.rank == 0
        is_lost = stack.enter_context(only_writer(spec.folder)) if is_first else _never
        dist.barrier()  # the others touch nothing before the folder is ours
        return _Run(spec, environment, assembled, is_lost).run()


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
    if _changed(spec, reproducibility_key, spec.folder):
        return None
    return result


def _never() -> bool:
    """What ranks after the first know of the folder being lost: the first tells them."""
    return False


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns a 64-bit seed that is a function of all three."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class _StepFigures:
    """What all ranks did in one step, known to all of them."""

    loss: float
    losses: dict[str, float]
    grad_norm: float  # infinite if no update was made
    num_samples: int
    num_tokens: int
    num_tokens_with_padding: int  # tokens, regions and their padding
    flops: float  # that encoding took, forward and backward; 0 if nobody asks
    wait_seconds: float  # for data, averaged over ranks
    stop: bool
    lost: bool  # the folder is another process's by now
    written: bool  # the checkpoint under way is on every rank's disk
    fault: str | None  # the figure that is not finite, and on which rank


class _Run:
    engine: Engine
    run_state: RunState
    ranks_before: int | None = None  # those that wrote the checkpoint it goes on from

    def __init__(
        self,
        spec: TrainingSpec,
        environment: Environment,
        assembled: Callable[[TrainingSpec], Assembly],
        is_lost: IsLost,
    ) -> None:
        self.spec = spec
        self.config = spec.training
        self.environment = environment
        self.is_first = environment.rank == 0
        self.is_lost = is_lost
        self.stop = StopRequest(spec.folder)
        self.assembled = assembled
        self.assembly = assembled(spec)
        self.evaluate = self.assembly.evaluate
        self.device_flops = self._device_flops()
        self.log: MetricsLog | None = None  # rank 0's
        self.changed: tuple[Difference, ...] = ()  # since the checkpoint that is gone on from
        self.checkpoints = storage.join(spec.folder, CHECKPOINTS)
        writer = checkpoint.Writer(
            reproducibility_key=spec.reproducibility_key(),
            zero_stage=self.config.zero_stage,
            precision=self.config.resolved_precision(environment.device),
        )
        self.manager = CheckpointManager(self.checkpoints, self.config, writer, self._event)

    def run(self) -> TrainingResult:
        config = self.config
        if config.evaluation.every_steps is not None and self.evaluate is None:
            raise ConfigError("training.evaluation.every_steps: this run has no held-out data")
        with contextlib.ExitStack() as stack:
            if self.is_first:
                checkpoint.remove_leftovers(self.checkpoints)
            damaged: list[str] = []
            start = self._start(damaged.append)
            stack.callback(self._close_engine)
            if self.is_first:
                log = MetricsLog(self.spec.folder, start, self._stretch(start))
                self.log = stack.enter_context(log)
            self._tell_start(start, damaged)
            if self.is_first:
                self.manager.adopt_existing(start)
            stack.callback(self.manager.wait)
            step, stopped = self._steps(start)
            self.manager.finish()
            if stopped:
                self._event("stopped", step=step)
                loss = last_loss(self.spec.folder) if self.is_first else math.nan
                return TrainingResult("stopped", step, config.steps, loss, None)
            return self._finish(step)

    def _close_engine(self) -> None:
        self.engine.close()  # the run's last: a roll-back makes another

    def _event(self, event: str, **facts: Any) -> None:
        if self.log:
            self.log.event(event, **facts)

    def _start(self, damaged: Callable[[str], None], given_up: int | None = None) -> int:
        """Builds the engine from the newest whole checkpoint, or anew if there is none.

        Returns the checkpoint's step. Training goes on from there or, after a roll-back, from the
        step `given_up`, without the updates between. Raises CheckpointError on every rank if there
        are checkpoints and none is whole.
        """
        with tempfile.TemporaryDirectory(prefix="sightline-") as folder:
            cache = Path(folder)
            told: list[Any] = [0, None]  # the step, or why there is none
            if self.is_first:
                try:
                    newest = checkpoint.newest(self.checkpoints, cache, damaged)
                    told[0] = newest.step if newest else 0
                except CheckpointError as error:
                    told[1] = str(error)
            dist.broadcast_object_list(told)
            found = int(told[0])
            if told[1] is not None:
                raise CheckpointError(told[1])
            if not found:
                self._build(0, given_up, RunState(), None)
            else:
                location = storage.join(self.checkpoints, checkpoint.name_of(found))
                manifest = checkpoint.read_manifest(location)
                self.changed = _changed(self.spec, manifest.reproducibility_key, location)
                run_state = manifest.run_state
                if self.changed:
                    prefix = f"{training_key(self.spec.phase)}."
                    names = {one.key.removeprefix(prefix) for one in self.changed}
                    run_state = run_state.in_new_stretch(not names & _EVALUATED)
                read = checkpoint.reader(location, manifest, cache)
                self._build(manifest.step, given_up, run_state, read)
                self.ranks_before = manifest.world_size
        return found

    def _stretch(self, start: int) -> Stretch | None:
        """Returns what begins at a checkpoint that was made with other settings."""
        if not self.changed:
            return None
        changed = {one.key: (one.then, one.now) for one in self.changed}
        return Stretch(start, changed, self.spec.dataset_version, time.time())

    def _build(
        self, at: int, given_up: int | None, run_state: RunState, read: checkpoint.ReadTensor | None
    ) -> None:
        step = at if given_up is None else given_up
        self.run_state = replace(run_state, skipped=run_state.skipped + step - at)
        self.engine = Engine(
            self.assembly.module,
            self.config,
            self.environment,
            step,
            read,
            skipped=self.run_state.skipped,
            loss_scale=run_state.loss_scale,
        )

    def _steps(self, start: int) -> tuple[int, bool]:
        """Trains from `start` on; returns the last step, and whether a stop was requested."""
        config, environment = self.config, self.environment
        source = self.assembly.batches(start, environment.rank, environment.world_size)
        meter = _Meter(self.device_flops and self.device_flops * environment.world_size)
        step = start
        device, dtype = self.engine.device, self.engine.dtype
        with device_feed(source, config.loading.prefetch_steps, device, dtype) as take:
            while step < config.steps and not self.run_state.is_patience_spent(config):
                step += 1
                began = time.perf_counter()
                batches = take()
                wait_seconds = time.perf_counter() - began
                torch.manual_seed(step_seed(self.spec.seed, step, environment.rank))
                engine = self.engine
                rate = engine.learning_rate()
                shares = self._shares(batches.on_host)
                losses, norm = engine.advance(batches.on_device, shares)
                figures = self._gather(batches.on_host, shares, losses, norm, wait_seconds)
                if figures.lost:
                    raise LostError(
                        f"{self.spec.folder}: taken over by another process, or taken away, while "
                        f"this one trained here; it ends at step {step}, and what it left is its "
                        "checkpoints"
                    )
                meter.add(figures)
                if figures.fault is not None:
                    self._not_finite(step, figures.fault)
                else:
                    self.run_state = self.run_state.after_update()
                    self._report(step, figures, rate, meter)
                if figures.written:
                    self.manager.finish()
                last = step == config.steps or self.run_state.is_patience_spent(config)
                due = step % config.checkpoints.every_steps == 0
                best = self.run_state.is_best(step) and (
                    config.evaluation.restore_best or config.checkpoints.keep_best > 0
                )
                if due or best or last or figures.stop:
                    self._save(step)
                if figures.stop and not last:
                    return step, True
        return step, False

    def _shares(self, micro_batches: Sequence[MicroBatch]) -> list[float]:
        """Returns what each counts for in the mean over ranks, so that it is that over samples.

        A rank whose share of the global batch is larger than another's counts for more than one.
        """
        world_size, whole = self.environment.world_size, self.config.global_batch_size
        share = len(self.config.share(self.environment.rank, world_size)) * world_size / whole
        counts = [batch.num_samples for batch in micro_batches]
        return [share * count / sum(counts) for count in counts]

    def _report(self, step: int, figures: _StepFigures, rate: float, meter: "_Meter") -> None:
        """Evaluates and logs a step, where it is due."""
        config = self.config
        every = config.evaluation.every_steps
        evaluates = every is not None and (step % every == 0 or step == config.steps)
        logs = step % config.log_every_steps == 0 or step == config.steps
        if not (evaluates or logs):
            return
        line = meter.line(step, figures, rate)
        line["skipped_steps"] = self.engine.skipped
        scale = self.engine.loss_scale()
        if scale is not None:
            line["loss_scale"] = scale["cur_scale"]
        if evaluates:
            began = time.perf_counter()
            found = self._evaluate()
            self.run_state = self.run_state.after_evaluation(step, found, config)
            line["evaluation"] = found
            meter.leave_out(time.perf_counter() - began)
        if self.log:
            self.log.step(line)

    def _evaluate(self) -> dict[str, float]:
        """Returns what rank 0 found, on every rank."""
        assert self.evaluate is not None
        with self.engine.evaluating(self.config.model_weights == "average") as module:
            found = [self.evaluate(module, self.environment)]
        dist.broadcast_object_list(found)
        return dict(found[0])

    def _gather(
        self,
        micro_batches: Sequence[MicroBatch],
        shares: Sequence[float],
        losses: list[tuple[Tensor, Any]],
        norm: float,
        wait_seconds: float,
    ) -> _StepFigures:
        """Tells every rank what all of them did."""
        names = sorted(losses[0][1])
        found = torch.stack(
            [torch.stack([loss, *(parts[name] for name in names)]) for loss, parts in losses]
        ).double()
        means = found.new_tensor(shares) @ found
        counts = [
            sum(batch.num_samples for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
            sum(batch.num_tokens_with_padding for batch in micro_batches),
            self._flops(micro_batches),
            wait_seconds,
            self.is_first and self.stop.is_requested(),
            self.is_lost(),
            self.manager.is_written(),
        ]
        mine = torch.cat([means, means.new_tensor(counts)])
        ranks = [torch.empty_like(mine) for _ in range(self.environment.world_size)]
        dist.all_gather(ranks, mine)
        table = torch.stack(ranks).cpu().numpy()  # (rank, figure)
        average = table.mean(axis=0)
        sums = table[:, len(names) + 1 :].sum(axis=0)
        return _StepFigures(
            loss=float(average[0]),
            losses={name: float(mean) for name, mean in zip(names, average[1:], strict=False)},
            grad_norm=norm,
            num_samples=int(sums[0]),
            num_tokens=int(sums[1]),
            num_tokens_with_padding=int(sums[2]),
            flops=float(sums[3]),
            wait_seconds=float(sums[4]) / len(table),
            stop=bool(sums[5]),
            lost=bool(sums[6]),
            written=int(sums[7]) == len(table),
            fault=self._fault(["loss", *names], table, norm),
        )

    def _device_flops(self) -> float | None:
        """Returns the best that this rank's device can do, if MFU can be told from it."""
        if self.assembly.flops is None:
            return None
        if self.spec.device_flops is not None:
            return self.spec.device_flops
        if not self.environment.device.startswith("cuda"):
            return None
        precision = self.config.resolved_precision(self.environment.device)
        return peak_flops(torch.cuda.get_device_name(self.environment.device), precision)

    def _flops(self, micro_batches: Sequence[MicroBatch]) -> float:
        if self.device_flops is None or self.assembly.flops is None:
            return 0.0
        return float(sum(map(self.assembly.flops, micro_batches)))

    def _fault(self, names: Sequence[str], table: NDArray[np.float64], norm: float) -> str | None:
        for rank, row in enumerate(table):
            for name, value in zip(names, row, strict=False):
                if not math.isfinite(value):
                    return f"rank {rank}: {name} is {value}"
        if math.isfinite(norm) or self.engine.can_lower_loss_scale():
            return None
        return f"the gradient's norm is {norm}"

    def _not_finite(self, step: int, fault: str) -> None:
        """Does what the config says about it, or raises TrainingError."""
        config = self.config
        self.run_state = self.run_state.after_skip()
        refusal = ""
        if config.not_finite == "skip":
            in_a_row = self.run_state.skips_in_a_row
            if in_a_row <= config.max_skips_in_a_row:
                self._event("skipped", step=step, reason=fault, in_a_row=in_a_row)
                return
            refusal = f", and {in_a_row - 1} steps before it were skipped"
        if config.not_finite == "roll_back":
            if self.run_state.roll_backs < config.max_roll_backs:
                self._roll_back(step, fault)
                return
            refusal = f", and the run was rolled back {self.run_state.roll_backs} times before"
        self.manager.finish()  # what came before is whole
        raise TrainingError(f"{self.spec.phase}, step {step}, {fault}{refusal}; {self._advice()}")

    def _advice(self) -> str:
        """Says what to do about a figure that is not finite, in keys of the recipe."""
        training = training_key(self.spec.phase)
        rate = f"{training}.optimizer.learning_rate={self.config.optimizer.learning_rate / 2:g}"
        others = [f"a longer {training}.schedule.warmup_steps"]
        if self.config.resolved_precision(self.environment.device) != "fp32":
            others.append(f"{training}.precision=fp32")
        steps = checkpoint.steps_in(self.checkpoints)
        where = (
            f"it goes on from the checkpoint at step {steps[-1]}"
            if steps
            else "there is no checkpoint yet, so it starts anew"
        )
        return (
            f"give the same command with `{rate}` (or {', or '.join(others)}) and "
            f"`--from-checkpoint`: {where}"
        )

    def _roll_back(self, step: int, fault: str) -> None:
        """Returns to the last checkpoint; the batches since, up to this step's, are left out.

        So did PaLM after a spike of its loss (arXiv:2204.02311, 5.1): the batches harm only
        together with the weights that met them, so going back alone would meet them again.
        """
        self.manager.finish()
        times = self.run_state.roll_backs + 1
        self.engine.close()
        self.assembly = replace(self.assembly, module=self.assembled(self.spec).module)
        damaged: list[str] = []
        to_step = self._start(damaged.append, given_up=step)
        self.run_state = replace(self.run_state, roll_backs=times)
        for reason in damaged:
            self._event("damaged-checkpoint", reason=reason)
        self._event("rolled-back", step=step, reason=fault, to_step=to_step, times=times)

    def _save(self, step: int) -> None:
        if self.log:
            self.log.flush()
        self.run_state = replace(
            self.run_state, skipped=self.engine.skipped, loss_scale=self.engine.loss_scale()
        )
        self.manager.save(step, self.engine.states(), self.run_state)

    def _finish(self, step: int) -> TrainingResult:
        """Writes the model folder and, last, the file that says the run is complete."""
        chosen = self._chosen(step)
        weights = self._weights(chosen, step)
        if self.is_first:
            loss, steps = last_loss(self.spec.folder), self.config.steps
            if not math.isfinite(loss):
                raise TrainingError(
                    f"{self.spec.folder}: metrics.jsonl has no finite loss of any step, so this is "
                    "no finished run; was it removed, or was every step skipped?"
                )
            self.assembly.save(weights, chosen)
            figures = self.run_state.evaluation.items()
            finite = {name: value for name, value in figures if math.isfinite(value)}
            document = {
                "reproducibility_key": self.spec.reproducibility_key(),
                "result": {"state": "finished", "step": step, "steps": steps, "loss": loss},
                "run_state": asdict(self.run_state) | {"evaluation": finite},
            }
            payload = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode()
            storage.write_bytes(storage.join(self.spec.folder, RESULT), payload)
            self._event("finished", step=step, best_step=self.run_state.best_step)
        dist.barrier()
        finished = finished_result(self.spec)
        assert finished is not None
        return replace(finished, already_finished=False)

    def _chosen(self, step: int) -> int:
        """Returns the step whose weights the model folder gets."""
        best = self.run_state.best_step
        return best if self.config.evaluation.restore_best and best is not None else step

    def _weights(self, chosen: int, step: int) -> dict[str, Tensor]:
        """Returns the weights of a step on rank 0, as the config wants them; `step` is the last."""
        ema = self.config.model_weights == "average"
        if chosen == step:
            return self.engine.weights(ema)
        if not self.is_first:
            return {}
        location = storage.join(self.checkpoints, checkpoint.name_of(chosen))
        with tempfile.TemporaryDirectory(prefix="sightline-") as cache:
            try:
                manifest = checkpoint.verify(location, Path(cache))
            except CheckpointError as error:
                training = training_key(self.spec.phase)
                raise CheckpointError(
                    f"{error}\nIt has the weights of the best evaluation, which the model is to "
                    "have. Put an undamaged copy of it back; or give the same command with "
                    f"`{training}.evaluation.restore_best=false` and `--from-checkpoint`, for "
                    "a model of the last step's weights"
                ) from error
            read = checkpoint.reader(location, manifest, Path(cache))
            return checkpoint.weights(manifest, read, ema)

    def _tell_start(self, start: int, damaged: list[str]) -> None:
        for reason in damaged:
            self._event("damaged-checkpoint", reason=reason)
        if self.assembly.initial and not start:
            self._event("initialised", **self.assembly.initial)
        self._event(
            "resumed" if start else "started",
            step=start,
            steps=self.config.steps,
            world_size=self.environment.world_size,
            device=self.environment.device,
            engine=self.engine.config,
        )
        before, now = self.ranks_before, self.environment.world_size
        if before not in (None, now):
            self._event(
                "ranks-changed",
                step=start,
                before=before,
                now=now,
                reason=(
                    f"{before} ranks before, {now} now: data, masking and learning rate go on as "
                    "they were; dropout is drawn anew, so that the loss differs from an unbroken "
                    "run's by its noise (without dropout, by rounding)"
                ),
            )


class _Meter:
    """Adds up steps until a line is logged."""

    def __init__(self, peak_flops: float | None) -> None:
        """`peak_flops` are what all ranks' devices together can make in a second, if known."""
        self._peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._flops = 0.0
        self._num_samples = 0
        self._num_tokens = 0
        self._wait_seconds = 0.0

    def add(self, figures: _StepFigures) -> None:
        self._num_samples += figures.num_samples
        self._num_tokens += figures.num_tokens
        self._flops += figures.flops
        self._wait_seconds += figures.wait_seconds

    def leave_out(self, seconds: float) -> None:
        """Takes out of the next line's rates what was not training."""
        self._began += seconds

    def line(self, step: int, figures: _StepFigures, rate: float) -> dict[str, Any]:
        """Returns the line of a step: its own losses, and rates since the last line."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        line = {
            "step": step,
            "loss": figures.loss,
            "losses": figures.losses,
            "lr": rate,
            # none if fp16's loss scale was too high
            "grad_norm": figures.grad_norm if math.isfinite(figures.grad_norm) else None,
            "padding_fraction": 1 - figures.num_tokens / max(figures.num_tokens_with_padding, 1),
            "samples_per_second": round(self._num_samples / seconds, 3),
            "tokens_per_second": round(self._num_tokens / seconds, 3),
            "data_wait_fraction": round(self._wait_seconds / seconds, 4),
            "time": time.time(),
        }
        if self._peak_flops is not None:
            line["mfu"] = round(self._flops / seconds / self._peak_flops, 4)
        self._reset()
        return line


def _changed(
    spec: TrainingSpec, reproducibility_key: dict[str, Any], where: str
) -> tuple[Difference, ...]:
    """Returns the settings that are not those recorded; CheckpointError if it is another run's."""
    found = differences(reproducibility_key, spec.reproducibility_key(), spec.phase)
    others = fixed(found)
    if others:
        raise CheckpointError(
            f"{where} belongs to another run; it differs in {'; '.join(map(str, others))}. "
            "Choose another folder, or move this one away"
        )
    return found
