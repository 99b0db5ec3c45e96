"""The policy for a step whose loss or gradient is not finite."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.training.checkpoints.run_state import RunState
from pipeline.training.config import TrainingConfig
from pipeline.training.spec import TrainingSpec, training_key


@dataclass(frozen=True)
class Reaction:
    """What is done about it; `because` is why the run ends, beside the fault."""

    action: Literal["skip", "roll_back", "stop"]
    because: str = ""


def reaction(config: TrainingConfig, run_state: RunState) -> Reaction:
    """Returns what the config says, of a run whose state counts this step as skipped."""
    if config.not_finite == "skip":
        in_a_row = run_state.skips_in_a_row
        if in_a_row <= config.max_skips_in_a_row:
            return Reaction("skip")
        return Reaction("stop", f", and {in_a_row - 1} steps before it were skipped")
    if config.not_finite == "roll_back":
        times = run_state.roll_backs
        if times < config.max_roll_backs:
            return Reaction("roll_back")
        return Reaction("stop", f", and the run was rolled back {times} times before")
    return Reaction("stop")


def advice(spec: TrainingSpec, device: str, checkpoint_steps: Sequence[int]) -> str:
    """Says what to do about a figure that is not finite, in keys of the recipe."""
    training = training_key(spec.phase)
    rate = f"{training}.optimizer.learning_rate={spec.training.optimizer.learning_rate / 2:g}"
    others = [f"a longer {training}.schedule.warmup_steps"]
    if spec.training.resolved_precision(device) != "fp32":
        others.append(f"{training}.precision=fp32")
    where = (
        f"it goes on from the checkpoint at step {checkpoint_steps[-1]}"
        if checkpoint_steps
        else "there is no checkpoint yet, so it starts anew"
    )
    return (
        f"give the same command with `{rate}` (or {', or '.join(others)}) and "
        f"`--from-checkpoint`: {where}"
    )
