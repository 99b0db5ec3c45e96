"""The engine: a module in training, by DeepSpeed."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.training.config import TrainingConfig
from pipeline.training.engine import async_io, deepspeed_0_19
from pipeline.training.engine.async_io import is_swapped
from pipeline.training.engine.deepspeed_config import engine_config, merged
from pipeline.training.engine.optimizer import build_optimizer, freeze, state_kinds
from pipeline.training.engine.requirements import require_halves
from pipeline.training.engine.schedule import rate_factor
from pipeline.training.engine.state import ReadTensor, TrainingState, load
from pipeline.training.engine.swap_folder import SwapFolder
from pipeline.training.spec import RankContext

# What DeepSpeed's dynamic loss scaler goes by, which a run must go on with.
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch = Any  # what the module's forward takes: one micro-batch


class Engine:
    """A module in training: one forward and backward per micro-batch, one update per step.

    The module's forward takes a micro-batch and returns (loss, {objective: detached loss}), and
    uses every parameter inside it. A process group must exist; building an engine, `advance`,
    `states` and `weights` are collective: every rank calls them, in the same order.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        rank_context: RankContext,
        step: int = 0,
        restored: ReadTensor | None = None,
        *,
        skipped: int = 0,
        loss_scale: Mapping[str, float] | None = None,
    ) -> None:
        """Starts at `step` steps done, `skipped` of them without an update.

        `restored` then gives the tensors of `states` by name, and `loss_scale` what
        `loss_scale` returned. Raises ConfigError for what this machine cannot run.
        """
        deepspeed = deepspeed_0_19.import_deepspeed(rank_context.device)
        if restored is not None:
            # Before ZeRO takes the weights: stage 3 does not refresh its low-precision copies.
            load(module, restored)
        module.to(rank_context.device)
        count = sum(parameter.numel() for parameter in module.parameters())
        self.config = engine_config(config, rank_context, count)
        if self.config["fp16"]["enabled"]:
            require_halves("training.precision")
        async_io.require_ability(self.config["zero_optimization"], deepspeed_0_19.async_io_builder)
        self.skipped = skipped  # steps whose update is not in the weights
        self._step = step
        self._training = config
        self._accumulation = self.config["gradient_accumulation_steps"]
        self._stage = config.zero_stage
        self._clip_norm = config.optimizer.clip_norm or float("inf")
        self._swap_folder: SwapFolder | None = None
        freeze(module, config.optimizer.freeze)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, config.optimizer),
            dist_init_required=False,
            config=merged(self.config, {"zero_optimization": self._make_swap_folder()}),
        )
        self.device = torch.device(rank_context.device)
        kinds = state_kinds(config.optimizer)
        self._state = TrainingState(self._engine, config.zero_stage, kinds, self.device)
        self.dtype = _DTYPES[config.resolved_precision(rank_context.device)]
        self._state.make(updates=step - skipped)
        if restored is not None:
            self._state.restore(restored)
            deepspeed_0_19.set_steps_done(self._engine, step)
        if self.dtype == torch.float16:
            deepspeed_0_19.go_on_at_smallest_scale(self._engine.optimizer)
        if loss_scale is not None and self.loss_scale() is not None:  # fp16 then and now
            for name, value in loss_scale.items():
                setattr(self._engine.optimizer.loss_scaler, name, value)

    def advance(
        self, micro_batches: Sequence[Batch], shares: Sequence[float] | None = None
    ) -> tuple[list[tuple[Tensor, Mapping[str, Tensor]]], float]:
        """Makes one update from this rank's micro-batches: at least one.

        `shares` are what each counts for in the mean of the ranks' sums; left out, all of a rank
        count alike, and one rank as much as another.
        Returns (loss, losses by objective) of each micro-batch, detached, and the norm of the whole
        gradient before clipping. If a loss on any rank or the gradient is not finite, the norm is
        not finite either, no update is made, and `skipped` counts the step.
        """
        if shares is None:
            shares = [1 / len(micro_batches)] * len(micro_batches)
        num_passes = self._num_passes(len(micro_batches))
        rate = self.learning_rate()
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        losses = []
        norm: Any = 0.0
        for index in range(num_passes):
            last = index == num_passes - 1
            self._engine.set_gradient_accumulation_boundary(last)
            # Ranks make each pass together: one with fewer micro-batches repeats, for nothing.
            counts = index < len(micro_batches)
            loss, parts = self._engine(micro_batches[index if counts else 0])
            share = shares[index] if counts else 0.0
            if counts:
                losses.append((loss.detach(), parts))
            # A loss of infinity may have a finite gradient; times NaN it has none on any rank.
            whole = torch.stack([loss.detach(), *parts.values()]).isfinite().all()
            self._engine.backward(loss * torch.where(whole, share, math.nan), scale_wrt_gas=False)
            if self._stage == 0 and last:
                # DeepSpeed would clip here as well, and throw the norm away.
                parameters = self._engine.module.parameters()
                norm = float(nn.utils.clip_grad_norm_(parameters, self._clip_norm))
                if not math.isfinite(norm):
                    self._engine.module.zero_grad(set_to_none=True)  # AdamW leaves these alone
        with self._state.updating():
            self._engine.step()
        if self._stage:
            norm = float(self._engine.get_global_grad_norm())  # infinite if no update was made
        self._step += 1
        self.skipped += not math.isfinite(norm)
        return losses, norm

    def _num_passes(self, mine: int) -> int:
        """Returns the micro-batches of the rank that has most."""
        if self._training.loading.tokens_per_micro_batch is None:
            if mine > self._accumulation:
                raise TrainingError(
                    f"a step has up to {self._accumulation} micro-batches on a rank, found {mine}"
                )
            return int(self._accumulation)
        most = torch.tensor(mine, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def learning_rate(self) -> float:
        """Returns the rate of the next update, where no factor changes it."""
        # A function of the step, so there is no scheduler state to keep.
        return self._training.optimizer.learning_rate * rate_factor(
            self._training.schedule, self._training.steps, self._step
        )

    def loss_scale(self) -> dict[str, float] | None:
        """Returns the state of fp16's dynamic loss scale: plain numbers; None without one."""
        if self.dtype != torch.float16 or not self._engine.optimizer.loss_scaler.dynamic:
            return None
        scaler = self._engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in SCALER}

    def can_lower_loss_scale(self) -> bool:
        """Whether fp16's next step is made with less risk of too large a gradient."""
        if self.loss_scale() is None:
            return False
        scaler = self._engine.optimizer.loss_scaler
        return bool(scaler.cur_scale > scaler.min_scale)

    @contextlib.contextmanager
    def evaluating(self, ema: bool) -> Iterator[nn.Module]:
        """Yields the module in evaluation mode, with the moving average for weights if asked.

        Inside, no gradients are recorded; afterwards training goes on as if nothing had been.
        """
        module: nn.Module = self._engine.module
        module.eval()
        try:
            with (
                torch.no_grad(),
                self._state.using_ema_weights() if ema else contextlib.nullcontext(),
            ):
                yield module
        finally:
            module.train()

    def states(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor of the state, as `TrainingState.tensors` does."""
        return self._state.tensors()

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Returns the module's state dict, as `TrainingState.weights` does."""
        return self._state.weights(ema)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the module, and removes what was swapped to files."""
        self._engine.destroy()
        if self._swap_folder is not None:
            self._swap_folder.close()

    def _make_swap_folder(self) -> dict[str, Any]:
        """Makes this process's folder, if one is wanted; returns what DeepSpeed is told of it."""
        zero = self.config["zero_optimization"]
        if not is_swapped(zero):
            return {}
        self._swap_folder = SwapFolder(Path(zero["offload_optimizer"]["nvme_path"]))
        async_io.load(deepspeed_0_19.async_io_builder(), self._swap_folder.path)
        return {"offload_optimizer": {"nvme_path": str(self._swap_folder.path)}}
