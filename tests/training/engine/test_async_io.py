"""The real module, compiled on this machine, on this machine's disk."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, TrainingError
from pipeline.training.engine import async_io
from tests.training.stand_in import in_processes, make_spec

SETTINGS: dict[str, Any] = {
    "block_size": 1 << 16,
    "queue_depth": 4,
    "single_submit": False,
    "overlap_events": True,
    "intra_op_parallelism": 1,
}


def builder() -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


def zero_with(stage: int = 3, offload: str = "offload_optimizer", **more: Any) -> dict[str, Any]:
    return {"stage": stage, offload: {"device": "nvme", **more}}


@pytest.fixture
def handle(tmp_path: Path) -> Any:
    """What moves data; skips where it cannot be compiled."""
    try:
        async_io.require_ability(zero_with(nvme_path=str(tmp_path)), builder)
    except ConfigError as refusal:
        pytest.skip(str(refusal))
    async_io.load(builder(), tmp_path)
    return builder().load(verbose=False).aio_handle(**SETTINGS)


@pytest.mark.processes  # a compiler
def test_what_was_written_is_read_in_step_and_out_of_it(tmp_path: Path, handle: Any) -> None:
    """By itself, the module says that it has read to an odd place, and leaves it as it was."""
    file = str(tmp_path / "swap")
    written = handle.new_cpu_locked_tensor(4096, torch.zeros(1)).normal_()
    handle.async_pwrite(written, file, 0)
    assert handle.wait() == 1
    found = handle.new_cpu_locked_tensor(3 * 4096, torch.zeros(1)).zero_()
    in_step, out_of_step = found[:4096], found[4096 + 3 : 2 * 4096 + 3]
    handle.async_pread(in_step, file, 0)
    handle.async_pread(out_of_step, file, 0)
    assert handle.wait() == 2
    assert torch.equal(in_step, written)
    assert torch.equal(out_of_step, written)
    for locked in (written, found):
        assert handle.free_cpu_locked_tensor(locked)


@pytest.mark.processes  # a compiler
def test_a_write_that_a_disk_has_no_room_for_is_an_error(tmp_path: Path, handle: Any) -> None:
    buffer = handle.new_cpu_locked_tensor(1 << 18, torch.zeros(1)).zero_()
    file = tmp_path / "swap"
    handle.async_pwrite(buffer[: 1 << 16], str(tmp_path / "other"), 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))  # as if the disk ended there
    try:
        with pytest.raises(TrainingError, match=r"swap: 1,048,576 bytes .* have no room .*nvme_pa"):
            handle.async_pwrite(buffer, str(file), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert handle.wait() == 0  # what was under way has come to its end
    handle.free_cpu_locked_tensor(buffer)


@pytest.mark.processes  # a compiler
def test_a_file_that_is_too_short_is_an_error(tmp_path: Path, handle: Any) -> None:
    file = tmp_path / "swap"
    file.write_bytes(bytes(1000))
    buffer = handle.new_cpu_locked_tensor(1 << 10, torch.zeros(1))
    with pytest.raises(TrainingError, match="swap: ends 24 bytes short"):
        handle.async_pread(buffer[1:257], str(file), 0)
    handle.free_cpu_locked_tensor(buffer)


def lock_more_than_is_allowed(*_: Any) -> None:
    os.setgid(65534)  # the superuser may lock all memory
    os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
    with pytest.raises(ConfigError, match=r"1,048,576 bytes .*refused.*ulimit -l"):
        async_io._require_lockable(1 << 20)
    async_io._require_lockable(1 << 12)


@pytest.mark.processes
@pytest.mark.skipif(os.getuid() != 0, reason="only the superuser can become another user")
def test_memory_that_may_not_be_locked_is_an_error(tmp_path: Path) -> None:
    assert in_processes(1, lock_more_than_is_allowed, make_spec(tmp_path / "run")) == [0]


@pytest.mark.parametrize(
    ("zero", "match"),
    [
        (zero_with(), "nvme_path: device nvme needs a folder"),
        (zero_with(1, nvme_path="/tmp"), "needs zero_stage=3, found 1"),
        (zero_with(nvme_path="/proc/here"), "nvme_path: /proc/here cannot be written"),
        (zero_with(offload="offload_param"), r"offload_param.device: nvme is not .*device: cpu"),
    ],
)
def test_an_impossible_offload_is_refused_with_its_key(zero: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        async_io.require_ability(zero, builder)


@pytest.mark.processes
def test_without_a_compiler_what_to_install_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/absent/cc")
    with pytest.raises(ConfigError, match=r"apt install\s+libaio-dev g\+\+"):
        async_io.require_ability(zero_with(nvme_path=str(tmp_path)), builder)


def test_nothing_is_asked_where_nothing_is_swapped() -> None:
    def unwanted() -> Any:
        raise AssertionError

    async_io.require_ability({"stage": 1, "offload_optimizer": {"device": "cpu"}}, unwanted)
    async_io.require_ability({"stage": 0}, unwanted)
