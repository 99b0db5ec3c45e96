"""Scratch folders of a process, which do not outlive it for long."""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

SCRATCH = Path("/tmp")  # not TMPDIR: a folder of Ray's is part of socket paths, of 107 bytes
SCRATCH_PREFIX = "sl-"
LOCK = "driver.lock"


def scratch_folder() -> Path:
    """Makes a folder that is removed when this process ends, or by a later one if it was killed."""
    for left in SCRATCH.glob(f"{SCRATCH_PREFIX}*/{LOCK}"):
        _sweep(left)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=SCRATCH))
    # Locked before it has its name, under which others try whether its process lives.
    unnamed = folder / f"{LOCK}.new"
    fcntl.flock(os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), fcntl.LOCK_EX)
    unnamed.rename(folder / LOCK)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _sweep(lock: Path) -> None:
    """Removes the folder of a lock that nobody holds, if it is this user's."""
    with contextlib.suppress(OSError):
        folder = lock.parent.lstat()
        if folder.st_uid != os.getuid():
            return
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)  # never through a link
        finally:
            os.close(descriptor)
