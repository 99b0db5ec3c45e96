import contextlib
import threading
from collections.abc import Callable, Generator, Sequence

import pytest
import torch

from pipeline.errors import TrainingError
from pipeline.training.feed.device_feed import StepBatches, device_feed
from tests.training.stand_in import StandInBatch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    ),
]


def steps(count: int) -> Generator[Sequence[StandInBatch], None, None]:
    """Steps of two micro-batches, large enough for a copy to take its time."""
    for step in range(count):
        yield [
            StandInBatch(torch.full((4, 100_000), step + half), torch.tensor(float(step)), 4, 4, 4)
            for half in (0.0, 0.5)
        ]


def feed_of(
    source: Generator[Sequence[StandInBatch], None, None], device: str
) -> contextlib.AbstractContextManager[Callable[[], StepBatches]]:
    return device_feed(source, 2, torch.device(device), torch.float16)


@pytest.mark.parametrize("device", DEVICES)
def test_each_step_is_given_as_it_was_made_and_on_the_device(device: str) -> None:
    before = threading.active_count()
    with feed_of(steps(6), device) as take:
        for step in range(6):
            batches = take()
            for half, on_host, on_device in zip(
                (0.0, 0.5), batches.on_host, batches.on_device, strict=True
            ):
                assert on_host.num_samples == 4
                assert on_device.features.device.type == device
                assert on_device.features.dtype == torch.float16
                # sums on the training stream, while the next step is being copied
                assert float(on_device.features.float().mean()) == step + half
                assert float(on_device.targets) == step
        with pytest.raises(TrainingError, match="the data ended before the last step"):
            take()
    assert threading.active_count() == before


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_data_is_raised_at_its_step(device: str) -> None:
    def failing() -> Generator[Sequence[StandInBatch], None, None]:
        yield from steps(2)
        raise ValueError("shard 3 is gone")

    with feed_of(failing(), device) as take:
        take()
        take()
        with pytest.raises(ValueError, match="shard 3"):
            take()


@pytest.mark.parametrize("device", DEVICES)
def test_leaving_early_ends_the_threads_and_closes_the_data(device: str) -> None:
    closed = []

    def endless() -> Generator[Sequence[StandInBatch], None, None]:
        try:
            yield from steps(1_000_000)
        finally:
            closed.append(True)

    before = threading.active_count()
    with feed_of(endless(), device) as take:
        take()
    assert threading.active_count() == before
    assert closed == [True]
