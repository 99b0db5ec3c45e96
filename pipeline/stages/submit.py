"""Sends a recipe to a Ray cluster as a job, whose exit status becomes ours.

The job runs `python -m jobs.run` with the resolved recipe, so it does what `sightline run` does
here. Sightline itself must be installed on the cluster (its image or environment); only the
recipe travels.
"""

import os
import shlex
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline import config
from pipeline.errors import ConfigError, StageError
from pipeline.recipe import Recipe

POLL_SECONDS = 1.0
PROBE_TIMEOUT_SECONDS = 5.0
# What `stop` leaves a job to write its last checkpoint; Ray's own default is 3 seconds.
STOP_GRACE_SECONDS = 60
STOPPED_STATUS = 143  # as a shell reports a process ended by SIGTERM


class JobClient:
    """A cluster's job server, reached at its dashboard address."""

    def __init__(self, address: str) -> None:
        _probe(address)
        from ray.job_submission import JobSubmissionClient

        self.address = address
        self._client: Any = JobSubmissionClient(address)

    def submit(self, recipe: Recipe, name: str) -> str:
        """Starts the job and returns its id. A name that is already in use is refused."""
        with _recipe_folder(recipe.on_cluster()) as folder:
            try:
                job: str = self._client.submit_job(
                    entrypoint=_entrypoint(recipe, _python(self.address)),
                    submission_id=name,
                    runtime_env={
                        "working_dir": str(folder),
                        "env_vars": {
                            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_SECONDS),
                            "PYTHONUNBUFFERED": "1",
                        },
                    },
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise StageError(
                        f"job {name!r} exists at {self.address}; "
                        f"follow it with `sightline job logs {name}` or choose another --name"
                    ) from error
                raise StageError(f"{self.address} refused the job: {error}") from error
        return job

    def logs(self, job: str) -> str:
        """Returns everything the job has printed so far."""
        self.status(job)
        text: str = self._client.get_job_logs(job)
        return text

    def status(self, job: str) -> str:
        """Returns PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return str(self._info(job).status.value)

    def stop(self, job: str) -> None:
        """Asks the job to stop; it has STOP_GRACE_SECONDS to write a checkpoint."""
        self.status(job)
        self._client.stop_job(job)

    def follow(self, job: str) -> int:
        """Copies the job's log to stderr until it ends and returns its exit status.

        Ray reports success for a stopped job and 1 for every failure, so the status is read
        from the driver's own exit code.
        """
        printed = 0
        while True:
            info = self._info(job)
            text = self._client.get_job_logs(job)
            sys.stderr.write(text[printed:])
            sys.stderr.flush()
            printed = len(text)
            if info.status.is_terminal():
                break
            time.sleep(POLL_SECONDS)
        if info.status.value == "SUCCEEDED":
            return 0
        if info.status.value == "STOPPED":
            return STOPPED_STATUS
        if info.driver_exit_code is None:
            sys.stderr.write(f"{info.message}\n")
        return int(info.driver_exit_code or 1)

    def _info(self, job: str) -> Any:
        try:
            return self._client.get_job_info(job)
        except RuntimeError as error:
            raise StageError(f"{self.address} knows no job {job!r}") from error


def job_name(recipe: str) -> str:
    """Returns a new job id that tells when which recipe was submitted."""
    return f"{recipe}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"


def _probe(address: str) -> None:
    """Fails within seconds when nothing answers: Ray's own client may wait for minutes."""
    if not urlparse(address).scheme.startswith("http"):
        raise ConfigError(
            f"--address: found {address!r}; expected the dashboard's URL, as http://127.0.0.1:8265"
        )
    token = _token()
    if token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's client sends no token without it
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_SECONDS):
            return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise StageError(
                f"{address} wants a token; put the cluster's token into ~/.ray/auth_token "
                "or into RAY_AUTH_TOKEN"
            ) from error
        raise StageError(f"{address} answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, OSError) as error:
        raise StageError(
            f"no Ray cluster answers at {address} ({error}); "
            "start one with `ray start --head`, or check the address"
        ) from error


def _token() -> str:
    """Returns the token of this user's clusters, or an empty string."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return ""
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text().strip() if path.is_file() else ""


def _entrypoint(recipe: Recipe, python: str) -> str:
    """The job's shell command. Relative paths mean what they mean in the folder of submission."""
    command = f'{shlex.quote(python)} -m jobs.run "$recipe"'
    relative = recipe.relative_locations()
    if relative:
        folder = shlex.quote(str(Path.cwd()))
        sorry = shlex.quote(
            f"the recipe's {relative[0]!r} is relative to {Path.cwd()}, which this cluster does "
            "not have; use absolute paths of a shared file system, or URLs"
        )
        command = f"cd {folder} || {{ echo {sorry} >&2; exit 64; }}; {command}"
    return f'recipe="$PWD/recipe.yaml"; {command}'


def _python(address: str) -> str:
    """On this machine the interpreter that has Sightline; elsewhere the cluster's own."""
    return sys.executable if urlparse(address).hostname in ("127.0.0.1", "localhost") else "python"


@contextmanager
def _recipe_folder(recipe: Recipe) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sightline-job-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
        yield folder
