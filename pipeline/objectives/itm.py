"""Image-text matching: whether a caption was written for the picture."""

import zlib

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.base import Encodings, Objective, Stream, Vocabulary

_SALT = zlib.crc32(b"itm")


class ItmConfig(Config):
    """How often the caption is another image's."""

    weight: float = Field(default=1.0, gt=0)
    mismatch_probability: float = Field(default=0.5, gt=0, lt=1)


class ImageTextMatching(Objective):
    """Tells matched pairs from mismatched ones (LXMERT, arXiv:1908.07490, 3.1.2).

    A wrong caption is one of another image that this image does not have as well; if there is
    none the pair stays matched. Other objectives of the stream read the caption that is shown.
    VisualBERT instead judges the second of two captions, the first being always right.
    """

    name = "itm"
    stream = Stream("captions", "full")
    needs_distractors = True

    def __init__(self, config: ItmConfig) -> None:
        super().__init__(config.weight)
        self.mismatch_probability = config.mismatch_probability

    def choose_texts(self, batch: Batch, texts: list[str]) -> list[str]:
        wrong = [self._wrong_caption(batch, i) for i in range(len(texts))]
        return [text if other is None else other for text, other in zip(texts, wrong, strict=True)]

    def prepare(
        self,
        batch: Batch,
        encodings: Encodings,
        vocabulary: Vocabulary,  # noqa: ARG002
    ) -> tuple[Encodings, Tensor]:
        """The target (B,) is True where the caption shown is the image's own."""
        matched = [self._wrong_caption(batch, i) is None for i in range(len(batch.keys))]
        return encodings, torch.tensor(matched)

    def loss(
        self,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,  # noqa: ARG002
        target: Tensor,
    ) -> Tensor:
        label = torch.where(target, model.match_index, 1 - model.match_index)
        return F.cross_entropy(model.match_logits(encoded).float(), label, reduction="none")

    def _wrong_caption(self, batch: Batch, i: int) -> str | None:
        """Returns what is shown instead of example i's own caption; None if that is shown."""
        rng = batch.rng(i, _SALT)
        if rng.random() >= self.mismatch_probability:
            return None
        own = set(batch.texts[i].captions)
        others = [caption for caption in batch.distractors[i].captions if caption not in own]
        return others[rng.integers(len(others))] if others else None
