import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models import layouts
from pipeline.models.families import FAMILIES, build
from pipeline.pretrained.files import digest, is_original, read_original, read_weights
from pipeline.pretrained.folder import initialise
from tests.models.examples import (
    lxmert_config,
    randomise,
    transformers_visualbert_config,
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


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_as_one(kind: str, tmp_path: Path) -> None:
    theirs = transformers.VisualBertForPreTraining(transformers_visualbert_config())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    theirs.save_pretrained(whole)
    if kind == "safetensors":
        theirs.save_pretrained(parts, max_shard_size="8KB")
    else:
        as_pickles(whole, parts)
    index = next(parts.glob("*.index.json"))
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    expected, found = read_weights(str(whole))[1], read_weights(str(parts))[1]
    assert same(found, expected)
    before = digest(str(parts))
    shard = sorted(parts.glob(f"*-of-*.{kind}"))[1]
    payload = shard.read_bytes()
    shard.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    assert digest(str(parts)) != before
    shard.unlink()
    with pytest.raises(ModelError, match=re.escape(shard.name)):
        read_weights(str(parts))
    with pytest.raises(ModelError, match=re.escape(shard.name)):
        digest(str(parts))


def as_pickles(whole: Path, parts: Path) -> None:
    """Writes a folder's weights as `pytorch_model-0000i-of-0000n.bin` with their index."""
    parts.mkdir()
    shutil.copy(whole / "config.json", parts)
    tensors = list(read_weights(str(whole))[1].items())
    named: dict[str, str] = {}
    for number in range(4):
        name = f"pytorch_model-{number + 1:05d}-of-00004.bin"
        torch.save(dict(tensors[number::4]), parts / name)
        named |= {tensor: name for tensor, _ in tensors[number::4]}
    index = {"metadata": {"total_size": 0}, "weight_map": named}
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "expected an object, found list"),
        ({}, "weight_map: expected the file of each tensor"),
        ({"weight_map": {"a": "../a.safetensors"}}, "weight_map.a: '../a.safetensors' is no name"),
        ({"weight_map": {"a": 3}}, "weight_map.a: 3 is no name"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
        ({"weight_map": {"b": "a.safetensors"}}, "1 tensors that no file holds, as b"),
    ],
)
def test_a_damaged_index_is_named(document: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=said):
        read_weights(str(tmp_path))


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


def test_lxrt_starts_a_phase_without_answers(tmp_path: Path) -> None:
    """LXRT.pth is LxmertForPreTraining of 9,500 answers, as DataParallel names it."""
    sizes = lxmert_config()
    theirs = transformers.LxmertForPreTraining(
        transformers.LxmertConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            num_attention_heads=sizes.num_heads,
            intermediate_size=sizes.intermediate_size,
            max_position_embeddings=sizes.max_positions,
            l_layers=sizes.text_layers,
            r_layers=sizes.region_layers,
            x_layers=sizes.cross_layers,
            visual_feat_dim=sizes.feature_dim,
            num_object_labels=sizes.num_objects,
            num_attr_labels=sizes.num_attributes,
            num_qa_labels=95,
        )
    )
    published = {
        f"module.{re.sub('^lxmert', 'bert', name)}": tensor
        for name, tensor in theirs.state_dict().items()
    }
    location = saved(tmp_path / "LXRT.pth", published)
    ours = build(lxmert_config(num_answers=0))
    report = initialise(ours, location, fresh=("answer_head",))
    assert report.new == ()
    assert layouts.grouped(report.ignored) == ["answer_head.logit_fc.0,2-3 (6)"]
    words = theirs.lxmert.embeddings.word_embeddings.weight
    assert torch.equal(dict(ours.named_parameters())["text_embeddings.word.weight"], words)
    asking = build(lxmert_config(num_answers=95))
    report = initialise(asking, location, fresh=("answer_head",))
    assert {name.split(".")[0] for name in report.new} == {"answer_head"}
