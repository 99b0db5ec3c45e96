"""Timing in rounds: each round runs all contestants, so that a busy moment hits none alone."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Contestant = Callable[[], object]
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Times:
    """Seconds of each contestant in each round."""

    rounds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Returns a contestant's median over the rounds, in seconds."""
        return statistics.median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """Returns how many times longer `slow` took than `fast`, by their medians."""
        return self.median(slow) / self.median(fast)


def measure(
    contestants: Mapping[str, Contestant],
    rounds: int,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> Times:
    """Times contestants in paired rounds, after one round that is not counted.

    The order turns by one place each round, so that none always comes first.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            finish(device)
            start = clock()
            contestants[name]()
            finish(device)
            if number > 0:
                seconds[name].append(clock() - start)
    return Times({name: tuple(taken) for name, taken in seconds.items()})


def finish(device: torch.device) -> None:
    """Waits for what a device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(contestant: Contestant, device: torch.device) -> int | None:
    """Returns the most GPU memory held while a contestant runs; None on a CPU.

    Other contestants' weights that lie on the device are not counted.
    """
    if device.type != "cuda":
        return None
    finish(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contestant()
    finish(device)
    return torch.cuda.max_memory_allocated(device) - before


def machine(device: torch.device) -> dict[str, Any]:
    """Describes where figures come from, with the load of the last minute."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }
