"""The prediction of `sightline predict`: a caption of one photograph, or an answer about it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.benchmarks.caption import CaptionConfig
from pipeline.benchmarks.vqa import VqaConfig
from pipeline.data.load.loader import Batch
from pipeline.data.media.image_check import BadImageError
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.data.read.features import FeatureBatch, grid_boxes
from pipeline.data.read.images import live_features
from pipeline.data.sample import Question, Texts
from pipeline.data.text.picture_range import PictureRange
from pipeline.errors import ConfigError, FeatureError, ModelError
from pipeline.models.generation import Decoding
from pipeline.pretrained.files import OWN, extractor_of, is_model
from pipeline.pretrained.folder import ModelFolder, load_model
from pipeline.vision.extractors.live import live_config
from pipeline.vision.extractors.registry import from_card, settings_of

NUM_ANSWERS = 5


def predict(
    location: str, image: str, question: str | None = None, beams: int | None = None
) -> dict[str, Any]:
    """Returns `text`, a caption or the answer that scores best, and for a question `answers`.

    `location` is a run or a model folder. Each of `answers` has its own score from 0 to 1; together
    they are no distribution. A caption is written as the model was scored, but for `beams`, and
    `decoding` says how. `notes` tell what should be known before the text is believed. Raises
    ModelError if no model is there, it is damaged, or it was not trained for what is asked;
    ConfigError for a question without words; FeatureError or StorageError if the image cannot be
    read.
    """
    if question is not None and not question.strip():
        raise ConfigError("--question: it is empty; ask something, or leave it out for a caption")
    if question is not None and beams is not None:
        raise ConfigError("--beams: an answer is chosen, not written; leave it out")
    place = _model_folder(location)
    folder = load_model(place)
    for key in ("objectives", "max_tokens", "phase", "extractor"):
        if key not in folder.card:
            raise ModelError(f"{storage.join(place, OWN)}: {key} is missing")
    trained_for = folder.card["objectives"]
    asked, objective = ("write a caption", "lm") if question is None else ("answer", "answer")
    if objective not in trained_for:
        raise ModelError(
            f"{location}: this model was not trained to {asked}; it was trained on "
            f"{', '.join(trained_for)}"
        )
    payload = storage.read_bytes(image)
    features = _features(folder.card, storage.join(place, OWN), image, payload)
    batch = _batch(features, question or "")
    is_blind = folder.card["phase"] == "blind"
    notes = []
    if is_blind:
        notes.append(
            "this model is a blind twin, trained without pictures: what it says is of the question "
            "alone, and of no picture"
        )
    elif "pictures" in folder.card:
        notes += [
            f"{image} is unlike the pictures of training: {reason}"
            for reason in _unlike(folder.card, storage.join(place, OWN), features, payload)
        ]
    if question is None:
        decoding = folder.decoding
        if decoding is None:
            decoding = CaptionConfig(max_tokens=folder.card["max_tokens"]).decoding()
            notes.append("the model folder does not say how captions were written: by default")
        decoding = decoding if beams is None else replace(decoding, beams=beams)
        text = _caption(folder, batch, decoding, is_blind)
        if not text:
            notes.append("the likeliest caption of this picture is the empty one")
        return {"image": image, "text": text, "decoding": asdict(decoding), "notes": notes}
    max_tokens = folder.card.get("question_tokens", folder.card["max_tokens"])
    notes += _reading(folder, question, max_tokens)
    vqa = VqaConfig(max_tokens=max_tokens).build()
    ((_, ranked),) = vqa.rank(
        folder.model,
        folder.tokenizer,
        folder.answers,
        [batch],
        blind=is_blind,
        num_answers=NUM_ANSWERS,
    )
    answers = [{"answer": answer, "score": round(score, 4)} for answer, score in ranked]
    return {
        "image": image,
        "question": question,
        "text": ranked[0][0],
        "answers": answers,
        "scores": "each answer's own, from 0 to 1: they do not sum to 1",
        "notes": notes,
    }


def _caption(folder: ModelFolder, batch: Batch, decoding: Decoding, is_blind: bool) -> str:
    caption = CaptionConfig(
        max_tokens=decoding.max_new_tokens + 1,
        beams=decoding.beams,
        length_penalty=decoding.length_penalty,
        early_stopping=decoding.early_stopping,
    ).build()
    (row,) = caption.predict(
        folder.model, folder.tokenizer, folder.answers, [batch], blind=is_blind
    )
    text: str = row["caption"].strip()
    return text


def _unlike(
    card: Mapping[str, Any], place: str, features: FeatureBatch, payload: bytes
) -> list[str]:
    """Says in what a picture is unlike those that the model was trained on."""
    try:
        pictures = PictureRange.from_json(card["pictures"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{place}: pictures: no ranges of figures: {error!r}") from error
    return pictures.unlike(features, payload)


def _reading(folder: ModelFolder, question: str, max_tokens: int) -> list[str]:
    """Says what of a question the model does not read."""
    tokenizer = folder.tokenizer
    pieces = tokenizer.tokenize(question)
    room = max_tokens - 3  # [CLS], [MASK] and [SEP]
    notes = []
    if len(pieces) > room:
        notes.append(f"the question has {len(pieces)} word pieces; only the first {room} are read")
    unknown = [
        word
        for word in question.split()
        if tokenizer.unk_token and tokenizer.unk_token in tokenizer.tokenize(word)
    ]
    if unknown:
        notes.append(f"the model does not know these words: {' '.join(unknown)}")
    return notes


def _model_folder(location: str) -> str:
    """Returns the model folder itself, or the one of a run."""
    for folder in (location, storage.join(location, "model")):
        if is_model(folder):
            return folder
    raise ModelError(
        f"{location}: no model here; expected a model folder with sightline.json, or a run that "
        "`sightline finetune` has finished"
    )


def _batch(features: FeatureBatch, question: str) -> Batch:
    """Returns an image's features with the question."""
    return Batch(
        keys=["image"],
        rows=np.zeros(1, np.int64),
        positions=np.zeros(1, np.int64),
        texts=[
            Texts(
                image_id=0,
                captions=(),
                questions=(Question(question_id=0, question=question, answers=()),),
                dialogs=(),
            )
        ],
        text_index=np.zeros(1, np.int64),
        distractors=[],
        features=features,
        step=0,
        seed=0,
    )


def _features(card: Mapping[str, Any], place: str, image: str, payload: bytes) -> FeatureBatch:
    """Makes of an image what a model was trained on, as its extractor's card says."""
    extractor = _extractor(card, place)
    try:
        return _extracted(extractor, payload)
    except BadImageError as error:
        raise FeatureError(f"{image}: {error}") from error
    except FeatureError as error:
        raise FeatureError(f"{image}: {error}") from error


def _extractor(card: Mapping[str, Any], place: str) -> ExtractorCard:
    """Returns the card of what a model sees by; ModelError if it says none that can be built."""
    extractor = extractor_of(card)
    if extractor is None:
        raise ModelError(f"{place}: extractor: the card of an extractor is missing")
    try:
        settings_of(extractor)
    except FeatureError as error:
        raise ModelError(f"{place}: extractor: {error}") from error
    return extractor


def _extracted(card: ExtractorCard, image: bytes) -> FeatureBatch:
    live = live_config(card)
    if live is not None:
        return live_features(image, live)
    extractor = from_card(card)
    (feature,) = extractor.extract([extractor.prepare(image)])
    boxes = feature.boxes
    if boxes is None:
        assert card.grid is not None
        boxes = grid_boxes(*card.grid)
    return FeatureBatch(
        values=feature.values[None],
        boxes=boxes[None],
        num_regions=np.array([len(feature.values)], np.int32),
    )
