"""Timing contestants with a clock that does as it is told."""

from functools import partial

import torch

from pipeline.perf.measure import Times, finish, machine, measure, peak_memory_bytes

CPU = torch.device("cpu")


class Hands:
    """A clock that contestants move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def takes(self, name: str, *seconds: float) -> None:
        self.now += seconds[min(self.calls.count(name), len(seconds) - 1)]
        self.calls.append(name)


def test_medians_and_ratios_leave_out_the_first_round_and_outliers() -> None:
    hands = Hands()
    times = measure(
        {
            "slow": lambda: hands.takes("slow", 100.0, 6.0, 50.0, 5.0),
            "fast": lambda: hands.takes("fast", 100.0, 2.0, 1.0, 3.0),
        },
        rounds=3,
        device=CPU,
        clock=lambda: hands.now,
    )
    assert times.rounds == {"slow": (6.0, 50.0, 5.0), "fast": (2.0, 1.0, 3.0)}
    assert times.median("slow") == 6.0
    assert times.ratio("slow", "fast") == 6.0 / 2.0


def test_every_round_runs_everyone_and_another_one_first() -> None:
    hands = Hands()
    measure({name: partial(hands.takes, name, 1.0) for name in "abc"}, 2, CPU)
    assert "".join(hands.calls) == "abc" + "bca" + "cab"


def test_ratios_along_a_chain_multiply() -> None:
    times = Times({"a": (7.0, 8.0), "b": (3.0, 5.0), "c": (1.0, 9.0)})
    chain = times.ratio("a", "b") * times.ratio("b", "c")
    assert abs(times.ratio("a", "c") - chain) < 1e-12


def test_a_cpu_has_no_queue_to_wait_for_and_no_memory_of_its_own() -> None:
    finish(CPU)
    assert peak_memory_bytes(lambda: None, CPU) is None
    assert machine(CPU)["threads"] == torch.get_num_threads()
