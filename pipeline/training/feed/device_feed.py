"""The feed of micro-batches to a device, there before the step before them has ended."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.look_ahead import run_ahead
from pipeline.models.tensors import mapped
from pipeline.training.feed.micro_batch import MicroBatch

_STEPS_ON_DEVICE = 2  # beside the one that trains; the second is being copied

Collated = Generator[Sequence[MicroBatch], None, None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class StepBatches:
    """What a rank trains on in one step."""

    on_host: Sequence[MicroBatch]  # what can be counted without waiting for the device
    on_device: Sequence[Any]  # what the module's forward takes


@contextlib.contextmanager
def device_feed(
    source: Generator[Sequence[MicroBatch], None, None],
    depth: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Callable[[], StepBatches]]:
    """Yields what gives a rank's next step, waiting for it.

    `depth` steps are collated ahead, and one more is being collated. Where there is a GPU another
    thread copies those of the next step to it, from pinned memory and on a stream of their own, so
    that neither this process nor the GPU waits for the copy. An error of the source is raised at
    its step, and TrainingError where there is none left. Leaving the block closes the source.
    """
    with contextlib.closing(run_ahead(source, depth + 1)) as collated:
        if device.type != "cuda":
            yield lambda: _moved(_next(collated), device, dtype)
            return
        copies = _copies(collated, device, dtype)
        with contextlib.closing(run_ahead(copies, _STEPS_ON_DEVICE)) as copied:
            yield lambda: _awaited(*_next(copied), device)


def _next(items: Iterator[Item]) -> Item:
    try:
        return next(items)
    except StopIteration:
        raise TrainingError("the data ended before the last step") from None


def _moved(on_host: Sequence[MicroBatch], device: torch.device, dtype: torch.dtype) -> StepBatches:
    return StepBatches(on_host, [batch.to(device, dtype) for batch in on_host])


def _copies(
    collated: Collated, device: torch.device, dtype: torch.dtype
) -> Generator[tuple[StepBatches, torch.cuda.Event], None, None]:
    """Yields each step with the event after which the device has it."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for on_host in collated:
        pinned = [mapped(batch, Tensor.pin_memory) for batch in on_host]
        with torch.cuda.stream(stream):
            step = _moved(pinned, device, dtype)
        yield step, stream.record_event()


def _awaited(step: StepBatches, copied: torch.cuda.Event, device: torch.device) -> StepBatches:
    """Lets the stream that trains, not this thread, wait for a copy; returns the step."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)

    def used(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)  # its memory is another stream's, and kept until this is done
        return tensor

    for batch in step.on_device:
        mapped(batch, used)
    return step
