import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import scratch
from pipeline.scratch import scratch_folder


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SCRATCH", tmp_path)


@pytest.mark.processes
def test_what_a_killed_process_left_is_swept_at_the_next_start(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline import scratch\n"
        "scratch.SCRATCH = Path(sys.argv[1]); print(scratch.scratch_folder(), flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        (folder / "session").mkdir()
        other = scratch_folder()
        assert folder.exists()  # its process lives
        process.send_signal(signal.SIGKILL)
        process.wait()
    own = scratch_folder()
    assert sorted(tmp_path.iterdir()) == sorted([other, own])


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "sl-other").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / scratch.LOCK).touch()
    (tmp_path / "sl-link").symlink_to(tmp_path / "elsewhere")
    with (tmp_path / "sl-other" / scratch.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch_folder()
        assert (tmp_path / "sl-other").exists()
    assert (tmp_path / "elsewhere" / scratch.LOCK).exists()
