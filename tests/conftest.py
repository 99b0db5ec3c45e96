"""Fixtures that several test folders share: real data where present, a real local Ray."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, annotations and weights beside the repository, or a skip."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data of {folder}, which is absent")
    return folder


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A real local Ray with two CPUs, shared by the tests of a session."""
    import ray

    with tempfile.TemporaryDirectory(prefix="sl-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
