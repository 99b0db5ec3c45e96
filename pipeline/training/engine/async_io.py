"""Asynchronous file I/O of swapped tensors: DeepSpeed's `async_io`, with its failures told.

It is a module that is compiled on the machine where it is first asked for (minutes). It passes the
page cache by, which a disk only allows in steps of a size; it does not look at whether a transfer
came about; and it ends the process where it cannot lock memory. So a disk is tried before training
relies on it, a file has its blocks before it is written, and what is not in step is read as usual:
in version 0.19.8 the gradients of any parameter that follows one of an odd size.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ConfigError, TrainingError
from pipeline.training.engine.swap_folder import require_folder

STEP = 1024  # bytes: what DeepSpeed's buffers and files are multiples of

_ZERO = "training.deepspeed.zero_optimization"
_OPTIMIZER, _WEIGHTS = "offload_optimizer", "offload_param"


def is_swapped(zero: Mapping[str, Any], offload: str = _OPTIMIZER) -> bool:
    """Whether a part of `zero_optimization` is offloaded to files."""
    return (zero.get(offload) or {}).get("device") == "nvme"


def require_ability(zero: Mapping[str, Any], builder: Callable[[], Any]) -> None:
    """Raises ConfigError if this machine cannot offload to files as `zero_optimization` says.

    Where it does not say so, nothing is asked of the machine, nor for DeepSpeed's `builder` of
    the module.
    """
    if is_swapped(zero, _WEIGHTS):
        # `Init._set_dtype` takes bf16 on a device without fp16. What `PartitionedParameter-
        # Coordinator` has read ahead keeps its buffers until a backward pass that does not come.
        raise ConfigError(
            f"{_ZERO}.{_WEIGHTS}.device: nvme is not supported: DeepSpeed 0.19.8 runs out of swap "
            "buffers in an evaluation, and on a CPU rounds fp32 weights to bf16; use device: cpu "
            f"for the weights, and nvme for the optimizer, which is larger ({_OPTIMIZER})"
        )
    if not is_swapped(zero):
        return
    if zero["stage"] != 3:
        raise ConfigError(
            f"{_ZERO}.{_OPTIMIZER}.device: nvme needs zero_stage=3, found {zero['stage']}; other "
            "stages keep in memory what they offload: use device: cpu, or zero_stage=3"
        )
    path = zero[_OPTIMIZER].get("nvme_path")
    if not path:
        raise ConfigError(
            f"{_ZERO}.{_OPTIMIZER}.nvme_path: device nvme needs a folder on a local disk for its "
            "swap files, such as nvme_path: /scratch"
        )
    require_folder(Path(path), f"{_ZERO}.{_OPTIMIZER}.nvme_path")
    if not builder().is_compatible(verbose=False):
        raise ConfigError(
            f"{_ZERO}.{_OPTIMIZER}.device: nvme needs DeepSpeed's async_io, which is compiled on "
            "this machine from libaio's headers: install them and a compiler (apt install "
            "libaio-dev g++, or dnf install libaio-devel gcc-c++), or use device: cpu"
        )


def load(builder: Any, folder: Path) -> None:
    """Compiles the module, once per machine, and tries it in a folder.

    Raises ConfigError if what is written there does not come back, as on a disk whose sectors are
    larger than the module's steps.
    """
    module = builder.load(verbose=False)
    if not issubclass(module.aio_handle, _Careful):
        module.aio_handle = type("careful_aio_handle", (_Careful, module.aio_handle), {})
    handle = module.aio_handle(
        block_size=1 << 20,
        queue_depth=8,
        single_submit=False,
        overlap_events=True,
        intra_op_parallelism=1,
    )
    file = folder / "try"
    whole = handle.new_cpu_locked_tensor((1 << 20) + 2 * STEP, torch.zeros(1, dtype=torch.uint8))
    tried = whole.random_()[STEP:]
    handle.async_pwrite(tried, str(file), 0)
    handle.wait()
    came_back = file.read_bytes() == tried.numpy().tobytes()
    file.unlink()
    handle.free_cpu_locked_tensor(whole)
    if not came_back:
        raise ConfigError(
            f"{folder.parent}: what is written there in steps of {STEP} bytes, past the page "
            "cache, is lost; set an nvme_path on a disk with smaller sectors, or use device: cpu"
        )


class _Careful:
    """What `aio_handle` is mixed with: it raises TrainingError before something would be lost."""

    _num_pending = 0
    _num_read = 0

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        if buffer.data_ptr() % STEP:
            _read(buffer, path, offset)
            self._num_read += 1
            return 0
        status: int = super().async_pread(buffer, path, offset)  # type: ignore[misc]
        return self._submitted(status, path)

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        try:
            _allocate(path, offset + buffer.nbytes)
        except OSError as error:
            self.wait()
            raise TrainingError(
                f"{path}: {buffer.nbytes:,} bytes of swapped state have no room ({error}); make "
                "some there, or set another nvme_path"
            ) from error
        status: int = super().async_pwrite(buffer, path, offset)  # type: ignore[misc]
        return self._submitted(status, path)

    def wait(self) -> int:
        num_done, self._num_read = self._num_read, 0
        if self._num_pending:
            self._num_pending = 0
            num_done += super().wait()  # type: ignore[misc]
        return num_done

    def new_cpu_locked_tensor(self, num_elements: int, like: torch.Tensor) -> torch.Tensor:
        _require_lockable(num_elements * like.element_size())
        locked: torch.Tensor = super().new_cpu_locked_tensor(num_elements, like)  # type: ignore[misc]
        return locked

    def _submitted(self, status: int, path: str) -> int:
        if status != 0:
            self.wait()
            raise TrainingError(
                f"{path}: cannot be opened past the page cache (O_DIRECT); an nvme_path is a "
                "folder on a local disk, not in memory or on a share"
            )
        self._num_pending += 1
        return status

    def __del__(self) -> None:
        self.wait()  # dropped with a transfer under way, it would end the process


def _read(buffer: torch.Tensor, path: str, offset: int) -> None:
    with Path(path).open("rb", buffering=0) as file:
        file.seek(offset)
        rest = buffer.view(torch.uint8).numpy().data
        while rest:
            num_bytes = file.readinto(rest)
            if not num_bytes:
                raise TrainingError(f"{path}: ends {len(rest):,} bytes short of what was swapped")
            rest = rest[num_bytes:]


def _allocate(path: str, num_bytes: int) -> None:
    """Gives a file its blocks, so that no later write finds the disk full. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        if os.fstat(file).st_size < num_bytes:
            os.posix_fallocate(file, 0, num_bytes)
    finally:
        os.close(file)


def _require_lockable(num_bytes: int) -> None:
    """Raises ConfigError if the process may not lock so much more memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, num_bytes) as memory:
        first = ctypes.c_char.from_buffer(memory)
        is_refused = libc.mlock(ctypes.byref(first), ctypes.c_size_t(num_bytes)) != 0
        reason = os.strerror(ctypes.get_errno())
        del first  # or the map could not be closed
    if is_refused:
        raise ConfigError(
            f"{_ZERO}: nvme needs memory that is locked, and {num_bytes:,} bytes of it are refused "
            f"({reason}); raise the limit (ulimit -l, a container's memlock), make "
            "sub_group_size smaller, or use device: cpu"
        )
