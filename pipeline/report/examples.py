"""RUN/evaluation/examples.json: predictions on validation pictures, which the report shows."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor

FILE = ("evaluation", "examples.json")  # under RUN
DECIMALS = 5  # of attention weights and boxes in the file


@dataclass(frozen=True, eq=False)
class Attention:
    """Where each of N tokens looked among R regions, in each of L layers, first layer first.

    A weight is a softmax probability averaged over the layer's heads. The token also looks at
    text, so its weights sum to the share of its attention that went to the picture, not to 1.
    """

    tokens: tuple[str, ...]  # generated words, or one entry for the slot that answers
    weights: NDArray[np.float32]  # (L, N, R)
    boxes: NDArray[np.float32]  # (R, 4): x1, y1, x2, y2 as fractions of the shown image
    grid: tuple[int, int] | None  # (rows, columns) if the regions are a grid's cells in row order

    def __post_init__(self) -> None:
        layers, tokens, regions = self.weights.shape
        if (
            not layers
            or tokens != len(self.tokens)
            or self.boxes.shape != (regions, 4)
            or (self.grid is not None and self.grid[0] * self.grid[1] != regions)
        ):
            raise StageError(
                f"attention of shape {self.weights.shape} (layers, tokens, regions) does not fit "
                f"{len(self.tokens)} tokens, boxes {self.boxes.shape} and grid {self.grid}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": list(self.tokens),
            "weights": _rounded(self.weights),
            "boxes": _rounded(self.boxes),
            "grid": list(self.grid) if self.grid else None,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Attention":
        grid = document["grid"]
        return cls(
            tokens=tuple(document["tokens"]),
            weights=np.array(document["weights"], dtype=np.float32),
            boxes=np.array(document["boxes"], dtype=np.float32).reshape(-1, 4),
            grid=(int(grid[0]), int(grid[1])) if grid else None,
        )


@dataclass(frozen=True, eq=False)
class Example:
    """One validation picture with what was asked, expected and predicted."""

    key: str
    kind: Literal["vqa", "caption"]
    image: bytes  # JPEG, best made by `picture.thumbnail`
    references: tuple[str, ...]  # human answers or captions
    prediction: str
    question: str = ""
    question_type: str = ""
    score: float | None = None  # vqa: official accuracy of this answer, 0 to 1; caption: CIDEr
    blind_prediction: str | None = None  # of the twin that sees no image
    blind_score: float | None = None
    attention: Attention | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "kind": self.kind,
            "image": base64.b64encode(self.image).decode("ascii"),
            "references": list(self.references),
            "prediction": self.prediction,
            "question": self.question,
            "question_type": self.question_type,
            "score": self.score,
            "blind_prediction": self.blind_prediction,
            "blind_score": self.blind_score,
            "attention": self.attention.to_json() if self.attention else None,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Example":
        attention = document["attention"]
        return cls(
            key=document["key"],
            kind=document["kind"],
            image=base64.b64decode(document["image"], validate=True),
            references=tuple(document["references"]),
            prediction=document["prediction"],
            question=document["question"],
            question_type=document["question_type"],
            score=document["score"],
            blind_prediction=document["blind_prediction"],
            blind_score=document["blind_score"],
            attention=Attention.from_json(attention) if attention else None,
        )


@dataclass(frozen=True, eq=False)
class Gallery:
    """The examples a report shows."""

    selection: str  # how they were picked, e.g. "The first 24 questions of val, in key order."
    examples: tuple[Example, ...]


def write_gallery(run: str, gallery: Gallery) -> str:
    """Writes RUN/evaluation/examples.json and returns its location."""
    location = storage.join(run, *FILE)
    document = {
        "selection": gallery.selection,
        "examples": [example.to_json() for example in gallery.examples],
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    storage.write_bytes(location, text.encode())
    return location


def read_gallery(run: str) -> Gallery:
    """Reads RUN/evaluation/examples.json; raises StageError if it is not what evaluate writes."""
    location = storage.join(run, *FILE)
    try:
        document = json.loads(storage.read_bytes(location))
        return Gallery(
            selection=document["selection"],
            examples=tuple(Example.from_json(example) for example in document["examples"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{location}: not a file of examples ({type(error).__name__}: {error}); "
            "run the evaluate stage again"
        ) from error


def attention_over_regions(
    attention: Sequence["Tensor"],
    sample: int,
    token_positions: Sequence[int],
    num_text: int,
    num_regions: int,
) -> NDArray[np.float32]:
    """Returns the heads' mean attention of text tokens to regions: (L, N, R), layers in order.

    `attention` is `Encoded.attention`: per layer (B, H, T+R, T+R), queries before keys, text
    first; `sample` is the place in B and `num_text` is T with its padding. `token_positions` are
    the N queries: the [MASK] of a question, or for a generated word the position whose state
    predicted it, one before its own. Regions beyond `num_regions` are padding and left out.
    """
    regions = slice(num_text, num_text + num_regions)
    layers = [
        layer[sample, :, list(token_positions), regions].detach().float().mean(dim=0).cpu().numpy()
        for layer in attention
    ]
    return np.stack(layers).astype(np.float32)


def _rounded(values: NDArray[np.float32]) -> Any:
    return np.round(values.astype(np.float64), DECIMALS).tolist()
