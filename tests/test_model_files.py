from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.model_files import digest, is_original, read_original, read_weights
from pipeline.models import layouts
from pipeline.models.families import FAMILIES, build
from pipeline.training.model_folder import initialise
from tests.models.examples import (
    lxmert_config,
    randomise,
    uniter_config,
    vilbert_config,
    visualbert_config,
)

TENSORS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "make_config", "suffix"),
    [
        ("visualbert", partial(visualbert_config, visual_token_type=0), "th"),
        ("lxmert", lxmert_config, "pth"),
        ("vilbert", vilbert_config, "bin"),
        ("uniter", uniter_config, "pt"),
    ],
)
def test_a_model_starts_from_the_file_that_its_authors_publish(
    family: str, make_config: Callable[[], Any], suffix: str, tmp_path: Path
) -> None:
    theirs = randomise(build(make_config()))
    layout = FAMILIES[family].layouts["original"](theirs.config)
    spelled = layouts.export(layout, dict(theirs.named_parameters()))
    spelled = {f"module.{name}": tensor for name, tensor in spelled.items()}  # as DataParallel does
    location = saved(tmp_path / f"weights.{suffix}", spelled)
    ours = build(make_config())
    assert initialise(ours, location).new == ()
    assert same(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_a_family_without_published_weights_refuses_such_a_file(tmp_path: Path) -> None:
    from tests.models.examples import late_fusion_config

    location = saved(tmp_path / "weights.pth", TENSORS)
    with pytest.raises(ModelError, match="layout 'original': LateFusion reads saved, bert"):
        initialise(build(late_fusion_config()), location)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_what_a_training_script_wraps_weights_in_is_taken_off(wrapper: str, tmp_path: Path) -> None:
    bare = saved(tmp_path / "bare.pth", TENSORS)
    wrapped = saved(tmp_path / "wrapped.pth", {wrapper: TENSORS, "epoch": 3})
    assert same(read_original(bare), TENSORS)
    assert same(read_original(wrapped), TENSORS)


class Shell:
    """What a pickle can hold: something to run when it is loaded."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Shell, "ran", True))


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(tmp_path: Path) -> None:
    location = saved(tmp_path / "evil.pth", {**TENSORS, "shell": Shell()})
    with pytest.raises(ModelError, match=r"evil\.pth: not a file of tensors.*nothing was run"):
        read_original(location)
    assert not Shell.ran


@pytest.mark.parametrize("content", [[1, 2], {}, {**TENSORS, "lr": 0.1}])
def test_a_file_of_something_else_is_refused_by_name(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"odd\.pt: expected (named )?tensors"):
        read_original(saved(tmp_path / "odd.pt", content))


def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    location = saved(tmp_path / "cut.th", TENSORS)
    payload = Path(location).read_bytes()
    Path(location).write_bytes(payload[: len(payload) // 2])
    with pytest.raises(ModelError, match=r"cut\.th: .*damaged"):
        read_original(location)
    with pytest.raises(ModelError, match=r"none\.th"):
        read_original(str(tmp_path / "none.th"))


def test_a_folder_from_before_safetensors_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    saved(tmp_path / "pytorch_model.bin", TENSORS)
    document, tensors = read_weights(str(tmp_path))
    assert document == {"model_type": "bert"}
    assert same(tensors, TENSORS)


def test_the_digest_is_of_the_weights(tmp_path: Path) -> None:
    folder, location = tmp_path / "folder", saved(tmp_path / "weights.pth", TENSORS)
    folder.mkdir()
    safetensors.torch.save_file(TENSORS, folder / "model.safetensors")
    before = digest(str(folder)), digest(location)
    assert len(set(before)) == 2
    (folder / "README.md").write_text("more about it")
    assert digest(str(folder)) == before[0]
    safetensors.torch.save_file({"layer.bias": torch.zeros(2)}, folder / "model.safetensors")
    assert digest(str(folder)) != before[0]
    assert is_original(location)
    assert not is_original(str(folder))
