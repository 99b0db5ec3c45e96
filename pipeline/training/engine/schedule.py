"""The learning-rate schedule, as a fraction of the peak."""

import math

from pipeline.training.config import ScheduleConfig


def rate_factor(config: ScheduleConfig, steps: int, step: int) -> float:
    """Returns the factor in (0, 1] that the update numbered `step`, from 0, is made with.

    The warm-up rises linearly and reaches 1 at update `warmup_steps - 1`; no update is wasted on
    a rate of 0. The decay then falls, and would reach 0 one update after the last.

    A run that goes on with other settings has at each step the rate that an unbroken run with them
    would have there: no warm-up of its own, and a rate that may jump. A linear decay that had come
    to its end starts again from half of the peak if there are to be twice the steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    decaying = max(1, steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decaying)
    if config.decay == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
