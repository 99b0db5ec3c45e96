import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.training.engine.swap_folder import SwapFolder, require_folder

HOLDS_ONE = """
import sys, time
from pathlib import Path
from pipeline.training.engine.swap_folder import SwapFolder
folder = SwapFolder(Path(sys.argv[1]))
(folder.path / "state.swp").write_bytes(b"1")
print(folder.path, flush=True)
sys.stdin.readline()
"""


def in_another_process(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_ONE, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_there_until_it_is_closed(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path)
    (folder.path / "deep").mkdir()
    (folder.path / "deep" / "state.swp").write_bytes(b"1")
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_a_folder_goes_with_its_process(tmp_path: Path) -> None:
    process, path = in_another_process(tmp_path)
    assert path.is_dir()
    process.communicate("\n")
    assert process.returncode == 0
    assert not path.exists()


@pytest.mark.processes
def test_what_a_killed_process_left_goes_with_the_next_and_a_living_ones_stays(
    tmp_path: Path,
) -> None:
    (tmp_path / "not-ours").mkdir()
    killed, left = in_another_process(tmp_path)
    living, kept = in_another_process(tmp_path)
    killed.kill()
    killed.communicate()
    assert (left / "state.swp").exists()
    folder = SwapFolder(tmp_path)
    assert not left.exists()
    assert (kept / "state.swp").exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        "not-ours",
        kept.name,
        folder.path.name,
    }
    folder.close()
    living.communicate("\n")


def test_a_folder_is_made_where_it_can_be_and_refused_where_not(tmp_path: Path) -> None:
    require_folder(tmp_path / "a" / "b", "key")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the.key: .*file cannot be written"):
        require_folder(tmp_path / "file", "the.key")
    assert list((tmp_path / "a" / "b").iterdir()) == []
