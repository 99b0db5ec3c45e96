"""What a changed setting does to a phase that was begun: with the stand-in for model and data."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import xxhash

from pipeline import storage
from pipeline.cluster import ClusterConfig
from pipeline.errors import ConfigError, TrainingError
from pipeline.pretrained.files import extractor_of
from pipeline.stages.changed import Begun, OnChange, aside, make_way, refuse
from pipeline.training.checkpoints.checkpoint import CHECKPOINTS
from pipeline.training.launch.launch import launch
from pipeline.training.spec import TrainingSpec
from pipeline.training.tracking.metrics_log import read_metrics, read_stretches
from tests.data.cards import make_card
from tests.processes import DISK_AND_OBJECT_STORE
from tests.training import flat_settings
from tests.training.stand_in import make_spec, stand_in
from tests.training.test_loop import interrupt_at

PROCESS = ClusterConfig(runner="process")
COMMAND = "sightline run birds.yaml training.pretrain.optimizer.learning_rate=0.01"

pytestmark = pytest.mark.usefixtures("alone")


def begin(folder: str, interrupted_at: int | None = 5, **training: Any) -> Begun:
    """Trains a phase up to a step, or to its end; a checkpoint is written every third step."""
    spec = make_spec(folder, **training)
    on_step = None if interrupted_at is None else interrupt_at(interrupted_at)
    assembled = partial(stand_in, on_step=on_step)
    if interrupted_at is None:
        launch(spec, PROCESS, lambda _: None, assembled)
        storage.write_bytes(f"{folder}/model/sightline.json", b"{}")  # what a real one has
    else:
        with pytest.raises(InterruptedError):
            launch(spec, PROCESS, lambda _: None, assembled)
    begun = Begun.read(folder)
    assert begun is not None
    return begun


def told(
    begun: Begun, now: TrainingSpec, decision: Literal["refuse", "continue"] = "refuse"
) -> list[str]:
    """Returns the lines of a refusal; none if nothing is refused."""
    run = begun.folder.rsplit("/", 1)[0]
    try:
        refuse(begun, begun.changes(now.reproducibility_key()), OnChange(decision, COMMAND), run)
    except ConfigError as refusal:
        return str(refusal).replace(run, "RUN").splitlines()
    return []


@pytest.fixture(params=DISK_AND_OBJECT_STORE)
def phase(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run" / "pretrain")
    return f"{request.getfixturevalue('object_store')}/run/pretrain"


def test_a_phase_that_was_never_begun_is_none(tmp_path: Path) -> None:
    assert Begun.read(str(tmp_path / "pretrain")) is None


def test_settings_that_do_not_touch_the_curve_are_not_asked_about(tmp_path: Path) -> None:
    begun = begin(str(tmp_path / "pretrain"))
    free = {
        "log_every_steps": 4,
        "checkpoints": {"keep_last": 5},
        "loading": {"threads": 1},
        "zero_stage": 2,
    }
    now = make_spec(begun.folder, timeout_seconds=9, not_finite="skip", **free)
    assert told(begun, now) == []
    assert not make_way(begun, begun.changes(now.reproducibility_key()), "refuse", print)


def test_a_refusal_names_each_key_with_both_values_and_the_commands_that_lead_on(
    tmp_path: Path,
) -> None:
    begun = begin(str(tmp_path / "pretrain"))
    now = make_spec(begun.folder, optimizer={"learning_rate": 0.01}, steps=12)
    assert told(begun, now) == [
        "pretrain in RUN has checkpoints up to step 3 of 8, and was begun with other settings:",
        "  training.pretrain.optimizer.learning_rate: 0.02 then, 0.01 now",
        "  training.pretrain.steps: 8 then, 12 now",
        "To go on from step 3 with the new settings:",
        f"  {COMMAND} --from-checkpoint",
        "To train pretrain anew (what is there is moved to pretrain.replaced-1, nothing is "
        "deleted):",
        f"  {COMMAND} --restart",
        "With the old settings it goes on as it was.",
    ]
    assert told(begun, now, "continue") == []


def test_what_would_be_another_run_is_refused_however_it_is_asked_for(tmp_path: Path) -> None:
    begun = begin(str(tmp_path / "pretrain"))
    now = make_spec(begun.folder, loading={"shuffle_window_shards": 3})
    for decision in ("refuse", "continue"):
        lines = told(begun, now, decision)
        assert lines[1:3] == [
            "  training.pretrain.loading.shuffle_window_shards: 8 then, 3 now",
            "A run cannot go on with another value of "
            "training.pretrain.loading.shuffle_window_shards.",
        ]
        assert f"  {COMMAND} --restart" in lines
        assert "  sightline export RUN/pretrain RUN-pretrain-model" in lines
        weights = "model.initial=RUN-pretrain-model model.tokenizer=RUN-pretrain-model"
        assert f"  {COMMAND} run=RUN-2 {weights}" in lines
        assert not any("--from-checkpoint" in line for line in lines)
    wider = now.model_copy(update={"model": {"width": 9}})  # its weights would fit no other
    assert not any("model.initial" in line for line in told(begun, wider))


def features_of(spec: TrainingSpec, name: str, **config: Any) -> TrainingSpec:
    card = make_card(type="pixels", config=config, dim=27).plain()
    return spec.model_copy(update={"features": name, "card": {"extractor": card}})


def test_features_that_another_release_makes_are_told_from_another_extractor(
    tmp_path: Path,
) -> None:
    begun = begin(str(tmp_path / "pretrain"))
    begun = replace(begun, spec=features_of(begun.spec, "pixels-old", image_size=6))
    for size, is_of_release in ((6, True), (9, False)):
        now = features_of(make_spec(begun.folder), "pixels-new", image_size=size)
        changes = begun.changes(now.reproducibility_key())
        with pytest.raises(ConfigError, match="pixels-old then, pixels-new now") as refusal:
            refuse(begun, changes, OnChange(command=COMMAND), "RUN", extractor_of(now.card))
        text = str(refusal.value)
        assert ("this release makes other features" in text) == is_of_release
        assert ("model.initial=" in text) == is_of_release
        assert ("With the old settings it goes on" in text) == (not is_of_release)


@pytest.mark.parametrize("name", ["num_answers", "dropout"])
def test_what_has_no_shape_leaves_the_way_open_to_start_from_the_weights(
    tmp_path: Path, name: str
) -> None:
    begun = begin(str(tmp_path / "pretrain"))
    then = begun.spec.model_copy(update={"model": {name: 0}})
    now = make_spec(begun.folder).model_copy(update={"model": {name: 0.5}})
    assert any("model.initial=" in line for line in told(replace(begun, spec=then), now))


def test_a_damaged_spec_is_told_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    folder.mkdir()
    for damaged in (b"", b"{}", b"[1]"):
        (folder / "spec.json").write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"undamaged copy .* or move .*pretrain away"):
            Begun.read(str(folder))


def test_a_finished_phase_goes_on_only_where_there_is_something_to_do(tmp_path: Path) -> None:
    begun = begin(str(tmp_path / "pretrain"), None)
    slower = make_spec(begun.folder, optimizer={"learning_rate": 0.01})
    for decision in ("refuse", "continue"):
        lines = told(begun, slower, decision)
        assert lines[0].startswith("pretrain in RUN is finished, with 8 steps, and was begun")
        assert lines[2].endswith(
            "with a larger training.pretrain.steps and --from-checkpoint it goes on."
        )
    longer = make_spec(begun.folder, optimizer={"learning_rate": 0.01}, steps=9)
    assert told(begun, longer)[3] == "To go on from step 8 with the new settings:"
    assert told(begun, longer, "continue") == []
    shorter = make_spec(begun.folder, steps=7)
    assert "at step 8, is past the new steps=7" in told(begun, shorter, "continue")[2]
    shutil.rmtree(tmp_path / "pretrain" / CHECKPOINTS)
    begun = Begun.read(begun.folder)  # type: ignore[assignment]
    assert told(begun, longer, "continue")[3] == ("It has no checkpoint that it could go on from.")


def test_a_restart_moves_all_aside_and_deletes_nothing(phase: str) -> None:
    for number in (1, 2):
        begun = begin(phase)
        before = {
            name: storage.read_bytes(f"{phase}/{name}") for name in ("spec.json", "metrics.jsonl")
        }
        checkpoints = storage.list_names(f"{phase}/checkpoints/step-00000003")
        changed = begun.changes(
            make_spec(phase).model_copy(update={"seed": 99}).reproducibility_key()
        )
        notes: list[str] = []
        assert make_way(begun, changed, "restart", notes.append)
        moved = f"{phase}.replaced-{number}"
        assert not storage.exists(f"{phase}/spec.json")
        assert {name: storage.read_bytes(f"{moved}/{name}") for name in before} == before
        assert storage.list_names(f"{moved}/checkpoints/step-00000003") == checkpoints
        assert moved in notes[-1]
    assert aside(phase) == f"{phase}.replaced-3"


def test_what_was_stopped_before_its_first_checkpoint_makes_way_with_its_logs(
    tmp_path: Path,
) -> None:
    begun = begin(str(tmp_path / "pretrain"), 2)
    now = make_spec(begun.folder, optimizer={"learning_rate": 0.01})
    assert told(begun, now) == []
    assert make_way(begun, begun.changes(now.reproducibility_key()), "refuse", print)
    assert (tmp_path / "pretrain.replaced-1" / "metrics.jsonl").exists()


def test_a_restart_of_what_has_not_changed_goes_on_unless_no_checkpoint_is_whole(
    tmp_path: Path,
) -> None:
    begun = begin(str(tmp_path / "pretrain"))
    assert not make_way(begun, (), "restart", print)
    for part in (tmp_path / "pretrain" / CHECKPOINTS).rglob("*.safetensors"):
        part.write_bytes(b"")
    assert not make_way(begun, (), "refuse", print)
    assert make_way(begun, (), "restart", print)
    assert (tmp_path / "pretrain.replaced-1" / CHECKPOINTS).exists()


def test_the_model_of_a_finished_phase_is_kept_beside_the_one_that_is_trained_on(
    tmp_path: Path,
) -> None:
    begun = begin(str(tmp_path / "pretrain"), None)
    weights = (tmp_path / "pretrain" / "model" / "model.safetensors").read_bytes()
    longer = make_spec(begun.folder, steps=10)
    assert not make_way(begun, begun.changes(longer.reproducibility_key()), "continue", print)
    begin(begun.folder, None, steps=10)
    kept = tmp_path / "pretrain" / "model.step-00000008" / "model.safetensors"
    assert kept.read_bytes() == weights
    assert (tmp_path / "pretrain" / "model" / "model.safetensors").read_bytes() != weights


def as_recorded_flat(folder: Path) -> None:
    """Leaves in a phase's folder what the release before the groups of settings left there."""
    places = (("FOLDER", str(folder)), ("PLACE", str(Path.cwd())))
    spec, sequence = flat_settings.SPEC, flat_settings.SEQUENCE
    for word, place in places:
        spec, sequence = spec.replace(word, place), sequence.replace(word, place)
    (folder / "spec.json").write_text(spec)
    for path in [*folder.rglob("manifest.json"), folder / "result.json"]:
        if path.exists():
            document = json.loads(path.read_bytes())
            document["sequence"] = json.loads(sequence)
            del document["reproducibility_key"]
            document["tally"] = document.pop("run_state")
            if path.name == "manifest.json":
                document |= {"format": 3}
                del document["digest"]
                digest = xxhash.xxh3_128(json.dumps(document, indent=1).encode()).hexdigest()
                document["digest"] = digest
            path.write_text(json.dumps(document, indent=1))


def test_a_phase_begun_when_settings_had_no_groups_goes_on_exactly(tmp_path: Path) -> None:
    begin(str(tmp_path / "pretrain"))
    as_recorded_flat(tmp_path / "pretrain")
    begun = Begun.read(str(tmp_path / "pretrain"))
    assert begun is not None
    now = make_spec(begun.folder)
    assert begun.spec == now
    assert begun.changes(now.reproducibility_key()) == ()
    begin(begun.folder, None)
    unbroken = begin(str(tmp_path / "unbroken"), None)
    losses = [[line["loss"] for line in read_metrics(one.folder)] for one in (begun, unbroken)]
    assert losses[0] == losses[1]
    assert not read_stretches(begun.folder)
    as_recorded_flat(tmp_path / "pretrain")
    again = Begun.read(begun.folder)
    assert again is not None
    assert again.finished is not None
    assert told(again, make_spec(begun.folder, optimizer={"learning_rate": 0.01}))[1] == (
        "  training.pretrain.optimizer.learning_rate: 0.02 then, 0.01 now"
    )


def test_the_many_processes_of_torchrun_move_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(str(tmp_path / "pretrain"))
    changed = begun.changes(make_spec(begun.folder, steps=9).reproducibility_key())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"move it to .*pretrain\.replaced-1 yourself"):
        make_way(begun, changed, "restart", print)
    assert (tmp_path / "pretrain" / CHECKPOINTS).exists()
