"""Fixtures that several test folders share: real data where present, a real Ray, a real S3.

Tests have a home of their own, empty at the start, so that none depends on what lies in the
user's or leaves something there.
"""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO

import boto3
import pytest
import s3fs

from pipeline.cluster import ClusterConfig, start_ray
from tests.ray_head import RayHead

pytest_plugins = ["tests.order", "tests.processes"]

_home = pytest.StashKey[str]()
_compiled = pytest.StashKey[IO[bytes]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_home] = os.environ["HOME"] = tempfile.mkdtemp(prefix="sightline-home-")
    if not hasattr(config, "workerinput"):  # those of pytest-xdist take the folder from here
        os.environ["TORCH_EXTENSIONS_DIR"] = str(compiled_folder(config))


def compiled_folder(config: pytest.Config) -> Path:
    """Where DeepSpeed compiles what it swaps with, which takes minutes: a folder of pytest's cache.

    One of this session's own if there is no cache, or another session is using it.
    """
    own = Path(config.stash[_home]) / "compiled"
    cache: pytest.Cache | None = getattr(config, "cache", None)
    if cache is None:
        return own
    with_what = "-".join(version(name) for name in ("torch", "deepspeed"))
    folder = cache.mkdir(f"compiled-{sys.implementation.cache_tag}-{with_what}")
    lock = (folder / "in-use").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return own
    config.stash[_compiled] = lock  # until this process ends, however it does
    for left in folder.glob("*/lock"):  # of a session that was killed: torch would wait for it
        left.unlink()
    return folder


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_home], ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, annotations and weights beside the repository, or a skip."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data of {folder}, which is absent")
    return folder


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """The pictures drawn for tests, and real photographs where there are some."""
    tests = Path(__file__).resolve().parent
    real = tests.parents[1] / "shared" / "data" / "coco" / "val2017"
    return [*sorted((tests / "pictures").glob("*.jpg")), *sorted(real.glob("*.jpg"))]


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A real local Ray with two CPUs, shared by the tests of a session."""
    import ray

    if ray.is_initialized():  # a command that an earlier test ran leaves its own to its process
        ray.shutdown()
    start_ray(ClusterConfig(workers=2))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")  # an idle Ray takes a tenth of a processor
def plain_head() -> Iterator[RayHead]:
    """A cluster that anybody on this machine may join."""
    head = RayHead(token=False)
    try:
        yield head.wait()
    finally:
        head.kill()


@pytest.fixture(scope="module")
def token_head() -> Iterator[RayHead]:
    """A cluster that wants a token."""
    head = RayHead(token=True)
    try:
        yield head.wait()
    finally:
        head.kill()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 server. A process of its own: deltalake holds the interpreter's lock
    while it waits for an answer, so that a server in a thread could never give one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        server.kill()


@pytest.fixture
def object_store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty folder on an S3 server, which the environment leads to."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the endpoint it was made with
    yield f"s3://{bucket}/data"
    s3fs.S3FileSystem.clear_instance_cache()
