"""Training that reads no stored feature: pixels, and a backbone that is trained with the model."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.data.media.augmentation import AugmentConfig
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.read.images import ImageConfig, LiveConfig, live_features
from pipeline.data.text.vocabulary import build_tokenizer
from pipeline.pretrained.folder import BACKBONE_WEIGHTS, load_model
from pipeline.training.assembly import Assembly, assemble
from pipeline.training.config import OptimizerConfig
from pipeline.training.loop import train
from pipeline.training.spec import RankContext, TrainingSpec
from pipeline.training.tracking.metrics_log import read_metrics
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.live import live_card
from tests.data.read.test_images import jpeg
from tests.data.tiny_dataset import TinyDataset, make_texts
from tests.training.stand_in import OnStep, in_processes, train_and_die, train_on
from tests.training.test_assembly import SIZES
from tests.training.test_assembly import make_spec as stored_spec

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")
GRID = GridConfig(network="squeezenet1_0", node="features.3", weights="random", image_size=32)
NAME = "*.backbone.*"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 20 photographs that no feature was extracted of, and a tokenizer."""
    folder = tmp_path_factory.mktemp("photographs")
    written = TinyDataset(str(folder / "dataset"), image=jpeg)
    for start in range(0, 20, 5):
        written.add_shard("train", range(start, start + 5))
    captions = [caption for number in range(20) for caption in make_texts(number).captions]
    build_tokenizer(iter(captions * 3), 90).save_pretrained(str(folder / "tokenizer"))
    return folder


def make_spec(data: Path, folder: Path, **changes: Any) -> TrainingSpec:
    card = live_card(GRID, AugmentConfig(area=(0.4, 1.0)))
    live = {"images": {"size": 32, "augment": {"area": [0.4, 1.0]}}, "grid": card.grid}
    spec = stored_spec(data, folder)
    return TrainingSpec.model_validate(
        spec.model_dump()
        | {
            "features": None,
            "live": live | {"patches": False},
            "backbone": GRID.model_dump(),
            "model": SIZES | {"vocab_size": 90, "feature_dim": card.dim, "dropout": 0.0},
            "objectives": {"mlm": {}, "lm": {}},
            "card": spec.card | {"extractor": card.plain()},
            "training": {
                "steps": 4,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "optimizer": {"learning_rate": 1e-3, "learning_rate_factors": {NAME: 0.5}},
                "checkpoints": {"every_steps": 2},
            },
        }
        | changes
    )


def killed_at(spec: TrainingSpec, on_step: OnStep | None = None) -> Assembly:
    """The real parts; `on_step` is called with (step, rank) as a rank begins a step."""
    assembly = assemble(spec)
    if on_step is None:
        return assembly

    def batches(start: int, rank: int, world_size: int) -> Any:
        # Steps are collated ahead: the call must come from the one that trains.
        for step, parts in enumerate(assembly.batches(start, rank, world_size), start=start + 1):
            yield [_Announced(part, partial(on_step, step, rank)) for part in parts]

    return Assembly(assembly.module, batches, assembly.save, assembly.evaluate)


class _Announced:
    def __init__(self, batch: Any, announce: Any) -> None:
        self.batch, self.announce = batch, announce

    def to(self, device: torch.device, dtype: torch.dtype) -> Any:
        self.announce()
        return self.batch.to(device, dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch, name)


def losses(spec: TrainingSpec) -> list[float]:
    return [line["loss"] for line in read_metrics(spec.folder)]


def backbone_of(spec: TrainingSpec) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(spec.folder) / "model" / BACKBONE_WEIGHTS)


@pytest.mark.processes
def test_two_ranks_train_as_one_does_and_a_killed_run_as_the_unbroken_one(
    data: Path, tmp_path: Path
) -> None:
    one, two, broken = (make_spec(data, tmp_path / name) for name in ("one", "two", "broken"))
    train_on(1, one, assemble)
    train_on(2, two, assemble)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    trained, other = backbone_of(one), backbone_of(two)
    untouched = GRID.backbone().network.state_dict()
    for name, tensor in trained.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)
        assert not torch.equal(tensor, untouched[name])
    assert in_processes(2, train_and_die, broken, 1, 4, killed_at)[1] == -9
    train_on(2, broken, assemble)
    assert losses(broken) == losses(two)
    assert all(torch.equal(tensor, other[name]) for name, tensor in backbone_of(broken).items())


@pytest.mark.usefixtures("alone")
def test_a_saved_model_holds_its_backbone_and_is_fine_tuned_with_it(
    data: Path, tmp_path: Path
) -> None:
    spec = make_spec(data, tmp_path / "pretrain")
    train(spec, HERE)
    folder = load_model(str(tmp_path / "pretrain" / "model"))
    trained = backbone_of(spec)
    state = folder.model.get_submodule("backbone.network").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    finetune = make_spec(data, tmp_path / "finetune", initial=str(tmp_path / "pretrain" / "model"))
    begun = assemble(finetune).module.get_submodule("model.backbone.network").state_dict()
    assert all(torch.equal(begun[name], tensor) for name, tensor in trained.items())
    # what was trained is a file of weights for the extractor that stores features
    weights = tmp_path / "pretrain" / "model" / BACKBONE_WEIGHTS
    extractor = GRID.model_copy(update={"weights": str(weights)}).build()
    (stored,) = extractor.extract([extractor.prepare(jpeg(0))])
    live = LiveConfig(images=ImageConfig(size=32), grid=spec.live.grid, patches=False)  # type: ignore[union-attr]
    with torch.no_grad():
        pixels = torch.from_numpy(live_features(jpeg(0), live).pixels)
        found = folder.model.get_submodule("backbone")(pixels)[0].numpy()
    np.testing.assert_allclose(found, stored.values, atol=0.03 * np.abs(stored.values).max())


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_every_zero_stage_trains_a_backbone(
    data: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    specs = []
    for name, change in (
        ("plain", {"zero_stage": 1, "precision": "fp32"}),
        ("other", {"zero_stage": stage, "precision": precision}),
    ):
        spec = make_spec(data, tmp_path / name)
        training = spec.training.model_copy(update=change)
        specs.append(spec.model_copy(update={"training": training}))
        train(specs[-1], HERE)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert losses(specs[1]) == pytest.approx(losses(specs[0]), rel=tolerance)


@pytest.mark.usefixtures("alone")
def test_a_frozen_backbone_stays_as_it_came(data: Path, tmp_path: Path) -> None:
    spec = make_spec(data, tmp_path / "run")
    frozen = {"optimizer": OptimizerConfig(freeze=(NAME,))}
    spec = spec.model_copy(update={"training": spec.training.model_copy(update=frozen)})
    train(spec, HERE)
    came = GRID.backbone().network.state_dict()
    assert all(torch.equal(tensor, came[name]) for name, tensor in backbone_of(spec).items())


@pytest.mark.usefixtures("alone")
def test_the_blind_twin_trains_without_looking(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(data, tmp_path / "run", blind=True)
    looked: list[object] = []
    monkeypatch.setattr(Split, "features", lambda *_: looked.append(None))
    train(spec, HERE)
    assert not looked
    assert load_model(str(tmp_path / "run" / "model")).card["extractor"]["type"] == "grid"


def test_pictures_are_varied_in_training_and_not_where_they_are_held_out(
    data: Path, tmp_path: Path
) -> None:
    spec = make_spec(data, tmp_path)
    assert spec.live is not None
    whole = Dataset.open(spec.dataset).split("train", spec.live.whole())
    batch: Any
    (batch, *_), *_ = assemble(spec).batches(0, 0, 1)
    again: Any
    (again, *_), *_ = assemble(spec).batches(0, 0, 1)
    seen = batch.streams["captions-full"].inputs.pixels
    assert torch.equal(seen, again.streams["captions-full"].inputs.pixels)
    pictures = whole.features(np.arange(whole.num_samples)).pixels
    assert pictures is not None
    assert not any(np.array_equal(seen[0], picture) for picture in pictures)
    steps = {}
    for name, live in (("varied", spec.live), ("whole", spec.live.whole())):
        held_out = make_spec(
            data,
            tmp_path / name,
            live=live,
            held_out_split="train",
            training=spec.training.model_dump() | {"evaluation": {"every_steps": 2}},
        )
        found = _held_out(held_out)
        steps[name] = found
    assert steps["varied"] == steps["whole"]


def _held_out(spec: TrainingSpec) -> float:
    assembly = assemble(spec)
    assembly.module.eval()
    torch.manual_seed(0)
    assert assembly.evaluate is not None
    with torch.no_grad():
        return assembly.evaluate(assembly.module, HERE)["loss"]


def test_live_pixels_are_patches_of_the_pictures(data: Path, tmp_path: Path) -> None:
    live = {"images": {"size": 32}, "grid": [4, 4], "patches": True}
    sizes = SIZES | {"vocab_size": 90, "feature_dim": 192}
    spec = make_spec(data, tmp_path, live=live, backbone=None, model=sizes)
    batch: Any
    (batch, *_), *_ = assemble(spec).batches(0, 0, 1)
    inputs = batch.streams["captions-full"].inputs
    assert inputs.features.shape == (2, 16, 192)
    assert inputs.features.dtype == torch.uint8
