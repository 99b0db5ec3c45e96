"""Micro-batches of a step to the same on the device, there before the step before it has ended."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.models.tensors import mapped
from pipeline.training.assembly import MicroBatch
from pipeline.training.prefetch import Prefetch

_STEPS_ON_DEVICE = 1  # beside the one that trains and the one that is being copied


@dataclass(frozen=True)
class StepBatches:
    """What a rank trains on in one step."""

    on_host: Sequence[MicroBatch]  # what can be counted without waiting for the device
    on_device: Sequence[Any]  # what the module's forward takes
    copied: Any | None = None  # the event after which the device has them; None: it has


class DeviceFeed:
    """Gives a rank's micro-batches, collated `depth` steps ahead in a thread.

    Where there is a GPU another thread copies those of the next step to it, from pinned memory and
    on a stream of their own, so that neither this process nor the GPU waits for the copy. Errors
    and leaving are those of `Prefetch`.
    """

    def __init__(
        self,
        source: Generator[Sequence[MicroBatch], None, None],
        depth: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._collated = Prefetch(source, depth)
        self._copied: Prefetch[StepBatches] | None = None
        if device.type == "cuda":
            self._copied = Prefetch(self._copies(), _STEPS_ON_DEVICE)

    def __enter__(self) -> Self:
        self._collated.__enter__()
        if self._copied:
            self._copied.__enter__()
        return self

    def take(self) -> StepBatches:
        """Returns the next step's, waiting for them; raises TrainingError if there are no more."""
        if self._copied is None:
            on_host = self._collated.take()
            return StepBatches(on_host, self._moved(on_host))
        step = self._copied.take()
        stream = torch.cuda.current_stream(self._device)
        assert step.copied is not None
        stream.wait_event(step.copied)  # the stream waits, not this thread
        for batch in step.on_device:
            mapped(batch, lambda tensor: _used_on(stream, tensor))
        return step

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._copied:  # the first to leave: its thread takes from the other
            self._copied.__exit__(kind, error, trace)
        self._collated.__exit__(kind, error, trace)

    def _copies(self) -> Generator[StepBatches, None, None]:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        while True:
            pinned = [mapped(batch, Tensor.pin_memory) for batch in self._collated.take()]
            with torch.cuda.stream(stream):
                on_device = self._moved(pinned)
            yield StepBatches(pinned, on_device, stream.record_event())

    def _moved(self, batches: Sequence[MicroBatch]) -> list[Any]:
        return [batch.to(self._device, self._dtype) for batch in batches]


def _used_on(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """Keeps the memory of a tensor of another stream until this one is done with it."""
    tensor.record_stream(stream)
    return tensor
