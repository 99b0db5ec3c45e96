import json
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.training.result import finished_result
from tests.training.stand_in import make_spec


@pytest.mark.parametrize(
    "damaged",
    ["", "[1]", '{"reproducibility_key": {}}', '{"reproducibility_key": {}, "result": {}}'],
)
def test_a_damaged_result_is_named_with_what_to_do(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "result.json").write_text(damaged)
    with pytest.raises(CheckpointError, match=r"result\.json: damaged: .*remove it"):
        finished_result(make_spec(tmp_path))


@pytest.mark.parametrize("name", ["reproducibility_key", "sequence"])
def test_a_result_is_read_by_both_names_that_its_key_has_had(tmp_path: Path, name: str) -> None:
    spec = make_spec(tmp_path)
    (tmp_path / "model").mkdir()
    result = {"state": "finished", "step": 8, "steps": 8, "loss": 0.5}
    document = {name: spec.reproducibility_key(), "result": result}
    (tmp_path / "result.json").write_text(json.dumps(document))
    found = finished_result(spec)
    assert found is not None
    assert (found.step, found.already_finished) == (8, True)
