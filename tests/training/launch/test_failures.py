from pathlib import Path

from pipeline.errors import FeatureError, TrainingError
from pipeline.training.launch.failures import in_one_sentence
from tests.training.stand_in import make_spec


def test_what_ends_a_rank_is_told_in_a_sentence_and_the_trace_kept(tmp_path: Path) -> None:
    from ray.exceptions import ActorDiedError, OutOfMemoryError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    spec = make_spec(tmp_path / "run")
    lost = WorkerGroupError("a trace\nof many lines", {1: KeyError("bird"), 0: OSError("gone")})
    told = in_one_sentence(lost, spec)
    trace = tmp_path / "run" / "failure.txt"
    assert isinstance(told, TrainingError)
    assert str(told).startswith("pretrain: rank 0: OSError: gone; rank 1: KeyError: 'bird'; ")
    assert str(told).endswith(str(trace))
    assert "of many lines" in trace.read_text()
    ours = WorkerGroupError("…", {0: ConnectionError("closed"), 1: FeatureError("no features")})
    assert str(in_one_sentence(ours, spec)) == "rank 1: no features"
    gone = WorkerGroupError("…", {0: ActorDiedError(), 1: ModuleNotFoundError("No module 'x'")})
    assert str(in_one_sentence(gone, spec)).startswith(
        "pretrain: rank 0: lost, with its node or by itself, and not to be restarted "
        "(cluster.max_failures); start again: it goes on from the last checkpoint; rank 1: No "
        "module 'x' on its node; install Sightline"
    )
    full = in_one_sentence(ControllerError(OutOfMemoryError("Refer to …")), spec)
    assert str(full).startswith("pretrain: the process that leads the ranks: its machine's memory")
    refused = ControllerError(FeatureError("rank 3: no features"))
    assert in_one_sentence(refused, spec) is refused.controller_failure
