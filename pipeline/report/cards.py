"""The cards of examples: a picture with what was predicted, and where the model looked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.examples import Example
from pipeline.report.heat import Heat, attention_heat
from pipeline.report.inline_image import InlineImage, inline_image


@dataclass(frozen=True)
class Card:
    """An example ready to be drawn."""

    example: Example
    picture: InlineImage
    heat: Heat | None
    num_layers: int
    first_token: int
    people: str
    labels: str  # what the filter may ask for: right, wrong, picture


def card_of(example: Example) -> Card:
    attention = example.attention
    first_token = 0
    if attention is not None:  # begin with the word that looked hardest at one place
        first_token = int(attention.weights[-1].max(axis=1).argmax())
    labels = []
    if example.score is not None and example.kind == "vqa":
        labels.append("right" if example.score > 0 else "wrong")
        if example.blind_score is not None and example.score > example.blind_score:
            labels.append("picture")
    return Card(
        example=example,
        picture=inline_image(example.image),
        heat=attention_heat(attention) if attention else None,
        num_layers=len(attention.weights) if attention else 0,
        first_token=first_token,
        people=_people(example.references),
        labels=" ".join(labels),
    )


def _people(answers: Sequence[str]) -> str:
    """Writes equal answers once, with how many people gave them: `red ×8, dark red ×2`."""
    counts = Counter(answers).most_common()
    return ", ".join(
        f"{answer} ×{count}" if len(answers) > 1 else answer for answer, count in counts
    )
