"""One training step, ours and transformers', with the same weights on the same batch.

The step is masked language modelling and image-text matching, forward, backward and AdamW, with
dropout. What makes the difference is taken apart by changing one thing at a time. On a batch of
full texts, which has no padding to skip, ours with the vocabulary scored wherever transformers
scores it differs by its kernels; scoring hidden words only adds what heads save; and the texts as
they are add what padding costs, on which layers of ours do no work (models/packed.py). Both sides
have the same fused AdamW; what the ratio would be with torch's default one is said beside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.errors import ModelError
from pipeline.models import families
from pipeline.models.base import ModelConfig, VisionLanguageModel
from pipeline.models.inputs import Inputs
from pipeline.models.lxmert import LxmertConfig
from pipeline.models.visualbert import VisualBertConfig
from pipeline.objectives.base import IGNORED
from pipeline.objectives.itm import ImageTextMatching, ItmConfig
from pipeline.objectives.mlm import MaskedLanguageModelling, MlmConfig
from pipeline.perf import flops, measure
from pipeline.perf.result import Comparison
from pipeline.training.config import OptimizerConfig
from pipeline.training.engine.optimizer import build_optimizer
from pipeline.training.engine.peak import peak_flops

MASKED_PER_TEXT = 2  # 15 % of a caption's words; the same in each, so that both means are one
THEIRS, THEIRS_CUT = "transformers", "transformers, cut to longest"
OURS, COMPILED = "ours", "ours, compiled"
FULL, EVERY_PLACE = "ours, full texts", "ours, full, every place scored"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of a loss that is about ln(words) + ln 2


@dataclass(frozen=True)
class TrainingBatch:
    """B captioned images: T tokens of which MASKED_PER_TEXT a row are hidden."""

    inputs: Inputs
    target: Tensor  # (B, T): the hidden words
    matched: Tensor  # (B,) bool

    @classmethod
    def draw(
        cls,
        config: ModelConfig,
        lengths: Sequence[int],
        num_tokens: int,
        num_regions: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "TrainingBatch":
        """Draws words, features and boxes at random; texts are padded to `num_tokens`."""
        random = torch.Generator().manual_seed(0)
        num_rows = len(lengths)
        tokens = torch.randint(5, config.vocab_size, (num_rows, num_tokens), generator=random)
        padding = torch.arange(num_tokens) >= torch.tensor(lengths)[:, None]
        target = torch.full_like(tokens, IGNORED)
        for row, length in enumerate(lengths):
            words = 1 + torch.randperm(length - 2, generator=random)[:MASKED_PER_TEXT]
            target[row, words] = tokens[row, words]
            tokens[row, words] = 4
        corners = torch.rand(num_rows, num_regions, 4, generator=random)
        inputs = Inputs(
            tokens=tokens.masked_fill(padding, 0),
            token_padding=padding,
            features=torch.randn(num_rows, num_regions, config.feature_dim, generator=random),
            boxes=torch.cat([corners[..., :2] / 2, 0.5 + corners[..., 2:] / 2], dim=-1),
            region_padding=torch.zeros(num_rows, num_regions, dtype=torch.bool),
        ).to(device)
        inputs = replace(inputs, features=inputs.features.to(dtype), boxes=inputs.boxes.to(dtype))
        return cls(inputs, target.to(device), (torch.arange(num_rows) % 2 == 0).to(device))

    def cut(self, num_tokens: int) -> "TrainingBatch":
        """Returns the batch without the places after `num_tokens`, which must be padding."""
        inputs = replace(
            self.inputs,
            tokens=self.inputs.tokens[:, :num_tokens].contiguous(),
            token_padding=self.inputs.token_padding[:, :num_tokens].contiguous(),
        )
        return replace(self, inputs=inputs, target=self.target[:, :num_tokens].contiguous())


LossOf = Callable[[TrainingBatch], Tensor]


@dataclass(frozen=True)
class Opponent:
    """A family of ours and transformers' model with its weights."""

    title: str
    ours: VisionLanguageModel
    theirs: nn.Module
    their_loss: LossOf


def visualbert(config: VisualBertConfig) -> Opponent:
    """VisualBertForPreTraining, which scores every word at every token and region."""
    import transformers

    document = families.FAMILIES["visualbert"].to_document(config, ())
    settings = transformers.VisualBertConfig(**document)
    theirs: Any = transformers.VisualBertForPreTraining(settings)

    def loss(batch: TrainingBatch) -> Tensor:
        inputs = batch.inputs
        regions = torch.full_like(inputs.region_padding, IGNORED, dtype=torch.long)
        found: Tensor = theirs(
            input_ids=inputs.tokens,
            attention_mask=(~inputs.token_padding).long(),
            visual_embeds=inputs.features,
            visual_attention_mask=(~inputs.region_padding).long(),
            labels=torch.cat([batch.target, regions], dim=1),
            sentence_image_labels=batch.matched.long(),
        ).loss
        return found

    return Opponent(
        "training step, VisualBERT and VisualBertForPreTraining",
        _filled(config, theirs),
        theirs,
        loss,
    )


def lxmert(config: LxmertConfig) -> Opponent:
    """LxmertForPreTraining, which scores every word at every token."""
    import transformers

    document = families.FAMILIES["lxmert"].to_document(config, ())
    settings = transformers.LxmertConfig(**{**document, "task_qa": False})
    theirs: Any = transformers.LxmertForPreTraining(settings)

    def loss(batch: TrainingBatch) -> Tensor:
        inputs = batch.inputs
        found: Tensor = theirs(
            input_ids=inputs.tokens,
            attention_mask=(~inputs.token_padding).long(),
            visual_feats=inputs.features,
            visual_pos=inputs.boxes,
            visual_attention_mask=(~inputs.region_padding).long(),
            labels=batch.target,
            matched_label=batch.matched.long(),
        ).loss
        return found

    return Opponent(
        "training step, LXMERT and LxmertForPreTraining", _filled(config, theirs), theirs, loss
    )


def _filled(config: ModelConfig, theirs: nn.Module) -> VisionLanguageModel:
    ours = families.build(config)
    families.load_weights(ours, theirs.state_dict())
    return ours


def our_loss(model: VisionLanguageModel) -> LossOf:
    """The loss that a run is trained on."""
    words, match = MaskedLanguageModelling(MlmConfig()), ImageTextMatching(ItmConfig())

    def loss(batch: TrainingBatch) -> Tensor:
        encoded = model.encode(batch.inputs)
        return (
            words.loss(model, encoded, batch.inputs, batch.target).mean()
            + match.loss(model, encoded, batch.inputs, batch.matched).mean()
        )

    return loss


def loss_at_every_place(model: VisionLanguageModel, regions_too: bool) -> LossOf:
    """The same loss, from words scored wherever transformers scores them."""
    match = ImageTextMatching(ItmConfig())

    def loss(batch: TrainingBatch) -> Tensor:
        encoded = model.encode(batch.inputs)
        places = torch.cat([encoded.text, encoded.regions], dim=1) if regions_too else encoded.text
        target = F.pad(batch.target, (0, places.shape[1] - batch.target.shape[1]), value=IGNORED)
        logits = model.token_logits(places.flatten(0, 1))
        return (
            F.cross_entropy(logits.float(), target.flatten())
            + match.loss(model, encoded, batch.inputs, batch.matched).mean()
        )

    return loss


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of training. It reads nothing of batches, whose sizes are made up."""
    return build_optimizer(module, OptimizerConfig())


def step_of(
    optimizer: torch.optim.Optimizer, loss_of: LossOf, batch: TrainingBatch
) -> measure.Contestant:
    """Returns what trains by one step on a batch, each time it is called."""

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(batch))
        optimizer.step()

    return step


def compare(
    opponent: Opponent,
    lengths: Sequence[int],
    num_tokens: int,
    num_regions: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
) -> Comparison:
    """Checks that both losses are equal, and times both."""
    ours, theirs = opponent.ours.to(device, dtype), opponent.theirs.to(device, dtype)
    draw = (num_tokens, num_regions, device, dtype)
    padded = TrainingBatch.draw(ours.config, lengths, *draw)
    collated = padded.cut(max(lengths))  # as a collator of ours makes it
    full = TrainingBatch.draw(ours.config, [num_tokens] * len(lengths), *draw)
    losses = equal_losses(opponent, padded, collated, dtype)
    ours.train()
    theirs.train()
    mine, other = optimizer_of(ours), optimizer_of(theirs)
    loss_of = our_loss(ours)
    everywhere = loss_at_every_place(ours, regions_too=isinstance(ours.config, VisualBertConfig))
    contestants: dict[str, measure.Contestant] = {
        THEIRS: step_of(other, opponent.their_loss, padded),
        THEIRS_CUT: step_of(other, opponent.their_loss, collated),
        OURS: step_of(mine, loss_of, collated),
        FULL: step_of(mine, loss_of, full),
        EVERY_PLACE: step_of(mine, everywhere, full),
    }
    if compiled:
        contestants[COMPILED] = step_of(mine, torch.compile(loss_of), collated)
    times = measure.measure(contestants, rounds, device)
    default = torch.optim.AdamW(parameter for parameter in ours.parameters())
    updates = measure.measure({"fused": mine.step, "default": default.step}, rounds, device)
    fused, unfused = updates.median("fused"), updates.median("default")
    total_unfused = (times.median(THEIRS) + unfused - fused) / (
        times.median(OURS) + unfused - fused
    )
    parts = {
        "kernels": times.ratio(THEIRS, EVERY_PLACE),
        "heads": times.ratio(EVERY_PLACE, FULL),
        "padding": times.ratio(FULL, OURS),
    }
    taken_apart = " × ".join(f"{name} {part:.2f}" for name, part in parts.items())
    mean_places = sum(lengths) / len(lengths) + num_regions
    wasted = 1 - mean_places / (num_tokens + num_regions)
    notes = [
        f"loss with the same weights: ours {losses[1]:.6f}, transformers' {losses[0]:.6f} "
        f"(difference {abs(losses[0] - losses[1]):.1e})",
        f"{times.ratio(THEIRS, OURS):.2f} times as fast: {taken_apart}; of either, fused AdamW "
        f"takes {1000 * fused:,.0f} ms; with torch's default, which takes {1000 * unfused:,.0f} "
        f"ms, it would be {total_unfused:.2f} times",
        f"{len(lengths)} captions of {min(lengths)} to {max(lengths)} tokens, padded to "
        f"{num_tokens}, and {num_regions} regions: {wasted:.0%} of places are padding",
    ]
    useful = flops.step_flops(ours.config, lengths, num_regions, MASKED_PER_TEXT)
    columns, peak_note = _columns(times, contestants, lengths, num_regions, useful, device, dtype)
    return Comparison.of(
        opponent.title,
        times,
        columns=columns,
        notes=notes + peak_note,
        figures={
            **parts,
            "total": times.ratio(THEIRS, OURS),
            "optimizer_seconds": fused,
            "default_optimizer_seconds": unfused,
            "total_with_default_optimizer": total_unfused,
            "loss_difference": abs(losses[0] - losses[1]),
            "useful_flops": useful,
        },
    )


def equal_losses(
    opponent: Opponent, padded: TrainingBatch, collated: TrainingBatch, dtype: torch.dtype
) -> tuple[float, float]:
    """Returns transformers' loss and ours without dropout; raises ModelError if they differ."""
    opponent.ours.eval()
    opponent.theirs.eval()
    with torch.no_grad():
        theirs = float(opponent.their_loss(padded))
        ours = float(our_loss(opponent.ours)(collated))
    if not abs(theirs - ours) <= TOLERANCE[dtype]:
        raise ModelError(
            f"{opponent.title}: with the same weights our loss is {ours:.6f}, transformers' is "
            f"{theirs:.6f}; they are to agree to {TOLERANCE[dtype]}"
        )
    return theirs, ours


def _columns(
    times: measure.Times,
    contestants: Mapping[str, measure.Contestant],
    lengths: Sequence[int],
    num_regions: int,
    useful: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Returns further columns, and on a GPU a note on what its utilisation is measured by."""
    same_work = [name for name in contestants if name not in (FULL, EVERY_PLACE)]
    real = sum(lengths) + len(lengths) * num_regions
    columns = {
        "real tokens/s": {name: f"{real / times.median(name):,.0f}" for name in same_work},
        "useful GFLOP/s": {name: f"{useful / times.median(name) / 1e9:,.0f}" for name in same_work},
    }
    if device.type != "cuda":
        return columns, []
    memory = {
        name: measure.peak_memory_bytes(contestant, device)
        for name, contestant in contestants.items()
    }
    columns["GiB"] = {name: f"{held / 2**30:.2f}" for name, held in memory.items() if held}
    device_name = torch.cuda.get_device_name(device)
    peak = peak_flops(device_name, "bf16" if dtype == torch.bfloat16 else "fp32")
    if peak is None:
        return columns, [f"no MFU: the peak of {device_name} is not known"]
    columns["MFU"] = {name: f"{useful / times.median(name) / peak:.1%}" for name in same_work}
    return columns, [
        f"MFU: matrix products of real tokens and regions against a peak of {peak / 1e12:g} "
        f"TFLOP/s ({device_name}); GiB are those beside weights and optimizer state"
    ]
