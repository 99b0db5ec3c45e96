import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline.errors import FeatureError
from pipeline.vision.extractors import weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_every_kind_of_file_gives_the_same_network(tmp_path: Path, suffix: str) -> None:
    source, target = network(), network()
    path = str(tmp_path / f"weights{suffix}")
    if suffix == ".safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    assert weights.digest(source) != weights.digest(target)
    weights.assign(target, weights.load(path), path)
    assert weights.digest(source) == weights.digest(target)


def test_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"weight": Path("made-by-unpickling")}, protocol=2))
    with pytest.raises(FeatureError, match=r"evil\.pth"):
        weights.load(str(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    torch.save(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FeatureError, match=f"cut{suffix}"):
        weights.load(str(path))


def test_checkpoint_of_a_training_run_is_refused_naming_its_keys(tmp_path: Path) -> None:
    path = str(tmp_path / "run.pth")
    torch.save({"epoch": 3, "model": network().state_dict()}, path)
    with pytest.raises(FeatureError, match="epoch, model"):
        weights.load(path)


def test_weights_of_another_network_are_refused_naming_keys_and_shapes() -> None:
    state = dict(network().state_dict())
    state["0.weight"] = torch.zeros(5, 3, 7, 7)
    del state["1.bias"]
    with pytest.raises(FeatureError, match=r"1 absent: 1\.bias.*0\.weight \(5, 3, 7, 7\)"):
        weights.assign(network(), state, "other.pth")


def test_layers_above_the_node_are_not_needed() -> None:
    state = dict(network().state_dict()) | {"classifier.weight": torch.zeros(2, 2)}
    weights.assign(network(), state, "whole.pth")


def test_missing_file_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="no such file: /"):
        weights.check_file(str(tmp_path / "absent.pth"))
    with pytest.raises(FeatureError, match="expected 'default', 'random' or a file"):
        weights.check_file("resnet50")


def test_unreachable_download_says_which_file_goes_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "http://127.0.0.1:9/models/net-0123abcd.pth"
    for attempt in (weights.check_download, weights.download):
        with pytest.raises(FeatureError, match=r"net-0123abcd\.pth") as refused:
            attempt(url)
        assert str(tmp_path / "checkpoints" / "net-0123abcd.pth") in str(refused.value)


def test_download_is_kept_whole_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source = tmp_path / "net-00000000.pth"
    source.write_bytes(b"not what the name promises")
    with pytest.raises(FeatureError, match="damaged download"):
        weights.download(source.as_uri())
    plain = tmp_path / "net.pth"
    plain.write_bytes(b"bytes")
    assert weights.download(plain.as_uri()).read_bytes() == b"bytes"
    plain.unlink()
    weights.check_download(plain.as_uri())  # kept: the source is needed no more
