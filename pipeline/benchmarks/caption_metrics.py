"""The official COCO caption scores of generated captions."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.benchmarks.ptb_tokenizer import tokenize
from pipeline.errors import MetricError

MetricName = Literal["bleu", "rouge-l", "cider", "meteor"]

References = Mapping[int | str, Sequence[str]]  # image id -> its captions
Tokenized = dict[int | str, list[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Scores as fractions (CIDEr may exceed 1), named bleu1 to bleu4, rouge-l, cider, meteor."""

    corpus: Mapping[str, float]
    per_image: Mapping[int | str, Mapping[str, float]]


def unavailable(metrics: Sequence[MetricName]) -> dict[MetricName, str]:
    """Returns which of these cannot be computed on this machine, and why."""
    if "meteor" in metrics and shutil.which("java") is None:
        return {"meteor": "METEOR is a Java program, and there is no `java` on PATH"}
    return {}


def caption_scores(
    results: Sequence[Mapping[str, Any]],
    references: References,
    metrics: Sequence[MetricName] = ("bleu", "rouge-l", "cider", "meteor"),
) -> CaptionScores:
    """Scores `{"image_id": ..., "caption": ...}` rows as tylin/coco-caption does.

    Metrics that are `unavailable` are absent from the scores. Raises MetricError unless every
    image has exactly one result, in any order, and a reference with a word in it.
    """
    captions = _captions_by_id(results, references)
    missing = unavailable(metrics)
    truth = {image: [tokenize(text) for text in texts] for image, texts in references.items()}
    if not any(any(texts) for texts in truth.values()):
        raise MetricError("caption references: no caption has a word in it")
    said = {image: [tokenize(captions[image])] for image in references}
    corpus: dict[str, float] = {}
    per_image: dict[int | str, dict[str, float]] = {image: {} for image in references}
    for metric in metrics:
        if metric in missing:
            continue
        for name, (score, scores) in _score(metric, truth, said).items():
            corpus[name] = float(score)
            for image, one in zip(references, scores, strict=True):
                per_image[image][name] = float(one)
    return CaptionScores(corpus, per_image)


def _score(
    metric: MetricName, truth: Tokenized, said: Tokenized
) -> dict[str, tuple[float, Sequence[float]]]:
    """Runs one scorer of pycocoevalcap; returns name -> corpus score, score of each image."""
    if metric == "bleu":
        from pycocoevalcap.bleu.bleu import Bleu

        corpus, each = Bleu(4).compute_score(truth, said, verbose=0)
        pairs = zip(corpus, each, strict=True)
        return {f"bleu{n}": pair for n, pair in enumerate(pairs, start=1)}
    if metric == "rouge-l":
        from pycocoevalcap.rouge.rouge import Rouge

        return {"rouge-l": Rouge().compute_score(truth, said)}
    if metric == "cider":
        from pycocoevalcap.cider.cider import Cider

        return {"cider": Cider().compute_score(truth, said)}
    return {"meteor": _meteor(truth, said)}


def _meteor(truth: Tokenized, said: Tokenized) -> tuple[float, list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        corpus, each = scorer.compute_score(truth, said)
    except (OSError, ValueError) as error:  # its process ended, or printed what is no number
        scorer.meteor_p.kill()
        reason = scorer.meteor_p.stderr.read().decode(errors="replace").strip()
        raise MetricError(f"METEOR's Java process failed ({error}): {reason[-500:]}") from error
    finally:
        # pycocoevalcap ends the process when the scorer is forgotten, but not its other pipes.
        scorer.meteor_p.kill()
        scorer.meteor_p.stdout.close()
        scorer.meteor_p.stderr.close()
    return corpus, each


def _captions_by_id(
    results: Sequence[Mapping[str, Any]], references: References
) -> dict[int | str, str]:
    """Returns each image's caption, or raises MetricError naming the ids that do not pair."""
    captions: dict[int | str, str] = {}
    for row, result in enumerate(results):
        if not isinstance(result.get("caption"), str) or "image_id" not in result:
            raise MetricError(
                f"caption results, row {row}: expected image_id and a string caption, "
                f"found {result}"
            )
        if result["image_id"] in captions:
            raise MetricError(f"caption results: image_id {result['image_id']} comes twice")
        captions[result["image_id"]] = result["caption"]
    if not references:
        raise MetricError("caption: there is no image to score")
    for fault, ids in (
        ("have no result", references.keys() - captions.keys()),
        ("have no references", captions.keys() - references.keys()),
        ("have no captions", {image for image, texts in references.items() if not texts}),
    ):
        if ids:
            some = ", ".join(str(one) for one in sorted(ids, key=str)[:5])
            raise MetricError(f"caption results: {len(ids)} image_ids {fault}: {some}")
    return captions
