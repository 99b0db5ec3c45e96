"""Models taken out of a run whose every part is real, and opened by others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from pipeline.data.read.dataset import Dataset
from pipeline.errors import CheckpointError, ConfigError, ModelError
from pipeline.models.blocks import fourier_boxes
from pipeline.models.inputs import Inputs
from pipeline.pretrained.folder import load_model
from pipeline.stages.export import export
from pipeline.stages.predict import predict
from pipeline.stages.run import STAGES, run_stages
from tests.stages.small_recipe import small

POSITION_FOURIER = 8  # of the small recipe
LXMERT = [
    "model.family=lxmert",
    "model.sizes={width: 16, num_heads: 2, intermediate_size: 24, text_layers: 1, "
    "region_layers: 1, cross_layers: 1, max_positions: 32, dropout: 0.0}",
    "training.pretrain=null",
    "objectives=null",
    "training.blind_twin=false",
    "benchmarks.caption=null",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the small recipe has been run, with a checkpoint each step."""
    folder = tmp_path_factory.mktemp("finished")
    finetune = ("checkpoints.every_steps=1", "log_every_steps=1", "checkpoints.keep_last=3")
    recipe = small(folder, *(f"training.finetune.{setting}" for setting in finetune))
    run_stages(recipe, list(STAGES), Console(stderr=True, quiet=True))
    return folder


@pytest.fixture
def photo(finished: Path, tmp_path: Path) -> str:
    image = tmp_path / "photo.jpg"
    image.write_bytes(Dataset.open(str(finished / "data")).split("validation").image(0))
    return str(image)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def front_matter(folder: Path) -> dict:
    found: dict = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return found


def test_a_run_gives_the_model_that_was_scored_and_a_page_that_says_so(
    finished: Path, tmp_path: Path, photo: str
) -> None:
    out = tmp_path / "out"
    done = export(str(finished / "run"), str(out))
    assert (done.step, done.model_type) == (3, "visual_bert")
    assert predict(str(out), photo, "Is there a circle?") == predict(
        str(finished / "run"), photo, "Is there a circle?"
    )
    metrics = json.loads((finished / "run" / "evaluation" / "metrics.json").read_text())
    (entry,) = front_matter(out)["model-index"]
    shown = {f"{r['task']['type']}/{r['metrics'][0]['type']}": r for r in entry["results"]}
    assert shown["vqa/accuracy"]["metrics"][0]["value"] == metrics["vqa/accuracy"]
    page = (out / "README.md").read_text()
    for part in (
        "| version of its manifest | 1 |",
        "| trained on split | train |",
        f"a twin that never sees an image reaches {metrics['vqa/accuracy_blind']:.2f}",
        "learning_rate: 0.002",
        "| torch | ",
    ):
        assert part in page, part


def test_transformers_opens_it_and_reads_the_same_out_of_it(finished: Path, tmp_path: Path) -> None:
    import transformers

    out = tmp_path / "out"
    export(str(finished / "run"), str(out))
    theirs, found = transformers.VisualBertModel.from_pretrained(str(out), output_loading_info=True)
    assert not found["missing_keys"]
    ours = load_model(str(out)).model
    inputs = Inputs(
        tokens=torch.tensor([[2, 7, 9, 3]]),
        token_padding=torch.zeros(1, 4, dtype=torch.bool),
        features=torch.rand(1, 5, ours.config.feature_dim),
        boxes=torch.tensor([[[0.1, 0.2, 0.5, 0.9]]]).repeat(1, 5, 1),
        region_padding=torch.zeros(1, 5, dtype=torch.bool),
    )
    places = fourier_boxes(inputs.boxes, POSITION_FOURIER)
    with torch.no_grad():
        encoded = ours.encode(inputs)
        said = theirs(
            input_ids=inputs.tokens,
            visual_embeds=torch.cat([inputs.features, places], dim=-1),
            visual_attention_mask=torch.ones(1, 5),
        ).last_hidden_state
    torch.testing.assert_close(said, torch.cat([encoded.text, encoded.regions], dim=1))


def test_any_checkpoint_gives_its_own_state(finished: Path, tmp_path: Path, photo: str) -> None:
    phase = finished / "run" / "finetune"
    folders = {step: tmp_path / f"out-{step}" for step in (2, 3)}
    for step, folder in folders.items():
        done = export(str(phase / "checkpoints" / f"step-{step:08d}"), str(folder))
        assert done.step == step
        assert predict(str(folder), photo)["image"] == photo
    last = weights(phase / "model")
    assert all(torch.equal(last[name], tensor) for name, tensor in weights(folders[3]).items())
    assert any(not torch.equal(last[name], one) for name, one in weights(folders[2]).items())
    page = (folders[2] / "README.md").read_text()
    assert "Not scored on held-out data when this was written. In training at step 2: loss " in page
    assert "taken from training at step 2 of 3" in page


def test_an_unfinished_phase_gives_its_newest_whole_checkpoint(
    finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run" / "finetune", run / "finetune")
    shutil.copytree(finished / "run" / "tokenizer", run / "tokenizer")
    shutil.rmtree(run / "finetune" / "model")
    damaged = run / "finetune" / "checkpoints" / "step-00000003"
    (file,) = damaged.glob("*.safetensors")
    payload = bytearray(file.read_bytes())
    payload[-1] ^= 1
    file.write_bytes(payload)
    for source, name in ((run, "of-run"), (run / "finetune", "of-phase")):
        done = export(str(source), str(tmp_path / name))
        assert done.step == 2
        assert "is damaged" in done.skipped[0]
    with pytest.raises(CheckpointError, match="is damaged"):
        export(str(damaged), str(tmp_path / "of-checkpoint"))
    assert not (tmp_path / "of-checkpoint").exists()


def test_a_checkpoint_of_another_run_is_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run" / "finetune", run / "finetune")
    spec = run / "finetune" / "spec.json"
    spec.write_text(spec.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(CheckpointError, match=r"differs in training\.seed: 0 then, 1 now"):
        export(str(run / "finetune" / "checkpoints" / "step-00000003"), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["config.json", "sightline.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_model_is_not_exported(
    finished: Path, tmp_path: Path, name: str, damage: str
) -> None:
    model = Path(shutil.copytree(finished / "run" / "model", tmp_path / "model"))
    payload = (model / name).read_bytes()
    place = payload.rindex(b'"') - 1 if name.endswith(".json") else len(payload) - 3
    flipped = payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]
    (model / name).write_bytes(payload[:-9] if damage == "cut" else flipped)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        export(str(model), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_that_lacks_what_its_page_tells_is_not_exported(
    finished: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(finished / "run" / "model", tmp_path / "model"))
    own = json.loads((model / "sightline.json").read_text())
    (model / "sightline.json").write_text(json.dumps({"answers": own["answers"]}))
    with pytest.raises(ModelError, match=r"sightline\.json .*lacks"):
        export(str(model), str(tmp_path / "out"))


def test_a_damaged_file_of_the_run_is_named(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    for damaged in (b'{"a": ', b"[1]"):
        (run / "environment.json").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"environment\.json: not .*move it away"):
            export(str(run), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something in it"):
        export(str(finished / "run"), str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_place_without_a_model_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a run, a phase of one"):
        export(str(tmp_path), str(tmp_path / "out"))


def test_lxmert_is_opened_by_transformers(finished: Path, tmp_path: Path) -> None:
    import transformers

    data = f"dataset.path={finished / 'data'}"
    recipe = small(tmp_path, data, *LXMERT)
    run_stages(recipe, ["finetune"], Console(stderr=True, quiet=True))
    export(str(tmp_path / "run" / "finetune"), str(tmp_path / "out"))
    theirs, found = transformers.LxmertModel.from_pretrained(
        str(tmp_path / "out"), output_loading_info=True
    )
    assert not found["missing_keys"]
    said = theirs(
        input_ids=torch.tensor([[2, 7, 9, 3]]),
        visual_feats=torch.rand(1, 5, theirs.config.visual_feat_dim),
        visual_pos=torch.rand(1, 5, 4),
    )
    assert said.language_output.shape == (1, 4, 16)
    assert torch.isfinite(said.vision_output).all()
