import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError
from pipeline.training.checkpoints import checkpoint
from pipeline.training.checkpoints.checkpoint import Saving, Writer
from pipeline.training.checkpoints.run_state import RunState

WRITER = Writer(reproducibility_key={"seed": 1}, zero_stage=1, precision="fp32")

pytestmark = pytest.mark.usefixtures("alone")


def states(step: int) -> Iterator[tuple[str, Tensor]]:
    yield "weight/a", torch.full((2, 3), float(step))
    yield "exp_avg/a", torch.arange(6.0).reshape(2, 3) / 7
    yield "buffer/n", torch.tensor([step])


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        Saving(str(folder), step, states(step), RunState(skipped=step % 2), WRITER).finish()


def newest(folder: Path) -> tuple[int | None, list[str]]:
    damaged: list[str] = []
    manifest = checkpoint.newest(str(folder), folder, damaged.append)
    return manifest.step if manifest else None, damaged


def flip_a_bit(path: Path) -> None:
    payload = bytearray(path.read_bytes())
    payload[-3] ^= 0b100
    path.write_bytes(payload)


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path, 4)
    location = str(tmp_path / "step-00000004")
    manifest = checkpoint.verify(location, tmp_path)
    read = checkpoint.reader(location, manifest, tmp_path)
    for name, tensor in states(4):
        assert torch.equal(read(name), tensor)
    with pytest.raises(CheckpointError, match="no tensor 'weight/b'"):
        read("weight/b")


def test_the_newest_is_found_and_nothing_in_an_empty_folder(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") == (None, [])
    save(tmp_path, 3, 12, 6)
    assert newest(tmp_path) == (12, [])


def damage_by_flipping_a_bit(folder: Path) -> None:
    flip_a_bit(folder / "rank-00000.safetensors")


def damage_by_cutting_short(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_removing_a_part(folder: Path) -> None:
    (folder / "rank-00000.safetensors").unlink()


def damage_by_removing_the_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).unlink()


def damage_by_tearing_the_manifest(folder: Path) -> None:
    path = folder / checkpoint.MANIFEST
    path.write_bytes(path.read_bytes()[:40])


def damage_by_renaming(folder: Path) -> None:
    folder.rename(folder.with_name("step-00000099"))


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_flipping_a_bit,
        damage_by_cutting_short,
        damage_by_removing_a_part,
        damage_by_removing_the_manifest,
        damage_by_tearing_the_manifest,
        damage_by_renaming,
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Any
) -> None:
    save(tmp_path, 3, 6, 9)
    damage(tmp_path / "step-00000009")
    step, (reason,) = newest(tmp_path)
    assert step == 6
    assert "step-000000" in reason


def test_any_bit_that_flips_in_a_manifest_is_found(tmp_path: Path) -> None:
    save(tmp_path, 3, 9)
    path = tmp_path / "step-00000009" / checkpoint.MANIFEST
    whole = path.read_bytes()
    bits = np.random.default_rng(5).integers(8, size=len(whole))
    flips = [(place, 1 << bit) for place, bit in enumerate(bits.tolist())]
    format_digit = whole.index(b'"format": 4') + len(b'"format": ')
    for place, flip in [*flips, (format_digit, 6)]:  # of 4 that makes 2, which has no digest
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"step-00000009/manifest\.json"):
            checkpoint.read_manifest(str(path.parent))
    assert newest(tmp_path)[0] == 3
    path.write_bytes(whole)
    assert newest(tmp_path) == (9, [])


def test_any_bit_that_flips_in_a_part_is_found(tmp_path: Path) -> None:
    save(tmp_path, 9)
    path = tmp_path / "step-00000009" / "rank-00000.safetensors"
    whole = path.read_bytes()
    bits = np.random.default_rng(6).integers(8, size=len(whole))
    for place, bit in enumerate(bits.tolist()):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is damaged"):
            checkpoint.verify(str(path.parent), tmp_path)


def in_older_words(manifest: dict[str, Any], format_number: int) -> dict[str, Any]:
    """Returns a manifest's document, without its digest, as format 3 and 2 have it."""
    names = {"run_state": "tally", "reproducibility_key": "sequence"}
    older = {names.get(name, name): value for name, value in manifest.items() if name != "digest"}
    return older | {"format": format_number}


def test_a_checkpoint_in_the_words_of_format_3_is_read_and_damage_to_it_found(
    tmp_path: Path,
) -> None:
    save(tmp_path, 9)
    path = tmp_path / "step-00000009" / checkpoint.MANIFEST
    now = checkpoint.read_manifest(str(path.parent))
    older = in_older_words(json.loads(path.read_bytes()), 3)
    digest = xxhash.xxh3_128(json.dumps(older, indent=1).encode()).hexdigest()
    path.write_text(json.dumps(older | {"digest": digest}, indent=1))
    assert newest(tmp_path) == (9, [])
    assert checkpoint.read_manifest(str(path.parent)) == replace(now, format=3)
    path.write_text(json.dumps(older | {"zero_stage": 2, "digest": digest}, indent=1))
    with pytest.raises(CheckpointError, match="is damaged: its content"):
        newest(tmp_path)


def test_a_checkpoint_from_before_manifests_had_a_digest_is_read(tmp_path: Path) -> None:
    save(tmp_path, 9)
    path = tmp_path / "step-00000009" / checkpoint.MANIFEST
    document = json.loads(path.read_bytes())
    del document["digest"]
    path.write_text(json.dumps(in_older_words(document, 2), indent=1))
    assert newest(tmp_path) == (9, [])
    path.write_text(json.dumps(document, indent=1))
    with pytest.raises(CheckpointError, match="is damaged"):
        newest(tmp_path)


def test_no_whole_checkpoint_is_an_error_that_says_why_and_how_to_start_over(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run" / "pretrain" / "checkpoints"
    save(folder, 3, 6)
    flip_a_bit(folder / "step-00000003" / "rank-00000.safetensors")
    (folder / "step-00000006" / checkpoint.MANIFEST).unlink()
    expected = (
        f"{folder}: none of the checkpoints is whole:\n"
        f"  {folder}/step-00000006/manifest.json cannot be read: .*\n"
        f"  {folder}/step-00000003: rank-00000.safetensors is damaged: .*\n"
        f".* --restart, which moves {tmp_path}/run/pretrain aside"
    )
    damaged: list[str] = []
    with pytest.raises(CheckpointError) as error:
        checkpoint.newest(str(folder), tmp_path, damaged.append)
    assert re.match(expected, str(error.value)), error.value
    assert len(damaged) == 2


def test_what_an_object_store_holds_of_a_killed_writer_is_no_checkpoint(object_store: str) -> None:
    Saving(object_store, 3, states(3), RunState(), WRITER).finish()
    storage.write_bytes(f"{object_store}/step-00000006/rank-00000.safetensors", b"half")
    assert checkpoint.steps_in(object_store) == [3]


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    save(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"rank 0 could not write its part.*No space left"):
        save(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_killed_writer_leaves_only_what_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-00000006.partial").mkdir()
    (tmp_path / "step-00000006.partial" / "rank-00000.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == (3, [])
    checkpoint.remove_leftovers(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path: Path) -> None:
    save(tmp_path, 3, 6)
    flip_a_bit(tmp_path / "step-00000006" / "rank-00000.safetensors")
    save(tmp_path, 6)
    assert newest(tmp_path) == (6, [])


def test_nothing_appears_before_it_is_finished_and_later_changes_are_not_in_it(
    tmp_path: Path,
) -> None:
    tensor = torch.zeros(5)
    saving = Saving(str(tmp_path), 3, iter([("weight/a", tensor)]), RunState(), WRITER)
    tensor += 1
    saving.wait()
    assert saving.is_written()
    assert newest(tmp_path) == (None, [])
    location = saving.finish()
    manifest = checkpoint.verify(location, tmp_path)
    assert checkpoint.reader(location, manifest, tmp_path)("weight/a").tolist() == [0.0] * 5


def test_the_run_state_comes_back_with_the_tensors(tmp_path: Path) -> None:
    run_state = RunState(
        skipped=2, evaluation={"loss": 0.1}, best=0.1, loss_scale={"cur_scale": 2.0}
    )
    Saving(str(tmp_path), 3, states(3), run_state, WRITER).finish()
    assert checkpoint.read_manifest(str(tmp_path / "step-00000003")).run_state == run_state


def test_the_weights_are_read_with_the_average_where_there_is_one(tmp_path: Path) -> None:
    def averaged() -> Iterator[tuple[str, Tensor]]:
        yield from states(3)
        yield "average/a", torch.zeros(2, 3)
        yield "weight/frozen", torch.ones(1)

    location = Saving(str(tmp_path), 3, averaged(), RunState(), WRITER).finish()
    manifest = checkpoint.read_manifest(location)
    read = checkpoint.reader(location, manifest, tmp_path)
    for is_average, figure in ((False, 3.0), (True, 0.0)):
        found = checkpoint.weights(manifest, read, is_average)
        assert {name: tensor.flatten()[0].item() for name, tensor in found.items()} == {
            "a": figure,
            "n": 3,
            "frozen": 1,
        }


def test_the_manifest_names_every_file_with_its_size_and_digest(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert {file["name"] for file in manifest["files"]} | {checkpoint.MANIFEST} == {
        path.name for path in folder.iterdir()
    }
    assert all(
        file["size_bytes"] == (folder / file["name"]).stat().st_size and len(file["digest"]) == 32
        for file in manifest["files"]
    )
