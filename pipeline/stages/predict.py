"""One photograph, with or without a question, to what a model says of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.benchmarks.caption import CaptionConfig
from pipeline.benchmarks.vqa import VqaConfig
from pipeline.data.features import FeatureBatch, grid_boxes
from pipeline.data.image_check import BadImageError
from pipeline.data.images import live_features
from pipeline.data.loader import Batch
from pipeline.data.sample import Question, Texts
from pipeline.errors import FeatureError, ModelError
from pipeline.model_files import is_model
from pipeline.training.model_folder import ModelFolder, load_model
from pipeline.vision.extractor import from_card
from pipeline.vision.live import live_config

NUM_ANSWERS = 5


def predict(location: str, image: str, question: str) -> dict[str, Any]:
    """Returns `text`, a caption or the likeliest answer, and for a question the next `answers`.

    `location` is a run or a model folder. Raises ModelError if no model is there, or it was not
    trained for what is asked; FeatureError or StorageError if the image cannot be read.
    """
    folder = load_model(_model_folder(location))
    batch = _batch(folder, image, question)
    trained_for = folder.card["objectives"]
    asked, objective = ("answer a question", "answer") if question else ("write a caption", "lm")
    if objective not in trained_for:
        raise ModelError(
            f"{location}: this model was not trained to {asked}; it was trained on "
            f"{', '.join(trained_for)}"
        )
    max_tokens = folder.card["max_tokens"]
    if not question:
        caption = CaptionConfig(max_tokens=max_tokens).build()
        (row,) = caption.predict(folder.model, folder.tokenizer, folder.answers, [batch])
        return {"image": image, "text": row["caption"]}
    vqa = VqaConfig(max_tokens=max_tokens).build()
    ((_, ranked),) = vqa.rank(
        folder.model, folder.tokenizer, folder.answers, [batch], num_answers=NUM_ANSWERS
    )
    answers = [{"answer": answer, "probability": round(score, 4)} for answer, score in ranked]
    return {"image": image, "question": question, "text": ranked[0][0], "answers": answers}


def _model_folder(location: str) -> str:
    """Returns the model folder itself, or the one of a run."""
    for folder in (location, storage.join(location, "model")):
        if is_model(folder):
            return folder
    raise ModelError(
        f"{location}: no model here; expected a model folder with sightline.json, or a run that "
        "`sightline finetune` has finished"
    )


def _batch(folder: ModelFolder, image: str, question: str) -> Batch:
    """Returns the image's features, made by the model's own extractor, with the question."""
    payload = storage.read_bytes(image)
    try:
        features = _features(folder.card["extractor"], payload)
    except (FeatureError, BadImageError) as error:
        raise FeatureError(f"{image}: {error}") from error
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


def _features(card: Mapping[str, Any], image: bytes) -> FeatureBatch:
    """Makes of an image what a model was trained on, as its extractor's card says."""
    live = live_config(card)
    if live is not None:
        return live_features(image, live)
    extractor = from_card(card)
    (feature,) = extractor.extract([extractor.prepare(image)])
    boxes = grid_boxes(*card["grid"]) if feature.boxes is None else feature.boxes
    return FeatureBatch(
        values=feature.values[None],
        boxes=boxes[None],
        num_regions=np.array([len(feature.values)], np.int32),
    )
