"""A loss to updated weights: the one module that meets DeepSpeed.

What is kept of a run is told in tensors that know no ZeRO stage and no world size: for each
parameter its fp32 weight and AdamW's two moments, whole, by name. The names are
`weight/<parameter>`, `exp_avg/<parameter>`, `exp_avg_sq/<parameter>` and `buffer/<buffer>`.

Restoring reaches into optimizer internals of DeepSpeed 0.19.8, which has no public way to fill a
state that no step has made yet; every stage is tested on that version, and it is pinned.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.training.optimizer import build_optimizer
from pipeline.training.schedule import rate_factor
from pipeline.training.spec import Environment, TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")

Batch = Any  # what the module's forward takes: one micro-batch
ReadTensor = Callable[[str], Tensor]


def engine_config(
    config: TrainingConfig, environment: Environment, num_parameters: int
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, or raises ConfigError for an impossible combination."""
    precision = config.resolved_precision(environment.device)
    # A bucket is allocated whole: DeepSpeed's 500 million elements would be 2 GB for any model.
    # It must be a multiple of an alignment that depends on the world size.
    bucket = min(500_000_000, -(-num_parameters // 4096) * 4096)
    own = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(environment.world_size),
        "gradient_clipping": 0.0 if config.zero_stage == 0 else config.clip_norm,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        # torch's AdamW also where the optimizer is offloaded: DeepSpeed's own is compiled at start
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    return _merged(own, config.deepspeed)


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
        environment: Environment,
        step: int = 0,
        restored: ReadTensor | None = None,
    ) -> None:
        """Starts at `step` updates done; `restored` then gives the tensors of `states` by name."""
        deepspeed = _import_deepspeed(environment.device)
        from torch.optim.lr_scheduler import LambdaLR

        if restored is not None:
            # Before ZeRO takes the weights: stage 3 does not refresh its low-precision copies.
            _load(module, restored)
        module.to(environment.device)
        count = sum(parameter.numel() for parameter in module.parameters())
        self.config = engine_config(config, environment, count)
        self._accumulation = self.config["gradient_accumulation_steps"]
        self._stage = config.zero_stage
        self._clip_norm = config.clip_norm or float("inf")
        optimizer = build_optimizer(module, config)
        for group in optimizer.param_groups:
            group["initial_lr"] = config.learning_rate  # LambdaLR asks for it when it starts late
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            # A function of the step, so there is no scheduler state to keep.
            lr_scheduler=lambda inner: LambdaLR(
                inner, lambda done: rate_factor(config, done), last_epoch=step - 1
            ),
            dist_init_required=False,
            config=self.config,
        )
        self.device = torch.device(environment.device)
        self.dtype = torch.bfloat16 if self.config["bf16"]["enabled"] else torch.float32
        if restored is not None:
            self._restore(restored, step)

    def advance(
        self, micro_batches: list[Batch]
    ) -> tuple[list[tuple[Tensor, Mapping[str, Tensor]]], float]:
        """Makes one update from this rank's micro-batches.

        Returns (loss, losses by objective) of each micro-batch, detached, and the norm of the
        whole gradient before clipping.
        """
        if len(micro_batches) != self._accumulation:
            raise TrainingError(
                f"a step has {self._accumulation} micro-batches on each rank, "
                f"found {len(micro_batches)}"
            )
        losses = []
        norm: Any = 0.0
        for index, batch in enumerate(micro_batches):
            loss, parts = self._engine(batch)
            self._engine.backward(loss)
            losses.append((loss.detach(), parts))
            if self._stage == 0 and index == self._accumulation - 1:
                # DeepSpeed would clip here as well, and throw the norm away.
                norm = nn.utils.clip_grad_norm_(self._engine.module.parameters(), self._clip_norm)
            self._engine.step()
        if self._stage:
            norm = self._engine.get_global_grad_norm()
        return losses, float(norm)

    def learning_rate(self) -> float:
        """Returns the rate of the next update."""
        return float(self._engine.get_lr()[0])

    def states(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor of the state, whole and in fp32, in the same order on every rank.

        A yielded tensor is valid until the next one is asked for; keep a copy, not the tensor.
        """
        self._link_moments()
        for name, parameter in self._engine.module.named_parameters():
            yield f"weight/{name}", self._weight(parameter)
            if parameter.requires_grad:
                for moment in MOMENTS:
                    yield f"{moment}/{name}", self._moment(parameter, moment)
        for name, buffer in _persistent_buffers(self._engine.module):
            yield f"buffer/{name}", buffer.detach()

    def weights(self) -> dict[str, Tensor]:
        """Returns the module's state dict in fp32 on the CPU; every rank calls, rank 0 keeps it.

        Other ranks get an empty dict.
        """
        weights = {}
        for name, parameter in self._engine.module.named_parameters():
            weight = self._weight(parameter)
            if torch.distributed.get_rank() == 0:
                weights[name] = weight.detach().cpu().clone()
        if torch.distributed.get_rank() == 0:
            for name, buffer in _persistent_buffers(self._engine.module):
                weights[name] = buffer.detach().cpu().clone()
        return weights

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the module."""
        self._engine.destroy()

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if not parameter.requires_grad and self._stage == 3:
            with zero.GatheredParameters([parameter]):
                return parameter.detach().float().clone()
        if not parameter.requires_grad or self._stage == 0:
            return parameter.detach().float()
        whole: Tensor = safe_get_full_fp32_param(parameter)
        return whole.detach()

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._stage == 0:
            state = self._engine.basic_optimizer.state[parameter]
            # a head that no objective of this phase uses is never updated, and has no state
            return state[moment].detach() if state else torch.zeros_like(parameter)
        whole: Tensor = safe_get_full_optimizer_state(parameter, moment)
        return whole.detach()

    def _restore(self, restored: ReadTensor, step: int) -> None:
        wrapper, inner = self._engine.optimizer, self._engine.basic_optimizer
        if self._stage == 3:
            partitions = list(wrapper.fp32_partitioned_groups_flat)
        else:
            partitions = [p for group in inner.param_groups for p in group["params"]]
        for partition in partitions:  # AdamW makes its state at its first step; make it now
            inner.state[partition] = {
                "step": torch.tensor(float(step), device=partition.device),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
            }
        self._link_moments()
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                for kind in ("weight", *MOMENTS):
                    self._set(parameter, kind, restored(f"{kind}/{name}"))
        if self._stage in (1, 2):
            wrapper.update_lp_params()
        self._engine.global_steps = step
        self._engine.micro_steps = step * self._accumulation

    def _link_moments(self) -> None:
        """Makes stages 1 and 2 find each parameter's moments in their flat partitions.

        DeepSpeed does so once, after the first group's first update, when the groups after it
        have no moments yet.
        """
        if self._stage in (1, 2):
            wrapper = self._engine.optimizer
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Writes this rank's part of a whole fp32 tensor."""
        from deepspeed import utils

        value = value.to(self.device)
        if self._stage == 0:
            if kind != "weight":
                self._engine.basic_optimizer.state[parameter][kind].copy_(value)
        elif self._stage == 3:
            # Stage 3 pads a parameter to equal parts; its setter of whole tensors forgets that.
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            padded = nn.functional.pad(value.flatten(), (0, size * world_size - value.numel()))
            part = padded.narrow(0, rank * size, size)
            if kind == "weight":
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, kind)
        elif kind == "weight":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)


def _load(module: nn.Module, restored: ReadTensor) -> None:
    """Copies the weights and buffers of a state into a module that no engine holds yet."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(restored(f"weight/{name}"))
        for name, buffer in _persistent_buffers(module):
            buffer.copy_(restored(f"buffer/{name}"))


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in kept:
            yield name, buffer


def _merged(own: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `own` with the keys of `more` put in, mapping by mapping."""
    result = dict(own)
    for key, value in more.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        result[key] = _merged(below, value) if both and below is not None else value
    return result


def _import_deepspeed(device: str) -> Any:
    """Imports DeepSpeed for a device: quietly, and without compiling anything at start."""
    if not device.startswith("cuda"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that torch has renamed, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is dep", FutureWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed fills this table when it is first read, by compiling and linking test programs,
    # and then builds shared-memory collectives (a minute, once per machine). gloo needs neither.
    deepspeed.ops.__compatible_ops__ = {}
    # Its Muon optimizer, which it loads to tell that ours is another, is decorated with
    # torch.compile, and loading that compiler takes two seconds of every start.
    from deepspeed.runtime import compiler

    compile_now = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_now
    return deepspeed
