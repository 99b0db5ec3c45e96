"""The evaluate stage: a model's official result files, scores, and pictures to look at."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from pipeline import storage
from pipeline.benchmarks.base import Benchmark, Evaluation, ResultRow, results_json
from pipeline.data.load.loader import Batch
from pipeline.data.sample import Texts
from pipeline.errors import ConfigError, StageError
from pipeline.pretrained.files import extractor_of, is_model, read_own
from pipeline.pretrained.folder import ModelFolder, load_model, save_decoding
from pipeline.recipe import Recipe
from pipeline.report.examples import (
    Attention,
    Example,
    Gallery,
    attention_over_regions,
    write_gallery,
)
from pipeline.report.inline_image import thumbnail
from pipeline.stages.data_inputs import DataInputs
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome, once

EVALUATE_VERSION = 1
BATCH_SIZE = 64
EXAMPLES = {"vqa": 24, "caption": 12}  # shown in the report, of each benchmark
BLIND = "_blind"  # the end of the name of what the twin without images made


@dataclass
class _Scored:
    """A benchmark's results, with those of the blind twin if there is one."""

    benchmark: Benchmark[Any]
    results: list[ResultRow]
    evaluation: Evaluation
    blind_results: list[ResultRow] = field(default_factory=list)
    blind: Evaluation | None = None

    def metrics(self) -> dict[str, float]:
        metrics = _flat(self.benchmark, self.evaluation, "")
        return metrics if self.blind is None else metrics | _flat(self.benchmark, self.blind, BLIND)


def run(recipe: Recipe, progress: StageProgress) -> Outcome:
    """Scores RUN/model, and its blind twin, on the held-out split with official metrics."""
    inputs = DataInputs.open(recipe)
    inputs.tell(progress)
    folder = storage.join(recipe.run, "model")
    blind_folder = storage.join(recipe.run, "blind", "model")
    if not is_model(folder):
        raise StageError(f"{folder}: no model; run `sightline finetune` with this recipe first")
    card = read_own(folder)
    _require_same_features(folder, card, inputs, progress)
    has_blind = recipe.training.blind_twin and is_model(blind_folder)
    parts = {
        "code": EVALUATE_VERSION,
        "inputs": inputs.identity(recipe.dataset.validation_split),
        "benchmarks": recipe.benchmarks.model_dump(mode="json"),
        "model": card,
        "blind": read_own(blind_folder) if has_blind else None,
    }

    def work() -> dict[str, Any]:
        model = load_model(folder)
        twin = load_model(blind_folder) if has_blind else None
        device = _device(recipe)
        split = inputs.split(recipe.dataset.validation_split)
        unseen = split.without_features()
        examples: list[Example] = []
        metrics: dict[str, float] = {}
        headlines: dict[str, float] = {}
        absent: dict[str, str] = {}
        for name, benchmark in recipe.benchmarks.build().items():
            if not split.num_texts(benchmark.kind):
                raise StageError(
                    f"benchmarks.{name}: split {split.name!r} has no {benchmark.kind}; leave this "
                    "benchmark out, or choose another dataset.validation_split"
                )

            def predict(
                one: ModelFolder, blind: bool, benchmark: Benchmark[Any] = benchmark
            ) -> Any:
                batches = _shown(benchmark, unseen if blind else split, progress, blind)
                return benchmark.predict(
                    one.model.to(device), one.tokenizer, one.answers, batches, device, blind
                )

            references = benchmark.references(split)
            results = predict(model, False)
            scored = _Scored(benchmark, results, benchmark.evaluate(results, references))
            _write(recipe, f"{name}.results.json", results_json(results))
            if twin is not None:
                scored.blind_results = predict(twin, True)
                scored.blind = benchmark.evaluate(scored.blind_results, references)
                _write(recipe, f"{name}{BLIND}.results.json", results_json(scored.blind_results))
            metrics |= scored.metrics()
            absent |= scored.evaluation.absent
            headlines |= _headlines(scored)
            examples += _examples(scored, model, inputs, recipe, device)
        selection = (
            f"The first pictures of split “{split.name}” in the order they are stored, and of "
            "each one question or caption: not chosen by how the model did."
        )
        if recipe.benchmarks.caption is not None:
            for scored_folder in (folder, *([blind_folder] if twin else [])):
                save_decoding(scored_folder, recipe.benchmarks.caption.decoding())
        write_gallery(recipe.run, Gallery(selection, tuple(examples)))
        _write(recipe, "metrics.json", _json(metrics))
        if absent:
            for name, reason in absent.items():
                progress.note(f"{name} was not computed: {reason}")
        return {"headlines": headlines, "absent": absent}

    return once(
        recipe.run,
        "evaluate",
        parts,
        work,
        leaves=[storage.join(recipe.run, "evaluation", "metrics.json")],
    )


def _require_same_features(
    folder: str, card: Mapping[str, Any], inputs: DataInputs, progress: StageProgress
) -> None:
    """Raises ConfigError if a model was trained on features of another extractor.

    Those of another release, made by the same settings, are told of.
    """
    then, now = extractor_of(card), inputs.extractor
    if then is None or then.identity == now.identity:
        return
    other = then.name
    if (then.type, then.config, then.weights, then.live) != (
        now.type,
        now.config,
        now.weights,
        now.live,
    ):
        raise ConfigError(
            f"features.extractor: {folder} was trained on features of {other}, and the recipe's "
            f"are of {inputs.name}; set it as it was, or run `sightline finetune`"
        )
    progress.note(
        f"warning: the model was trained on features of {other}, which an earlier release made, "
        f"and is scored on those of {inputs.name}"
    )


def _headlines(scored: _Scored) -> dict[str, float]:
    """Returns the few numbers that a run is known by."""
    chosen = {"vqa": ("vqa/accuracy",), "caption": ("caption/cider", "caption/bleu4")}
    metrics = scored.metrics()
    return {
        name + twin: metrics[name + twin]
        for name in chosen[scored.benchmark.name]
        for twin in ("", BLIND)
        if name + twin in metrics
    }


def _flat(benchmark: Benchmark[Any], evaluation: Evaluation, twin: str) -> dict[str, float]:
    """Returns all scores under one name each; question types are `vqa/accuracy/<type>`."""
    flat = {}
    for name, value in evaluation.metrics.items():
        base, metric, *rest = name.split("/")
        flat["/".join([base, metric + twin, *rest])] = value
    for name, value in evaluation.details.get("accuracy by question type", {}).items():
        flat[f"{benchmark.name}/accuracy{twin}/{name.replace('/', '-')}"] = value
    return flat


def _shown(
    benchmark: Benchmark[Any], split: Any, progress: StageProgress, blind: bool
) -> Iterator[Batch]:
    """Yields the benchmark's batches and shows how far they are."""
    totals = split.totals(benchmark.kind)
    of_rows = benchmark.name == "caption"
    total = int((totals.num_rows_with_texts if of_rows else totals.num_texts).sum())
    done = 0
    phase = f"{benchmark.name}{' blind' if blind else ''}"
    for batch in benchmark.batches(split, BATCH_SIZE):
        progress.update(done, total, phase=phase)
        yield batch
        done += len(batch.keys)
    progress.update(done, total, phase=phase)


def _examples(
    scored: _Scored, model: ModelFolder, inputs: DataInputs, recipe: Recipe, device: str
) -> list[Example]:
    """Draws the first pictures of the split, what was predicted of each, and where it looked."""
    benchmark = scored.benchmark
    split = inputs.split(recipe.dataset.validation_split)
    kind = cast(Literal["vqa", "caption"], benchmark.name)
    predicted = {_id(row): row for row in scored.results}
    blind = {_id(row): row for row in scored.blind_results}
    examples = []
    seen: set[int] = set()
    for batch in benchmark.batches(split, 1):
        row = int(batch.rows[0])
        # One question a picture, a different one each time so that every kind of question comes.
        wanted = len(seen) % max(len(batch.texts[0].questions), 1)
        if row in seen or (kind == "vqa" and int(batch.text_index[0]) != wanted):
            continue
        seen.add(row)
        identity, question, question_type, references = _asked(kind, batch)
        prediction = _said(predicted[identity])
        twin = blind.get(identity)
        examples.append(
            Example(
                key=batch.keys[0],
                kind=kind,
                image=thumbnail(split.image(row)),
                references=references,
                prediction=prediction,
                question=question,
                question_type=question_type,
                score=scored.evaluation.scores.get(identity),
                blind_prediction=_said(twin) if twin else None,
                blind_score=scored.blind.scores.get(identity) if twin and scored.blind else None,
                attention=_attention(benchmark, model, batch, prediction, inputs.grid, device),
            )
        )
        if len(examples) == EXAMPLES[kind]:
            break
    return examples


def _asked(kind: str, batch: Batch) -> tuple[int | str, str, str, tuple[str, ...]]:
    """Returns a result row's id, the question, its type, and what people said."""
    texts: Texts = batch.texts[0]
    if kind == "caption":
        return texts.image_id, "", "", texts.captions
    question = texts.questions[int(batch.text_index[0])]
    return question.question_id, question.question, question.question_type, question.answers


def _attention(
    benchmark: Benchmark[Any],
    folder: ModelFolder,
    batch: Batch,
    prediction: str,
    grid: tuple[int, int] | None,
    device: str,
) -> Attention | None:
    """Returns where the answer's slot, or each written word, looked; None if it cannot be told."""
    import torch

    from pipeline.objectives.base import Vocabulary
    from pipeline.objectives.stream import encode_texts, make_inputs, moved

    tokenizer, model = folder.tokenizer, folder.model
    vocabulary = Vocabulary.of(tokenizer)
    features = batch.features
    assert features is not None
    if benchmark.name == "vqa":
        inputs = benchmark.inputs(tokenizer, batch)
        places = [int((~inputs.token_padding[0]).sum()) - 2]  # of [MASK], before [SEP]
        tokens: Sequence[str] = (prediction,)
        mask: Literal["full", "prefix"] = "full"
    else:
        encodings = encode_texts(
            [prediction], "captions", tokenizer, vocabulary, benchmark.max_tokens
        )
        inputs = make_inputs(encodings, features)
        words = np.flatnonzero(encodings.is_word[0])
        if not len(words):
            return None
        places = [int(word) - 1 for word in words]  # a word is predicted from the place before it
        tokens = tokenizer.convert_ids_to_tokens(encodings.tokens[0, words].tolist())
        mask = "prefix"
    with torch.inference_mode():
        encoded = model.encode(
            moved(inputs, torch.device(device), torch.float32), mask=mask, attention=True
        )
    if not encoded.attention:
        return None
    num_regions = int(features.num_regions[0])
    return Attention(
        tokens=tuple(tokens),
        weights=attention_over_regions(
            encoded.attention, 0, places, inputs.tokens.shape[1], num_regions
        ),
        boxes=features.boxes[0, :num_regions],
        grid=grid,
    )


def _id(row: ResultRow) -> int | str:
    identity: int | str = row["question_id"] if "question_id" in row else row["image_id"]
    return identity


def _said(row: ResultRow) -> str:
    said: str = row["answer"] if "answer" in row else row["caption"]
    return said


def _device(recipe: Recipe) -> str:
    import torch

    return "cuda" if recipe.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu"


def _write(recipe: Recipe, name: str, payload: bytes) -> None:
    storage.write_bytes(storage.join(recipe.run, "evaluation", name), payload)


def _json(document: Any) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode()
