"""Distillation: what a trained model makes of the same pairs, as another's target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.data.read.dataset import Dataset, Split
from pipeline.errors import ConfigError, FeatureError, ModelError
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.base import Encodings, Objective, ShownKind, Stream, Vocabulary
from pipeline.objectives.per_sample import mean_per_sample, nan_where_none
from pipeline.objectives.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_FULL_TERMS = ("words", "match", "answers", "hidden", "attention")  # read under the full mask
_LOGITS = ("words", "next_words", "match", "answers")


class TermConfig(Config):
    """One thing that is compared."""

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in that of distillation"
    )


class SoftTermConfig(TermConfig):
    """One distribution that is compared, flattened by a temperature (arXiv:1503.02531, 2)."""

    temperature: float = Field(
        default=2.0, gt=0, description="what both distributions are flattened by"
    )


class DistillConfig(Config):
    """The teacher, and what of it is learned; at least one of the last six.

    The pass of `next_words` is that of lm if it is trained as well.
    """

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in the sum of the objectives'"
    )
    texts: ShownKind = Field(
        default="captions", description="the texts that are shown beside an image"
    )
    teacher: str = Field(description="a model folder of ours")
    features: str | None = Field(
        default=None, description="the extractor the teacher sees through; null: the student's"
    )
    words: SoftTermConfig | None = Field(
        default=None, description="which words stand at the positions that mlm hides from both"
    )
    match: SoftTermConfig | None = Field(
        default=None, description="the verdict of the matching head"
    )
    answers: SoftTermConfig | None = Field(
        default=None, description="the verdict of the answer head"
    )
    hidden: TermConfig | None = Field(
        default=None,
        description="the text's last states, through a learned map if the teacher is of another "
        "width",
    )
    attention: SoftTermConfig | None = Field(
        default=None, description="where text and regions look in the last layer in which they meet"
    )
    next_words: SoftTermConfig | None = Field(
        default=None,
        description="which word comes next at each position, read under the prefix mask as lm "
        "reads it",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self._terms():
            known = ", ".join((*_FULL_TERMS, "next_words"))
            raise ValueError(f"nothing is learned of the teacher; give {known}")
        return self

    def build(self) -> "list[Distillation]":
        """Returns one for each mask under which something is learned."""
        built = []
        if self._terms() - {"next_words"}:
            built.append(Distillation(self.model_copy(update={"next_words": None})))
        if self.next_words is not None:
            others = dict.fromkeys(_FULL_TERMS)
            built.append(Distillation(self.model_copy(update=others)))
        return built

    def _terms(self) -> set[str]:
        names = (*_FULL_TERMS, "next_words")
        return {name for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class TeacherView:
    """What the teacher sees otherwise than the student, and where their words are compared."""

    word_mask: Tensor  # (B, T) bool: pieces that read [MASK], or those that have a next one
    features: Tensor | None  # (B, R, F) of the teacher's own extractor, and so the next two
    boxes: Tensor | None  # (B, R, 4)
    region_padding: Tensor | None  # (B, R) bool

    def select(self, samples: Tensor, num_tokens: int) -> "TeacherView":
        """Returns the view of these samples (N,), the longest of which has so many tokens."""
        mask = self.word_mask[:, :num_tokens][samples]
        if self.features is None or self.boxes is None or self.region_padding is None:
            return TeacherView(mask, None, None, None)
        width = int((~self.region_padding[samples]).sum(dim=1).max())
        return TeacherView(
            mask,
            self.features[:, :width][samples],
            self.boxes[:, :width][samples],
            self.region_padding[:, :width][samples],
        )

    def of(self, inputs: Inputs) -> Inputs:
        """Returns the teacher's inputs beside the student's: the same text, as corrupted."""
        if self.features is None or self.boxes is None or self.region_padding is None:
            return inputs
        dtype = inputs.boxes.dtype
        is_pixels = self.features.dtype == torch.uint8
        return Inputs(
            tokens=inputs.tokens,
            token_padding=inputs.token_padding,
            features=self.features if is_pixels else self.features.to(dtype),
            boxes=self.boxes.to(dtype),
            region_padding=self.region_padding,
        )


class Distillation(Objective):
    """Logits (Hinton, arXiv:1503.02531), states and attention (TinyBERT, arXiv:1909.10351, 3).

    The teacher sees the texts as the other objectives have corrupted them, and the student's
    regions or, if it has an extractor of its own, all of its own; attention between regions and
    text is then not comparable, and the text's to itself is compared. Attention is averaged over
    heads, whose number may differ, and compared as distributions rather than by squared error.
    """

    metric_name = "agreement"

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config.weight)
        self.config = config
        self.name = "distill" if config.next_words is None else "distill-next-words"
        self.stream = Stream(config.texts, "full" if config.next_words is None else "prefix")
        self.needs_attention = config.attention is not None
        self._teacher: Teacher | None = None
        self._split: Split | None = None
        self._map: nn.Module = nn.Identity()

    @property
    def teacher(self) -> Teacher:
        """The teacher, read when it is first needed: a driver that only checks never does."""
        if self._teacher is None:
            self._teacher = Teacher(self.config.teacher)
        return self._teacher

    def check(self, tokenizer: "PreTrainedTokenizerFast", answers: Sequence[str]) -> None:
        self.teacher.require_same_words(tokenizer)
        if self.config.answers is not None and self.teacher.answers != tuple(answers):
            raise ConfigError(
                f"objectives.distill.answers: teacher {self.config.teacher} knows "
                f"{len(self.teacher.answers)} answers, the student {len(answers)}; they must be "
                "the same, in the same order"
            )

    def open(self, dataset: Dataset, split: str) -> None:
        if self.config.features is not None:
            self._split = dataset.split(split, self.config.features)

    def attach(self, model: VisionLanguageModel) -> nn.Module | None:
        """Returns the map from the student's states to the teacher's, if one is needed."""
        width, wanted = model.config.width, self.teacher.model.config.width
        if self.config.hidden is None or width == wanted:
            return None
        self._map = nn.Linear(width, wanted)
        return self._map

    def prepare(
        self,
        batch: Batch,
        encodings: Encodings,
        vocabulary: Vocabulary,
        drawn: None,  # noqa: ARG002
    ) -> tuple[Encodings, TeacherView]:
        if self.config.next_words is None:
            compared = encodings.is_word & (encodings.tokens == vocabulary.mask)
        else:
            compared = np.zeros_like(encodings.padding)
            compared[:, :-1] = ~encodings.padding[:, 1:]
        mask = torch.from_numpy(compared)
        if self.config.features is None:
            return encodings, TeacherView(mask, None, None, None)
        assert self._split is not None, "open() comes first: the teacher has its own features"
        known = batch.rows[batch.rows < self._split.num_samples]
        if self._split.keys(known) != batch.keys:
            raise FeatureError(
                f"objectives.distill.features: {self.config.features} has features of other "
                "samples than the student's extractor; `sightline data rejects` lists those "
                "without. Remove their images, or leave `features` out"
            )
        seen = self._split.features(batch.rows)
        padding = torch.arange(seen.values.shape[1]) >= torch.from_numpy(seen.num_regions)[:, None]
        view = TeacherView(
            mask, torch.from_numpy(seen.values), torch.from_numpy(seen.boxes), padding
        )
        return encodings, view

    def select(self, target: TeacherView, samples: Tensor, num_tokens: int) -> TeacherView:
        return target.select(samples, num_tokens)

    def loss(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: TeacherView
    ) -> Tensor:
        seen = target.of(inputs)
        taught = self.teacher.encode(
            seen, like=encoded.text, mask=self.stream.mask, attention=self.needs_attention
        )
        config = self.config
        total = torch.zeros(len(inputs.tokens), device=inputs.tokens.device)
        for name in _LOGITS:
            term: SoftTermConfig | None = getattr(config, name)
            if term is not None:
                total = total + term.weight * self._logits_loss(
                    name, term.temperature, (model, encoded, inputs), (taught, seen), target
                )
        if config.hidden is not None:
            distance = F.mse_loss(
                self._map(encoded.text).float(), taught.text.float(), reduction="none"
            ).mean(-1)
            words = ~inputs.token_padding
            total = total + config.hidden.weight * mean_per_sample(distance[words], words)
        if config.attention is not None:
            total = total + config.attention.weight * _attention_loss(
                encoded, taught, inputs, config.attention.temperature, whole=seen is inputs
            )
        return total

    def metric(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: TeacherView
    ) -> Tensor:
        """How often both say the same, of the first of words, match, answers that is learned.

        NaN if none of them is.
        """
        seen = target.of(inputs)
        taught = self.teacher.encode(
            seen, like=encoded.text, mask=self.stream.mask, attention=False
        )
        for name in _LOGITS:
            if getattr(self.config, name) is None:
                continue
            says = self._logits(name, model, encoded, inputs, target).argmax(-1)
            said = self._logits(name, self.teacher.model, taught, seen, target).argmax(-1)
            same = (says == said).float()
            if name in ("match", "answers"):
                return same
            mask = target.word_mask
            return nan_where_none(mean_per_sample(same, mask), mask)
        return torch.full((len(inputs.tokens),), torch.nan, device=inputs.tokens.device)

    def _logits_loss(
        self,
        name: str,
        temperature: float,
        student: tuple[VisionLanguageModel, Encoded, Inputs],
        taught: tuple[Encoded, Inputs],
        target: TeacherView,
    ) -> Tensor:
        """Returns (B,), times the temperature's square so that gradients keep their size."""
        logits = self._logits(name, *student, target) / temperature
        with torch.no_grad():
            wanted = self._logits(name, self.teacher.model, *taught, target) / temperature
        if name == "answers":  # each answer by itself, as it was trained
            loss = F.binary_cross_entropy_with_logits(logits, wanted.sigmoid(), reduction="none")
        else:
            loss = F.kl_div(
                logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
            )
        loss = temperature**2 * loss.sum(-1)
        per_sample = name in ("match", "answers")
        return loss if per_sample else mean_per_sample(loss, target.word_mask)

    def _logits(
        self,
        name: str,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,
        target: TeacherView,
    ) -> Tensor:
        """Returns (N, V) of words, (B, 2) with the match last, or (B, A)."""
        if name == "answers":
            return model.answer_logits(encoded, inputs).float()
        if name != "match":
            return model.token_logits(encoded.text[target.word_mask]).float()
        logits = model.match_logits(encoded).float()
        return logits if model.match_index == 1 else logits.flip(-1)


def _attention_loss(
    encoded: Encoded, taught: Encoded, inputs: Inputs, temperature: float, whole: bool
) -> Tensor:
    """Returns the divergence (B,) of where each position looks, averaged over positions.

    With `whole`, of text and regions; else of text at text. A position that looks nowhere in
    either model is left out.
    """
    if not encoded.attention or not taught.attention:
        raise ModelError(
            "objectives.distill.attention: text and regions never meet in a layer of this student "
            "or teacher; leave it out"
        )
    real = ~inputs.token_padding
    if whole:
        real = torch.cat([real, ~inputs.region_padding], dim=1)
    size = real.shape[1]
    looks = encoded.attention[-1].float().mean(1)[:, :size, :size]
    wanted = taught.attention[-1].float().mean(1)[:, :size, :size]
    mask = real & (looks.sum(-1) > 0) & (wanted.sum(-1) > 0)
    # Real columns only: a probability of 0 there would be a rounding, and is kept from log(0).
    seen = real[:, None, :].expand_as(looks)[mask]
    divergence = F.kl_div(
        _flattened(looks[mask], seen, temperature),
        _flattened(wanted[mask], seen, temperature),
        log_target=True,
        reduction="none",
    )
    divergence = divergence.masked_fill(~seen, 0).sum(-1)
    return mean_per_sample(temperature**2 * divergence, mask)


def _flattened(weights: Tensor, seen: Tensor, temperature: float) -> Tensor:
    """Returns log of weights ** (1 / temperature), normed over what is seen, (N, S)."""
    tiny = torch.finfo(weights.dtype).tiny
    logits = weights.clamp(min=tiny).log() / temperature
    return logits.masked_fill(~seen, torch.finfo(weights.dtype).min).log_softmax(-1)
