"""Recipes as jobs of a Ray cluster, whose exit status becomes ours.

The job does what `sightline run` does here. Sightline itself must be installed on the cluster (its
image or environment); only the recipe travels. A job is named by its recipe, so that a second
submission of it comes back to the job that runs.
"""

import hashlib
import http.client
import json
import os
import shlex
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

from pipeline import config, errors, storage
from pipeline.cluster import TOKEN_ADVICE, token, use_token
from pipeline.errors import ConfigError, StageError
from pipeline.recipe import Recipe

COMMAND = "SIGHTLINE_COMMAND"  # of a job's environment: how the user named what it does
POLL_SECONDS = 1.0
PROBE_TIMEOUT_SECONDS = 5.0
SECONDS_UNTIL_LOST = 30.0  # that a cluster may fail to answer while a job of it is followed
SECONDS_UNTIL_PENDING = 20.0  # that a job may take to start before it is said
# What `stop` leaves a job to write its last checkpoint; Ray's own default is 3 seconds.
STOP_GRACE_SECONDS = 60
STOPPED_STATUS = 143  # as a shell reports a process ended by SIGTERM
_ADDRESS = "RAY_API_SERVER_ADDRESS"  # which Ray prefers to an address that it is given

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Submitted:
    """A job that runs a recipe: started now, or before by the same submission."""

    job: str
    is_new: bool


class JobClient:
    """A cluster's job server, reached at its dashboard address."""

    def __init__(self, address: str) -> None:
        _probe(address)
        from ray.job_submission import JobSubmissionClient

        self.address = address
        before = os.environ.get(_ADDRESS)
        os.environ[_ADDRESS] = address
        try:
            self._client: Any = JobSubmissionClient(address)
        finally:
            if before is None:
                del os.environ[_ADDRESS]
            else:
                os.environ[_ADDRESS] = before

    def submit(
        self, recipe: Recipe, name: str = "", flags: Sequence[str] = (), command: str = ""
    ) -> Submitted:
        """Starts the recipe's job, or finds the one that runs.

        `flags` are those of `sightline run`; `command` is what the user gave, to be repeated by
        what the job says of it.

        With a name, the job has that one; without, it is named by what the recipe says, and by a
        number from the second time on. Raises StageError if the name is taken, or if another job
        writes to the recipe's run.
        """
        wanted = digest(recipe)
        while True:
            known = {job.submission_id: job for job in self._ask(self._client.list_jobs)}
            job = name or _next_name(job_name(recipe), known)
            found = known.get(job)
            is_running = found is not None and not found.status.is_terminal()
            if is_running and _metadata(found).get("recipe") == wanted:
                return Submitted(job, is_new=False)
            if found is not None:
                raise StageError(
                    f"job {job!r} exists at {self.address} ({found.status.value}); look at it with "
                    f"`{self.command('logs', job)}`, or choose another --name"
                )
            run = storage.absolute(recipe.run)
            for other in known.values():
                if _metadata(other).get("run") == run and not other.status.is_terminal():
                    raise StageError(
                        f"{recipe.run} is busy: job {other.submission_id!r} of another recipe or "
                        f"name writes to it; follow it with "
                        f"`{self.command('logs', other.submission_id)} --follow`, stop it with "
                        f"`{self.command('stop', other.submission_id)}`, or give another run="
                    )
            try:
                self._start(recipe, job, {"recipe": wanted, "run": run}, flags, command)
            except RuntimeError as error:
                if "already exists" in str(error):  # by a submission at the same moment
                    continue
                raise StageError(f"{self.address} refused the job: {error}") from error
            return Submitted(job, is_new=True)

    def _start(
        self,
        recipe: Recipe,
        job: str,
        metadata: dict[str, str],
        flags: Sequence[str],
        command: str,
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="sightline-job-") as folder:
            (Path(folder) / "recipe.yaml").write_text(config.to_yaml(recipe.on_cluster()))
            (Path(folder) / "job.sh").write_text(script(recipe, flags))
            self._client.submit_job(
                entrypoint="sh job.sh",
                submission_id=job,
                metadata=metadata,
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {
                        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_SECONDS),
                        "PYTHONUNBUFFERED": "1",
                        COMMAND: command,
                    },
                },
            )

    def command(self, verb: str, job: str) -> str:
        """Returns the command line that looks after a job."""
        return f"sightline job {verb} {job} --address {self.address}"

    def logs(self, job: str) -> str:
        """Returns everything the job has printed so far."""
        self.status(job)
        text: str = self._ask(lambda: self._client.get_job_logs(job))
        return text

    def status(self, job: str) -> str:
        """Returns PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return str(self._info(job).status.value)

    def stop(self, job: str) -> None:
        """Asks the job to stop; it has STOP_GRACE_SECONDS to write a checkpoint."""
        self.status(job)
        self._ask(lambda: self._client.stop_job(job))

    def follow(self, job: str) -> int:
        """Copies the job's log to stderr until it ends and returns its exit status.

        Ray reports success for a stopped job and 1 for every failure, so the status is read
        from the driver's own exit code.
        """
        printed = 0
        began = time.monotonic()
        while True:
            info = self._info(job)
            text = self._ask(lambda: self._client.get_job_logs(job))
            sys.stderr.write(text[printed:])
            sys.stderr.flush()
            printed = len(text)
            if info.status.is_terminal():
                break
            if info.status.value == "PENDING" and time.monotonic() - began > SECONDS_UNTIL_PENDING:
                began = float("inf")
                sys.stderr.write(f"job {job} has not started yet: {info.message}\n")
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
            return self._ask(lambda: self._client.get_job_info(job))
        except RuntimeError as error:
            if "404" in str(error):
                raise StageError(f"{self.address} knows no job {job!r}") from error
            raise StageError(f"{self.address} does not tell of job {job!r}: {error}") from error

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """Asks again for a while if the cluster does not answer."""
        deadline = time.monotonic() + SECONDS_UNTIL_LOST
        while True:
            try:
                return question()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise StageError(
                        f"{self.address} does not answer any more. If the cluster's head was lost, "
                        "its jobs were too, and what they finished is kept: the same submission to "
                        "a cluster that runs goes on from there"
                    ) from error
                time.sleep(POLL_SECONDS)


def digest(recipe: Recipe) -> str:
    """Returns what is equal for two submissions that would do the same."""
    folder = str(Path.cwd()) if recipe.relative_locations() else ""
    said = json.dumps([folder, config.to_yaml(recipe.on_cluster())])
    return hashlib.sha256(said.encode()).hexdigest()


def job_name(recipe: Recipe) -> str:
    """Returns the id of a recipe's job, which no other recipe's has."""
    return f"{recipe.name}-{digest(recipe)[:10]}"


def _metadata(job: Any) -> dict[str, str]:
    return job.metadata or {}


def _next_name(name: str, known: Mapping[str, Any]) -> str:
    """Returns the newest job of that name if it has not ended, or the first name that is free."""
    number, newest = 1, name
    while newest in known and known[newest].status.is_terminal():
        number += 1
        newest = f"{name}-{number}"
    return newest


def _probe(address: str) -> None:
    """Fails within seconds when nothing answers: Ray's own client may wait for minutes."""
    try:
        place = urlparse(address)
        is_url = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(
            f"--address: found {address!r}; expected the dashboard's URL, as http://127.0.0.1:8265"
        )
    secret = token()
    if secret:
        use_token()
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version")
    if secret:
        request.add_header("Authorization", f"Bearer {secret}")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_SECONDS) as answer:
            is_ray = "ray_version" in json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            sent = "does not take the token it was given" if secret else "wants a token"
            raise StageError(f"{address} {sent}; {TOKEN_ADVICE}") from error
        raise StageError(f"{address} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise StageError(
            f"no Ray cluster answers at {address} ({error}); "
            "start one with `ray start --head`, or check the address"
        ) from error
    except ValueError:
        is_ray = False
    if not is_ray:
        raise StageError(f"what answers at {address} is no Ray dashboard; check the address")


def script(recipe: Recipe, flags: Sequence[str] = ()) -> str:
    """Returns what the job's shell runs, which finds out where it is.

    An address tells nothing of it: 127.0.0.1 may be the end of a tunnel. The machine is this one
    if it was started at the same time and has the same files. There, the job runs with this
    interpreter and this Sightline, and relative paths mean what they mean here; elsewhere with
    what is installed, and relative paths are refused.
    """
    here, package = Path.cwd(), Path(errors.__file__)
    root = package.parents[1]
    lines = [
        'recipe="$PWD/recipe.yaml"',
        f"""boot() {{ [ "$(cat {_BOOT} 2>/dev/null)" = {shlex.quote(_boot())} ]; }}""",
        'file() { stat -L -c %d:%i "$1" 2>/dev/null || stat -L -f %d:%i "$1" 2>/dev/null; }',
        'same() { boot && [ "$(file "$1")" = "$2" ]; }',
    ]
    run = " ".join(["run", '"$recipe"', *map(shlex.quote, flags)])
    relative = recipe.relative_locations()
    if relative:
        sorry = (
            f"Refused: the recipe's {relative[0]!r} is relative to {here} on the machine that "
            "submitted it, and this cluster's head is another; use absolute paths of a file system "
            "that both have, or URLs"
        )
        lines.append(
            f"if same {shlex.quote(str(here))} {_file(here)}; then cd {shlex.quote(str(here))}; "
            f"else echo {shlex.quote(sorry)} >&2; exit 64; fi"
        )
    missing = (
        "Sightline is not installed on this cluster's head: neither `sightline` nor a `python` "
        "that has it is in its PATH"
    )
    lines += [
        f"if same {shlex.quote(str(package))} {_file(package)} "
        f"&& [ -x {shlex.quote(sys.executable)} ]; then",
        f'export PYTHONPATH={shlex.quote(str(root))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"exec {shlex.quote(sys.executable)} -P -m pipeline.cli {run}",
        f"elif command -v sightline >/dev/null; then exec sightline {run}",
        "elif python -P -c 'import pipeline.cli' 2>/dev/null; then "
        f"exec python -P -m pipeline.cli {run}",
        f"else echo {shlex.quote(missing)} >&2; exit 1; fi",
    ]
    return "\n".join(lines)


_BOOT = "/proc/sys/kernel/random/boot_id"


def _boot() -> str:
    path = Path(_BOOT)
    return path.read_text().strip() if path.exists() else ""


def _file(path: Path) -> str:
    found = path.stat()
    return f"{found.st_dev}:{found.st_ino}"
