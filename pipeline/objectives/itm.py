"""Image-text matching: whether a text was written for the picture."""

import zlib

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.data.sample import Texts
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.base import Encodings, Objective, ShownKind, Stream, Vocabulary, named

_SALT = zlib.crc32(b"itm")


class ItmConfig(Config):
    """How often the text is another image's."""

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in the sum of the objectives'"
    )
    texts: tuple[ShownKind, ...] = Field(
        default=("captions",), min_length=1, description="the texts that are shown beside an image"
    )
    mismatch_probability: float = Field(
        default=0.5, gt=0, lt=1, description="how often the text is another image's"
    )

    def build(self) -> "list[ImageTextMatching]":
        return [ImageTextMatching(self, kind) for kind in dict.fromkeys(self.texts)]


class ImageTextMatching(Objective):
    """Tells matched pairs from mismatched ones (LXMERT, arXiv:1908.07490, 3.1.2).

    A wrong text is one of another image that this image does not have as well; if there is none
    the pair stays matched. Other objectives of the stream read the text that is shown. UNITER
    exchanges the image rather than the text, which gives the same pairs. VisualBERT judges the
    second of two captions, the first being always right; ours has one.
    """

    metric_name = "accuracy"
    needs_distractors = True

    def __init__(self, config: ItmConfig, kind: ShownKind = "captions") -> None:
        super().__init__(config.weight)
        self.name = named("itm", kind)
        self.stream = Stream(kind, "full")
        self.mismatch_probability = config.mismatch_probability

    def draw(self, batch: Batch) -> list[str | None]:
        """Returns what is shown instead of each example's own text; None if that is shown."""
        return [self._wrong_text(batch, i) for i in range(len(batch.keys))]

    def choose_texts(self, texts: list[str], drawn: list[str | None]) -> list[str]:
        return [text if other is None else other for text, other in zip(texts, drawn, strict=True)]

    def prepare(
        self,
        batch: Batch,  # noqa: ARG002
        encodings: Encodings,
        vocabulary: Vocabulary,  # noqa: ARG002
        drawn: list[str | None],
    ) -> tuple[Encodings, Tensor]:
        """The target (B,) is True where the text shown is the image's own."""
        return encodings, torch.tensor([wrong is None for wrong in drawn])

    def loss(
        self,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,  # noqa: ARG002
        target: Tensor,
    ) -> Tensor:
        label = torch.where(target, model.match_index, 1 - model.match_index)
        return F.cross_entropy(model.match_logits(encoded).float(), label, reduction="none")

    def metric(
        self,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,  # noqa: ARG002
        target: Tensor,
    ) -> Tensor:
        judged_matched = model.match_logits(encoded).argmax(1) == model.match_index
        return (judged_matched == target).float()

    def _wrong_text(self, batch: Batch, i: int) -> str | None:
        rng = batch.rng(i, _SALT)
        if rng.random() >= self.mismatch_probability:
            return None
        own = set(self._texts(batch.texts[i]))
        others = [text for text in self._texts(batch.distractors[i]) if text not in own]
        return others[rng.integers(len(others))] if others else None

    def _texts(self, texts: Texts) -> list[str]:
        if self.stream.kind == "captions":
            return list(texts.captions)
        return [question.question for question in texts.questions]
