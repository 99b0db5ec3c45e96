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
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline import storage
from pipeline.errors import CheckpointError, ConfigError, LostError, TrainingError
from pipeline.training import non_finite
from pipeline.training.assembly import Assembly, assemble
from pipeline.training.checkpoints import checkpoint
from pipeline.training.checkpoints.manager import CheckpointManager
from pipeline.training.checkpoints.run_state import RunState
from pipeline.training.continuation import Difference, changed
from pipeline.training.engine.engine import Engine
from pipeline.training.engine.peak import peak_flops
from pipeline.training.feed.device_feed import device_feed
from pipeline.training.feed.micro_batch import MicroBatch
from pipeline.training.lease import IsLost, only_writer
from pipeline.training.result import finished_result, write_result
from pipeline.training.spec import RankContext, TrainingResult, TrainingSpec, training_key
from pipeline.training.stop_request import StopRequest
from pipeline.training.tracking.meter import Meter
from pipeline.training.tracking.metrics_log import MetricsLog, Stretch, last_loss
from pipeline.training.tracking.step_figures import RankFigures, StepFigures, gather

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
    rank_context: RankContext,
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
        is_first = rank_context.rank == 0
        is_lost = stack.enter_context(only_writer(spec.folder)) if is_first else _never
        dist.barrier()  # the others touch nothing before the folder is ours
        return _Run(spec, rank_context, assembled, is_lost).run()


def _never() -> bool:
    """What ranks after the first know of the folder being lost: the first tells them."""
    return False


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns a 64-bit seed that is a function of all three."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


class _Run:
    engine: Engine
    run_state: RunState
    ranks_before: int | None = None  # those that wrote the checkpoint it goes on from

    def __init__(
        self,
        spec: TrainingSpec,
        rank_context: RankContext,
        assembled: Callable[[TrainingSpec], Assembly],
        is_lost: IsLost,
    ) -> None:
        self.spec = spec
        self.config = spec.training
        self.rank_context = rank_context
        self.is_first = rank_context.rank == 0
        self.is_lost = is_lost
        self.stop = StopRequest(spec.folder)
        self.assembled = assembled
        self.assembly = assembled(spec)
        self.evaluate = self.assembly.evaluate
        self.device_flops = self._device_flops()
        self.log: MetricsLog | None = None  # rank 0's
        self.changed: tuple[Difference, ...] = ()  # since the checkpoint that is gone on from
        self.checkpoints = storage.join(spec.folder, checkpoint.CHECKPOINTS)
        writer = checkpoint.Writer(
            reproducibility_key=spec.reproducibility_key(),
            zero_stage=self.config.zero_stage,
            precision=self.config.resolved_precision(rank_context.device),
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
            result = write_result(
                self.spec, self.rank_context, self.assembly, self.engine, self.run_state, step
            )
            self._event("finished", step=step, best_step=self.run_state.best_step)
            return result

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
                self.changed = changed(self.spec, manifest.reproducibility_key, location)
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
            self.rank_context,
            step,
            read,
            skipped=self.run_state.skipped,
            loss_scale=run_state.loss_scale,
        )

    def _steps(self, start: int) -> tuple[int, bool]:
        """Trains from `start` on; returns the last step, and whether a stop was requested."""
        config, rank_context = self.config, self.rank_context
        source = self.assembly.batches(start, rank_context.rank, rank_context.world_size)
        meter = Meter(self.device_flops and self.device_flops * rank_context.world_size)
        step = start
        device, dtype = self.engine.device, self.engine.dtype
        with device_feed(source, config.loading.prefetch_steps, device, dtype) as take:
            while step < config.steps and not self.run_state.is_patience_spent(config):
                step += 1
                began = time.perf_counter()
                batches = take()
                wait_seconds = time.perf_counter() - began
                torch.manual_seed(step_seed(self.spec.seed, step, rank_context.rank))
                engine = self.engine
                rate = engine.learning_rate()
                shares = self._shares(batches.on_host)
                losses, norm = engine.advance(batches.on_device, shares)
                mine = RankFigures.of(
                    batches.on_host,
                    flops=self._flops(batches.on_host),
                    wait_seconds=wait_seconds,
                    stop=self.is_first and self.stop.is_requested(),
                    lost=self.is_lost(),
                    written=self.manager.is_written(),
                )
                figures = gather(losses, shares, norm, mine, engine.can_lower_loss_scale())
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
        world_size, whole = self.rank_context.world_size, self.config.global_batch_size
        share = len(self.config.share(self.rank_context.rank, world_size)) * world_size / whole
        counts = [batch.num_samples for batch in micro_batches]
        return [share * count / sum(counts) for count in counts]

    def _report(self, step: int, figures: StepFigures, rate: float, meter: Meter) -> None:
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
            found = [self.evaluate(module, self.rank_context)]
        dist.broadcast_object_list(found)
        return dict(found[0])

    def _device_flops(self) -> float | None:
        """Returns the best that this rank's device can do, if MFU can be told from it."""
        if self.assembly.flops is None:
            return None
        if self.spec.device_flops is not None:
            return self.spec.device_flops
        if not self.rank_context.device.startswith("cuda"):
            return None
        precision = self.config.resolved_precision(self.rank_context.device)
        return peak_flops(torch.cuda.get_device_name(self.rank_context.device), precision)

    def _flops(self, micro_batches: Sequence[MicroBatch]) -> float:
        if self.device_flops is None or self.assembly.flops is None:
            return 0.0
        return float(sum(map(self.assembly.flops, micro_batches)))

    def _not_finite(self, step: int, fault: str) -> None:
        """Does what the config says about it, or raises TrainingError."""
        self.run_state = self.run_state.after_skip()
        reaction = non_finite.reaction(self.config, self.run_state)
        if reaction.action == "skip":
            in_a_row = self.run_state.skips_in_a_row
            self._event("skipped", step=step, reason=fault, in_a_row=in_a_row)
        elif reaction.action == "roll_back":
            self._roll_back(step, fault)
        else:
            self.manager.finish()  # what came before is whole
            steps = checkpoint.steps_in(self.checkpoints)
            advice = non_finite.advice(self.spec, self.rank_context.device, steps)
            raise TrainingError(
                f"{self.spec.phase}, step {step}, {fault}{reaction.because}; {advice}"
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

    def _tell_start(self, start: int, damaged: list[str]) -> None:
        for reason in damaged:
            self._event("damaged-checkpoint", reason=reason)
        if self.assembly.initial and not start:
            self._event("initialised", **self.assembly.initial)
        self._event(
            "resumed" if start else "started",
            step=start,
            steps=self.config.steps,
            world_size=self.rank_context.world_size,
            device=self.rank_context.device,
            engine=self.engine.config,
        )
        before, now = self.ranks_before, self.rank_context.world_size
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
