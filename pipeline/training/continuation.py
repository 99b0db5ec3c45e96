"""The settings in which a run differs from what it was when it is gone on with.

Each checkpoint records the settings that the curve up to it is a function of. A run goes on from
it with other settings as far as their fields allow (`pipeline.config.Change`): some may change
freely and are not recorded; with some the same line goes on as a new stretch, if somebody asked
for it; with the others it would be another run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Change, as_now, change_of, settings, value_at
from pipeline.errors import CheckpointError
from pipeline.training.config import TrainingConfig
from pipeline.training.spec import TrainingSpec, training_key

_SHOWN_LENGTH = 60
_DIGEST_LENGTH = 32
_BENCHMARKS = {  # an objective of fine-tuning -> where the recipe sets it
    "benchmarks.answer": "benchmarks.vqa.answer",
    "benchmarks.lm": "benchmarks.caption.lm",
}


@dataclass(frozen=True)
class Difference:
    """A setting with two values. `key` is the recipe's, in dotted form."""

    key: str
    then: Any
    now: Any
    change: Change
    is_of_content: bool = False  # the values are digests of what is at a location

    def __str__(self) -> str:
        if self.is_of_content and min(len(self.then or ""), len(self.now or "")) >= _DIGEST_LENGTH:
            return f"{self.key}: what is there has changed"
        return f"{self.key}: {_shown(self.then)} then, {_shown(self.now)} now"


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], phase: str
) -> tuple[Difference, ...]:
    """Compares the reproducibility keys of two runs of this phase, setting by setting.

    A setting that one of them does not record is not compared: an older release did not have it,
    or it has no effect. One whose key has changed since is compared as the setting it is now.
    """
    found: list[Difference] = []
    for name in sorted(then.keys() & now.keys()):
        if name == "training":
            found += _of_training(then[name], now[name], training_key(phase))
        elif name == "contents":
            if then[name] is not None and now[name] is not None:
                found += _contents(then[name], now[name])
        elif name == "held_out_split" and None in (then[name], now[name]):
            continue  # evaluating began or ended, which has a setting of its own
        elif name in TrainingSpec.model_fields:
            change = change_of(TrainingSpec, name)
            if change is not Change.FREELY:
                leaves = _leaves(_key(name, phase), then[name], now[name])
                found += (Difference(key, old, new, change) for key, old, new in leaves)
    return tuple(found)


def fixed(found: Sequence[Difference]) -> list[Difference]:
    """Returns the differences with which it is another run."""
    return [one for one in found if one.change is Change.NEVER]


def _of_training(
    then: Mapping[str, Any], now: Mapping[str, Any], prefix: str
) -> Iterator[Difference]:
    then, now = as_now(TrainingConfig, then), as_now(TrainingConfig, now)
    for key in sorted(settings(TrainingConfig)):
        try:
            old, new = value_at(then, key), value_at(now, key)
        except KeyError:
            continue
        if old != new:
            yield Difference(f"{prefix}.{key}", old, new, change_of(TrainingConfig, key))


def _contents(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    """Compares what is at the locations; of the dataset's parts those that both read.

    Which parts are read is told by settings of their own.
    """
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key), now.get(key)
        is_one_sided = key.startswith("dataset.") and None in (old, new)
        if old != new and not is_one_sided:
            yield Difference(key, old, new, Change.NEVER, is_of_content=True)


def _key(name: str, phase: str) -> str:
    if name == "objectives" and phase != "pretrain":
        return "benchmarks"
    return TrainingSpec.model_fields[name].title or name


def _leaves(key: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the keys at which two values differ, each with both."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in sorted(then.keys() | now.keys()):
            inner = f"{key}.{name}"
            yield from _leaves(_BENCHMARKS.get(inner, inner), then.get(name), now.get(name))
    elif then != now:
        yield key, then, now


def _shown(value: Any) -> str:
    """Writes a value as the recipe would, a long one by its size."""
    if isinstance(value, list | tuple) and len(value) > 4:
        return f"{len(value)} entries"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"


def changed(
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
