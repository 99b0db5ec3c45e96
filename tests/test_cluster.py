import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cluster, config
from pipeline.cluster import ClusterConfig, search_path, start_ray
from pipeline.errors import ClusterError, ConfigError
from tests.ray_head import RayHead

# A process that joins, and lets a worker say where it has its modules from.
JOIN = """
import sys
from pipeline import cluster
from pipeline.errors import ClusterError
address = sys.argv[1] if len(sys.argv) > 1 else None
try:
    cluster.start_ray(cluster.ClusterConfig(address=address))
except ClusterError as error:
    sys.exit(str(error))
import ray
print("joined", cluster.connection.address)
print("folders", ray.get(ray.remote(cluster.search_path).remote()))
"""
TOKEN_PLACES = (
    r"RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
)


def joined(*arguments: str, env: dict[str, str], cwd: Path | None = None) -> str:
    """Returns what a process says that joined; its one sentence if it could not."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", JOIN, *arguments],
        env=env | {"PYTHONPATH": str(Path(cluster.__file__).parents[1])},
        cwd=cwd or env["HOME"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.slow
class TestJoining:
    def test_a_cluster_without_a_token_is_joined(self, plain_head: RayHead, tmp_path: Path) -> None:
        assert "joined 127.0.0.1:" in joined(plain_head.address, env=plain_head.environment)
        left = tmp_path / "token"  # by another cluster of this user
        left.write_text("0" * 64)
        env = plain_head.environment | {"RAY_AUTH_TOKEN_PATH": str(left)}
        assert "joined" in joined(plain_head.address, env=env)

    def test_a_cluster_with_a_token_is_joined_by_who_has_it(self, token_head: RayHead) -> None:
        assert "joined" in joined(token_head.address, env=token_head.environment)
        home = token_head.folder / "other-home"
        (home / ".ray").mkdir(parents=True)
        given = Path(token_head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        (home / ".ray" / "auth_token").write_text(given)
        env = {**token_head.environment, "HOME": str(home), "RAY_ADDRESS": token_head.address}
        del env["RAY_AUTH_TOKEN_PATH"]
        assert "joined" in joined("auto", env=env)

    def test_a_missing_or_wrong_token_is_one_sentence(self, token_head: RayHead) -> None:
        env = dict(token_head.environment)
        path = Path(env.pop("RAY_AUTH_TOKEN_PATH"))
        said = joined(token_head.address, env=env)
        assert f"the Ray at {token_head.address} wants a token; " in said
        assert TOKEN_PLACES in said
        said = joined(token_head.address, env=env | {"RAY_AUTH_TOKEN": "0" * 64})
        assert "does not take the token it was given; " in said
        assert TOKEN_PLACES in said
        gone = str(path.with_name("gone"))
        said = joined(token_head.address, env=env | {"RAY_AUTH_TOKEN_PATH": gone})
        assert f"RAY_AUTH_TOKEN_PATH: {gone} cannot be read" in said
        for text in said.splitlines()[1:]:
            assert text == ""

    def test_a_dashboards_port_is_told_from_the_clusters(self, plain_head: RayHead) -> None:
        address = plain_head.dashboard.removeprefix("http://")
        assert "give the port that `ray start --head` prints" in joined(
            address, env=plain_head.environment
        )

    @pytest.mark.parametrize("own", [True, False], ids=["own", "joined"])
    def test_workers_take_nothing_from_the_working_folder(
        self, plain_head: RayHead, tmp_path: Path, own: bool
    ) -> None:
        for name in ("pipeline", "jobs", "queue", "torch"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
        address = [] if own else [plain_head.address]
        assert "folders" in joined(*address, env=plain_head.environment, cwd=tmp_path)


def test_workers_look_where_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = str(Path(cluster.__file__).parents[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", package)])
    assert search_path() == [package]
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert search_path() == [package, str(tmp_path)]
    monkeypatch.setattr("sysconfig.get_path", lambda _name: package)  # as a wheel is installed
    assert search_path() == [str(tmp_path)]


def test_a_range_of_workers_is_one_and_needs_nodes() -> None:
    assert list(ClusterConfig(workers=3).world_sizes()) == [3]
    assert list(ClusterConfig(workers=3, min_workers=1).world_sizes()) == [1, 2, 3]
    with pytest.raises(ConfigError, match="min_workers=3 is more than workers=2"):
        config.check(ClusterConfig, {"workers": 2, "min_workers": 3}, "cluster")
    with pytest.raises(ConfigError, match="loses and gains no nodes"):
        config.check(ClusterConfig, {"runner": "process", "min_workers": 1}, "cluster")


def test_an_address_has_no_use_in_one_process() -> None:
    with pytest.raises(ConfigError, match="no use for address"):
        config.check(ClusterConfig, {"runner": "process", "address": "auto"}, "cluster")


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "local", "127.0.0.1", ":6379", "a b:1", ""],
)
def test_what_is_no_address_is_refused_in_one_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=r"address: found .*expected auto, or the host:port") as e:
        config.check(ClusterConfig, {"address": address}, "cluster")
    assert len(str(e.value).splitlines()) <= 2  # the first names the document


@pytest.mark.parametrize(
    "address", ["auto", "10.0.0.1:6379", "ray-head.example.org:6379", "[::1]:1"]
)
def test_an_address_is_auto_or_a_host_and_port(address: str) -> None:
    assert config.check(ClusterConfig, {"address": address}, "cluster").address == address


def test_auto_with_an_address_of_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match=r"takes RAY_ADDRESS='http://127\.0"):
        start_ray(ClusterConfig(address="auto"))


def test_an_address_where_no_ray_answers_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):  # of a Ray that an earlier test started
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClusterError, match=f"no Ray answers at 127.0.0.1:{port}"):
        start_ray(ClusterConfig(address=f"127.0.0.1:{port}"))
