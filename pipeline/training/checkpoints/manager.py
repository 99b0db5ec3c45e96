"""The checkpoints that a run keeps: one is written at a time, beside training."""

import time
from collections.abc import Callable, Iterator

import torch.distributed
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError
from pipeline.training.checkpoints import checkpoint
from pipeline.training.checkpoints.retention import Published, expired
from pipeline.training.checkpoints.run_state import RunState
from pipeline.training.config import TrainingConfig

OnEvent = Callable[..., None]


class CheckpointManager:
    """The writer of a run's checkpoints, which removes those that the config retains no longer.

    `save` and `finish` are collective: every rank calls them at the same step. Both raise
    CheckpointError on every rank if a part of the checkpoint under way could not be written.
    """

    def __init__(
        self, folder: str, config: TrainingConfig, writer: checkpoint.Writer, on_event: OnEvent
    ) -> None:
        """`on_event` is told, on rank 0, of each checkpoint and of the seconds it took."""
        self._folder = folder
        self._config = config
        self._writer = writer
        self._on_event = on_event
        self._saving: checkpoint.Saving | None = None
        self._published: dict[int, Published] = {}

    def adopt_existing(self, step: int) -> None:
        """Adopts the checkpoints up to `step`, where training goes on: rank 0 calls it.

        Later ones are damaged; the run will come to replace them. A damaged earlier one is told of
        and left as it is: nobody can go on from it, and what it was may still be found out.
        """
        for found in checkpoint.steps_in(self._folder):
            if found > step:
                break
            try:
                manifest = checkpoint.read_manifest(self._location(found))
            except CheckpointError as error:
                self._on_event("damaged-checkpoint", step=found, reason=str(error))
            else:
                self._add(found, manifest.written, manifest.run_state)

    def save(self, step: int, states: Iterator[tuple[str, Tensor]], run_state: RunState) -> None:
        """Returns once the state is copied; the one before it is published by then."""
        began = time.perf_counter()
        self.finish()
        self._saving = checkpoint.Saving(self._folder, step, states, run_state, self._writer)
        self._seconds_waited = time.perf_counter() - began

    def is_written(self) -> bool:
        """Whether this rank's part of a checkpoint waits for nothing but `finish`."""
        return self._saving is not None and self._saving.is_written()

    def finish(self) -> None:
        """Publishes the checkpoint that is under way, if there is one, once it is written."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        began = time.perf_counter()
        saving.finish()
        if torch.distributed.get_rank() != 0:
            return
        self._add(saving.step, saving.written, saving.run_state)
        for step in expired(self._published.values(), self._config):
            storage.remove(self._location(step))
            del self._published[step]
        self._on_event(
            "checkpoint",
            step=saving.step,
            seconds_waited=round(self._seconds_waited + time.perf_counter() - began, 3),
            seconds_written=round(saving.seconds_writing, 3),
        )

    def wait(self) -> None:
        """Leaves no thread writing, however the run ended; the next may begin at once.

        Not collective: what is under way stays unpublished.
        """
        if self._saving is not None:
            self._saving.wait()

    def _location(self, step: int) -> str:
        return storage.join(self._folder, checkpoint.name_of(step))

    def _add(self, step: int, written: float, run_state: RunState) -> None:
        self._published[step] = Published(
            step, written, run_state.evaluation.get(self._config.evaluation.best_by)
        )
