from pathlib import Path

import pytest

from tests.training.stand_in import make_spec


def test_locations_mean_the_same_in_every_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_spec("runs/a").folder == str(tmp_path / "runs" / "a")
    assert make_spec("s3://bucket/a").folder == "s3://bucket/a"


def test_a_run_is_the_same_however_it_is_spread_and_another_with_another_rate() -> None:
    run = make_spec("here").reproducibility_key()
    spread = make_spec("there", zero_stage=3, micro_batch_size=4, checkpoints={"every_steps": 1})
    assert spread.reproducibility_key() == run
    assert (
        make_spec(
            "here", not_finite="skip", checkpoints={"keep_every_hours": 1}
        ).reproducibility_key()
        == run
    )
    assert make_spec("here", optimizer={"freeze": ["*.bias"]}).reproducibility_key() != run
    assert make_spec("here", optimizer={"learning_rate": 1e-5}).reproducibility_key() != run
