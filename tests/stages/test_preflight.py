from pathlib import Path

import pytest
from rich.console import Console

from pipeline.data.read.dataset import Dataset
from pipeline.errors import ConfigError
from pipeline.stages.preflight import (
    initial_weights,
    preflight,
    require_splits,
    require_writable,
    small_validation,
)
from pipeline.stages.run import run_stages
from tests.stages.small_recipe import small


def test_what_can_be_run_is_not_refused(tmp_path: Path) -> None:
    preflight(small(tmp_path), ["ingest", "extract", "pretrain", "finetune"])
    assert list(tmp_path.iterdir()) == []


def test_every_missing_file_and_unknown_key_is_told_at_once(tmp_path: Path) -> None:
    recipe = small(
        tmp_path,
        f"model.tokenizer={tmp_path / 'words'}",
        f"dataset.mixed_in=[{{path: {tmp_path / 'other'}}}]",
        "training.finetune.deepspeed={zero_optimisation: {}}",
    )
    with pytest.raises(ConfigError) as refusal:
        preflight(recipe)
    told = str(refusal.value)
    for key in ("model.tokenizer: ", "dataset.mixed_in.0.path: ", "training.finetune.deepspeed"):
        assert key in told
    assert len(told.splitlines()) >= 3


def test_a_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run: .*: a file is there; give the path of a folder"):
        preflight(small(tmp_path, f"run={tmp_path / 'file'}"))
    with pytest.raises(ConfigError, match="a dataset is there; give the run a folder of its own"):
        preflight(small(tmp_path, f"run={tmp_path / 'data'}"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: another\n")
    with pytest.raises(ConfigError, match="the run 'another' is there"):
        preflight(small(tmp_path))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"choose another folder, as `run=…`"):
        require_writable(str(tmp_path / "file" / "run"))
    require_writable(str(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []


def test_weights_to_begin_with_need_their_own_words(finished: Path, tmp_path: Path) -> None:
    assert initial_weights(small(tmp_path)) is None
    taken = initial_weights(small(tmp_path, f"model.initial={finished / 'run' / 'model'}"))
    assert taken is not None
    assert taken.loaded
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ConfigError, match="its words are numbered as by its own vocabulary"):
        initial_weights(small(tmp_path, f"model.initial={tmp_path / 'weights.pth'}"))


def test_splits_are_looked_for_with_the_texts_that_benchmarks_are_of(tmp_path: Path) -> None:
    run_stages(small(tmp_path), ["ingest"], Console(stderr=True, quiet=True))
    dataset = Dataset.open(str(tmp_path / "data"))
    require_splits(small(tmp_path), dataset)
    with pytest.raises(ConfigError, match=r"found 'test', of which .* has no sample; its splits"):
        require_splits(small(tmp_path, "dataset.validation_split=test"), dataset)
    told = small_validation(small(tmp_path), dataset)
    assert told is not None
    assert "'validation' has 12 samples" in told
    assert small_validation(small(tmp_path, "dataset.validation_split=train"), dataset) is None
