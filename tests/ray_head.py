"""A `ray start --head` of a test's own, which the rest of the machine is not told of."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

START_SECONDS = 300


class RayHead:
    """A head with two CPUs. With `token` it takes only those who send one.

    `environment` is what a user of the cluster has in theirs: a home and a token of their own.
    """

    def __init__(self, *, token: bool, listens_here_only: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # of socket paths: short
        home = self.folder / "home"
        home.mkdir()
        unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
        self.environment = {name: os.environ[name] for name in os.environ if name not in unset}
        self.environment |= {"HOME": str(home), "RAY_TMPDIR": str(self.folder)}
        if token:
            path = self.folder / "token"
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
            self.environment["RAY_AUTH_TOKEN_PATH"] = str(path)
        settings = {
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray would kill a rank for what other processes of a busy machine take.
            "RAY_memory_monitor_refresh_ms": "0",
        }
        if token:
            settings["RAY_AUTH_MODE"] = "token"
        options = []
        if listens_here_only:
            # So that 127.0.0.1 means itself, to who joins too.
            self.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            options.append("--node-ip-address=127.0.0.1")
        opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        port, dashboard, agent, client = (server.getsockname()[1] for server in opened)
        for server in opened:
            server.close()
        self.address = f"127.0.0.1:{port}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            "--block",
            "--num-cpus=2",
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            f"--temp-dir={self.folder}",
            *options,
        ]
        self._log = self.folder / "head.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment | settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> Self:
        """Returns once it is up."""
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "the head did not come up"
            time.sleep(0.2)
        return self

    def kill(self) -> None:
        """Kills every process of the head at once, as a machine that is switched off."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
