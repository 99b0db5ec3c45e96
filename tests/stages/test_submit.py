"""A recipe as a job on a real Ray head: its log, its exit status, its absence."""

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import config
from pipeline.cli import run_job
from pipeline.errors import BusyError, ConfigError, StageError
from pipeline.recipe import Recipe
from pipeline.stages import submit
from pipeline.stages.submit import JobClient, Submitted, job_name, script
from tests.ray_head import RayHead

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = str(REPOSITORY / "jobs" / "recipes" / "quickstart.yaml")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port: int = opened.getsockname()[1]
        return port


def overrides(folder: Path) -> list[str]:
    return [f"run={folder / 'run'}", f"dataset.path={folder / 'data'}"]


def recipe(folder: Path, *more: str) -> Recipe:
    return config.load(Recipe, QUICKSTART, [*overrides(folder), *more])


def sightline(*arguments: str, env: dict[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_job_does_what_the_command_does_and_its_status_is_ours(
    plain_head: RayHead, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = ["dataset.source.scenes=20", "dataset.source.validation_scenes=8"]
    tiny = [
        f"training.{phase}.{setting}"
        for phase in ("pretrain", "finetune")
        for setting in (
            "steps=2",
            "global_batch_size=8",
            "micro_batch_size=8",
            "schedule.warmup_steps=1",
        )
    ]
    settings = [*overrides(tmp_path), *small, *tiny]
    settings += ["training.blind_twin=false", "cluster.workers=1"]
    address = ["--address", plain_head.dashboard]
    assert run_job(["submit", QUICKSTART, *settings, *address]) == 0
    said = capfd.readouterr().err
    assert "evaluate" in said
    assert (tmp_path / "run" / "report.html").exists()

    missing = f"model.initial={tmp_path / 'gone'}"
    assert run_job(["submit", QUICKSTART, *settings, missing, *address]) == 64
    assert "model.initial" in capfd.readouterr().err


@pytest.mark.slow
def test_what_is_submitted_twice_runs_once(
    plain_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The address that is given wins, whatever Ray's own variables say.
    elsewhere = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", elsewhere)
    monkeypatch.setenv("RAY_ADDRESS", elsewhere)
    client = JobClient(plain_head.dashboard)
    assert os.environ["RAY_API_SERVER_ADDRESS"] == elsewhere
    with pytest.raises(StageError, match="knows no job 'nosuch'"):
        client.status("nosuch")
    wanted = recipe(tmp_path)
    first = client.submit(wanted)
    assert first == Submitted(job_name(wanted), is_new=True)
    assert client.submit(wanted) == Submitted(first.job, is_new=False)
    with pytest.raises(BusyError, match=f"is busy: job {first.job!r}"):
        client.submit(wanted, "another-name")
    with pytest.raises(BusyError, match="is busy"):
        client.submit(recipe(tmp_path, "training.seed=1"))
    with pytest.raises(StageError, match=f"job {first.job!r} exists at"):
        client.submit(recipe(tmp_path, "training.seed=1"), first.job)
    client.stop(first.job)
    assert client.follow(first.job) == 143
    again = client.submit(wanted)
    assert again == Submitted(f"{first.job}-2", is_new=True)
    client.stop(again.job)
    assert client.follow(again.job) == 143


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_and_the_same_command_comes_back_to_it(
    token_head: RayHead, tmp_path: Path
) -> None:
    arguments = ["submit", QUICKSTART, *overrides(tmp_path), "--address", token_head.dashboard]
    first = sightline(*arguments, env=token_head.environment)
    assert first.stderr
    line = first.stderr.readline()
    while "Ctrl-C leaves it running" not in line:
        assert line
        line = first.stderr.readline()
    found = re.search(r"job (quickstart-\w+) at", line)
    assert found
    first.send_signal(signal.SIGINT)
    assert first.wait(300) == 130
    said = first.stderr.read()
    assert f"The job goes on. Follow it: sightline job logs {found[1]} --address" in said
    assert f"Stop it: sightline job stop {found[1]} --address" in said
    second = sightline(*arguments, "--detach", env=token_head.environment)
    assert second.communicate(timeout=300)[0].strip() == found[1]
    stop = ["job", "stop", found[1], "--address", token_head.dashboard]
    assert sightline(*stop, env=token_head.environment).wait(300) == 0
    without = {k: v for k, v in token_head.environment.items() if k != "RAY_AUTH_TOKEN_PATH"}
    for env, fault in (
        (without, "wants a token"),
        (without | {"RAY_AUTH_TOKEN": "0" * 64}, "does not take the token it was given"),
    ):
        _, said = (refused := sightline(*stop, env=env)).communicate(timeout=300)
        assert refused.returncode == 1
        assert said.startswith(f"Failed: {token_head.dashboard} {fault}; give the cluster's token")
        assert len(said.splitlines()) == 1


def test_names_are_of_what_a_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_name(recipe(tmp_path)) == job_name(recipe(tmp_path))
    others = [recipe(tmp_path, "training.seed=1"), recipe(tmp_path / "other")]
    assert len({job_name(one) for one in [recipe(tmp_path), *others]}) == 3
    relative = config.load(Recipe, QUICKSTART)
    here = job_name(relative)
    monkeypatch.chdir(tmp_path)
    assert job_name(relative) != here


@pytest.mark.processes
class TestScript:
    """The job's command, run by a shell as a head runs it."""

    @pytest.fixture(autouse=True)
    def _other_sightline(self, tmp_path: Path) -> None:
        self.path = tmp_path / "bin"
        self.path.mkdir()
        self.folder = tmp_path / "job"
        self.folder.mkdir()
        (self.folder / "recipe.yaml").write_text("name: of-the-job")

    def _installed(self, name: str) -> None:
        (self.path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (self.path / name).chmod(0o755)

    def _run(self, command: str) -> "subprocess.CompletedProcess[str]":
        env = {"PATH": f"{self.path}:/usr/bin:/bin"}
        return subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    def test_on_this_machine_it_is_this_sightline_in_this_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._installed("sightline")
        here = tmp_path / "here"
        here.mkdir()
        (here / "pipeline.py").write_text("raise SystemExit('the wrong module')")
        monkeypatch.chdir(here)
        done = self._run(script(config.load(Recipe, QUICKSTART)))
        assert done.returncode == 64  # of the recipe above, by the real command line
        assert "Refused: " in done.stderr
        assert "the wrong module" not in done.stderr

    def test_on_another_machine_it_is_what_is_installed_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._installed("sightline")
        monkeypatch.setattr(submit, "_boot", lambda: "another machine's")
        done = self._run(script(recipe(tmp_path)))
        told = ["sightline", "run", f"{self.folder}/recipe.yaml"]
        assert done.stdout.split() == told
        again = self._run(script(recipe(tmp_path), ["--restart"]))
        assert again.stdout.split() == [*told, "--restart"]

    def test_on_other_files_of_this_machine_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._installed("python")
        monkeypatch.setattr(submit, "_file", lambda _path: "1:1")  # as of a container
        done = self._run(script(recipe(tmp_path)))
        assert done.stdout.split()[-5:-1] == ["-P", "-m", "pipeline.cli", "run"]

    def test_where_nothing_is_installed_it_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (self.path / "python").symlink_to("/bin/false")
        monkeypatch.setattr(submit, "_boot", lambda: "another machine's")
        done = self._run(script(recipe(tmp_path)))
        assert done.returncode == 1
        assert "Sightline is not installed on this cluster's head" in done.stderr

    def test_relative_paths_are_refused_on_another_machine(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._installed("sightline")
        monkeypatch.setattr(submit, "_boot", lambda: "another machine's")
        done = self._run(script(config.load(Recipe, QUICKSTART)))
        assert done.returncode == 64
        assert done.stderr.startswith("Refused: the recipe's 'runs/quickstart' is relative to ")
        assert done.stdout == ""


@pytest.fixture
def web_page() -> Iterator[str]:
    """The address of a server that is no Ray."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_cluster_at_an_address_is_said_at_once(web_page: str) -> None:
    with pytest.raises(StageError, match="no Ray cluster answers"):
        JobClient(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StageError, match="answered 404"):
        JobClient(web_page)
    for address in ("127.0.0.1:8265", "http://", "ray://127.0.0.1:10001", "http://a:b", ""):
        with pytest.raises(ConfigError, match="--address"):
            JobClient(address)
