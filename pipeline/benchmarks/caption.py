"""The captioning benchmark: a sentence for a picture, scored against those that people wrote."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from pydantic import Field, PositiveInt

from pipeline.benchmarks.base import Benchmark, Evaluation, ResultRow, dtype_of, texts_of
from pipeline.benchmarks.caption_metrics import MetricName, caption_scores, unavailable
from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.data.load.order import RowsWithTexts
from pipeline.data.read.dataset import Split
from pipeline.errors import MetricError, ModelError
from pipeline.models.base import Decoder, VisionLanguageModel
from pipeline.models.generation import Decoding, EarlyStopping, Penalty, generate
from pipeline.models.inputs import Inputs
from pipeline.objectives.base import Encodings
from pipeline.objectives.lm import LmConfig
from pipeline.objectives.stream import make_inputs, moved

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CaptionReferences = dict[int | str, tuple[str, ...]]  # image id -> its captions


class CaptionConfig(Config):
    """How captions are written and scored, and how a model is fine-tuned to write them."""

    max_tokens: int = Field(
        default=24, ge=3, description="the longest caption, with [CLS] and [SEP]"
    )
    beams: PositiveInt = Field(
        default=3, description="beams of the search, as of transformers' `generate`; 1: greedy"
    )
    length_penalty: Penalty = Field(
        default=1.0, description="as of transformers' `generate`: above 0 favours longer captions"
    )
    early_stopping: EarlyStopping = Field(
        default=False, description="as of transformers' `generate`: when the beam search ends"
    )
    metrics: tuple[MetricName, ...] = Field(
        default=("bleu", "rouge-l", "cider", "meteor"),
        min_length=1,
        description="the official caption metrics that are computed",
    )
    lm: LmConfig = Field(
        default=LmConfig(), description="the objective that captions are fine-tuned with"
    )

    def decoding(self) -> Decoding:
        """Returns how captions are written, as it is saved with a model."""
        return Decoding(
            max_new_tokens=self.max_tokens - 1,  # [CLS] is there already
            beams=self.beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
        )

    def build(self) -> "Caption":
        return Caption(self)


class Caption(Benchmark[CaptionReferences]):
    """COCO captions and every data set with several captions per image."""

    name = "caption"
    kind = "captions"

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.max_tokens = config.max_tokens

    def objectives(self) -> dict[str, dict[str, Any]]:
        return {"lm": self.config.lm.model_dump(mode="json")}

    def batches(
        self, split: Split, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yields each captioned image once, whatever the number of its captions."""
        rows = RowsWithTexts(split, "captions")
        first, stop = (part * len(rows) // world_size for part in (rank, rank + 1))
        for start in range(first, stop, batch_size):
            positions = np.arange(start, min(start + batch_size, stop))
            some = rows[positions]
            found = split.read(some)
            yield Batch(
                keys=found.keys,
                rows=some,
                positions=positions,
                texts=found.texts,
                text_index=np.zeros(len(some), dtype=np.int64),
                distractors=[],
                features=found.features,
                step=0,
                seed=0,
            )

    def inputs(
        self, tokenizer: "PreTrainedTokenizerFast", batch: Batch, blind_dim: int | None = None
    ) -> Inputs:
        """The text is [CLS] alone, from which the caption is written on."""
        shape = (len(batch.keys), 1)
        encodings = Encodings(
            tokens=np.full(shape, tokenizer.cls_token_id, dtype=np.int64),
            padding=np.zeros(shape, dtype=np.bool_),
            is_word=np.zeros(shape, dtype=np.bool_),
        )
        return make_inputs(encodings, batch.features, blind_dim)

    def predict(
        self,
        model: VisionLanguageModel,
        tokenizer: "PreTrainedTokenizerFast",
        answers: Sequence[str],  # noqa: ARG002
        batches: Iterable[Batch],
        device: torch.device | str = "cpu",
        blind: bool = False,
    ) -> list[ResultRow]:
        if "prefix" not in model.masks:
            raise ModelError(
                f"caption: {type(model).__name__} cannot write text; take a family with a prefix "
                "mask, such as visualbert"
            )
        blind_dim = model.config.feature_dim if blind else None
        decoding = asdict(self.config.decoding())
        results: list[ResultRow] = []
        for batch in batches:
            inputs = moved(
                self.inputs(tokenizer, batch, blind_dim), torch.device(device), dtype_of(model)
            )
            written = generate(cast(Decoder, model), inputs, eos=tokenizer.sep_token_id, **decoding)
            for texts, pieces in zip(batch.texts, written, strict=True):
                text = tokenizer.decode(
                    pieces, skip_special_tokens=True, clean_up_tokenization_spaces=True
                )
                results.append({"image_id": texts.image_id, "caption": text})
        return results

    def references(self, split: Split) -> CaptionReferences:
        references: CaptionReferences = {}
        for texts in texts_of(split):
            if not texts.captions:
                continue
            if texts.image_id in references:
                raise MetricError(
                    f"split {split.name!r}: image_id {texts.image_id} comes twice; "
                    "captions are scored by image_id"
                )
            references[texts.image_id] = texts.captions
        return references

    def evaluate(self, results: Sequence[ResultRow], references: CaptionReferences) -> Evaluation:
        """Metrics are fractions, as the official evaluator prints them; CIDEr may exceed 1."""
        scores = caption_scores(results, references, self.config.metrics)
        shown = "cider" if "cider" in self.config.metrics else next(iter(scores.corpus), "")
        return Evaluation(
            metrics={f"caption/{name}": value for name, value in scores.corpus.items()},
            scores={image: each[shown] for image, each in scores.per_image.items() if each},
            absent={
                f"caption/{name}": reason
                for name, reason in unavailable(self.config.metrics).items()
            },
        )
