"""Room on a cluster, and work that waits for it."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cluster import connection, probe
from pipeline.errors import ClusterError, ConfigError

SECONDS_BETWEEN_CHECKS = 5.0  # for room, while work waits
SECONDS_UNTIL_BUSY = 20.0  # that work waits for a cluster whose room others have
SECONDS_BETWEEN_REMINDERS = 300.0
SECONDS_UNTIL_LOST = 20.0  # without an answer; Ray ends this process by itself after 60


class Waiting:
    """Work that asks a cluster for room, and says so when it has to wait for it.

    `number` pieces are wanted at once at least, each with `each` of the cluster's resources.
    """

    def __init__(self, what: str, number: int, each: Mapping[str, float]) -> None:
        self._what = what
        self._number = number
        self._each = {name: amount for name, amount in each.items() if amount}
        self._began = time.monotonic()
        self._told_at = 0.0
        self._told: bool | None = None

    def require_room(self) -> None:
        """Raises ConfigError if a Ray of our own has not the room, which nothing would change."""
        if not connection.address and self._room() < self._number:
            raise ConfigError(f"{self._lacking()}; ask for less, or join a cluster that has it")

    def tell_if_waiting(self, is_pending: Callable[[], bool]) -> None:
        """Tells, now and then, what is waited for; call it every few seconds while work is done.

        `is_pending` tells whether a part of the work has not started. Raises ClusterError if the
        cluster was lost, and ConfigError where no room can come.
        """
        if not _answers():  # any other question would wait for a minute
            return
        self.require_room()
        lacks_room = self._room() < self._number
        if lacks_room:
            text = f"{self._lacking()}; it waits for nodes, which may come"
        elif (
            time.monotonic() - self._began > SECONDS_UNTIL_BUSY
            and is_pending()
            and any(_free().get(name, 0.0) < self._number * self._each[name] for name in self._each)
        ):
            free = _listed(_free(), self._each)
            text = f"{self._asked()}, and others use the cluster, with {free} free; it waits"
        else:
            return
        now = time.monotonic()
        if lacks_room != self._told or now - self._told_at > SECONDS_BETWEEN_REMINDERS:
            self._told, self._told_at = lacks_room, now
            connection.tell(text)

    def _room(self) -> int:
        """Returns how many pieces the cluster's nodes could hold if they had nothing else."""
        return sum(
            int(min(node.get(name, 0.0) // amount for name, amount in self._each.items()))
            for node in _nodes()
        )

    def _asked(self) -> str:
        return f"{self._what}: {self._number} x {_listed(self._each, self._each)} asked for"

    def _lacking(self) -> str:
        nodes = [_listed(node, self._each) for node in _nodes()]
        where = f"the cluster at {connection.address}" if connection.address else "this machine"
        count = f" {len(nodes)} nodes:" if len(nodes) > 1 else ""
        return f"{self._asked()}, and {where} has{count} {', '.join(nodes) or 'no node'}"


def wait(references: Sequence[Any], waiting: Waiting, has_begun: bool) -> list[Any]:
    """Returns those of Ray's references that are done, of which there is one at least.

    Tells why if that takes long, unless something of the kind `has_begun` before.
    """
    import ray

    while True:
        done: list[Any] = ray.wait(list(references), timeout=SECONDS_BETWEEN_CHECKS)[0]
        if done:
            return done
        waiting.tell_if_waiting(is_pending=lambda: not has_begun)


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _free() -> dict[str, float]:
    import ray

    found: dict[str, float] = ray.available_resources()
    return found


def _listed(there: Mapping[str, float], asked: Mapping[str, float]) -> str:
    return " and ".join(f"{there.get(name, 0.0):g} {name}" for name in asked)


def require_cluster() -> None:
    """Raises ClusterError if the head of the cluster does not answer, now and in a few seconds."""
    deadline = time.monotonic() + SECONDS_UNTIL_LOST / 4
    while not _answers():
        if time.monotonic() > deadline:
            raise _lost()
        time.sleep(SECONDS_BETWEEN_CHECKS / 5)


def _answers() -> bool:
    """Tells whether the head of the cluster answers; raises ClusterError if it did not for long."""
    now = time.monotonic()
    try:
        probe(_address())
    except ClusterError as error:
        connection.silent_since = connection.silent_since or now
        if now - connection.silent_since < SECONDS_UNTIL_LOST:
            return False
        raise _lost() from error
    connection.silent_since = None
    return True


def _lost() -> ClusterError:
    whose = f"the Ray at {_address()}" if connection.address else "this command's own Ray"
    return ClusterError(
        f"{whose} was lost: its head does not answer any more. What is finished is kept, and with "
        "a Ray that runs the same command goes on from there"
    )


def _address() -> str:
    import ray

    return connection.address or str(ray.get_runtime_context().gcs_address)
