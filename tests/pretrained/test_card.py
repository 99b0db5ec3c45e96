from typing import Any

import yaml

from pipeline.pretrained.card import ModelCard
from pipeline.training.config import TrainingConfig

STEPS = 20


def card(**changes: Any) -> ModelCard:
    training = TrainingConfig(steps=STEPS, global_batch_size=8, micro_batch_size=4)
    made = {
        "recipe": "birds",
        "family": "visualbert",
        "phase": "finetune",
        "max_tokens": 24,
        "step": STEPS,
        "data": {"dataset": "/data/birds", "version": 7, "split": "train", "features": None},
        "extractor": None,
        "objectives": {"answer": {}},
        "training": training.model_dump(mode="json"),
        "seed": 3,
        **changes.pop("made", {}),
    }
    settings = {"model_type": "visual_bert", "num_parameters": 12_345, "num_answers": 5}
    return ModelCard(made=made, **{**settings, **changes})


def front_matter(page: str) -> dict[str, Any]:
    _, matter, _ = page.split("---\n", 2)
    document: dict[str, Any] = yaml.safe_load(matter)
    return document


def test_the_front_matter_is_what_the_hub_reads() -> None:
    metrics = {"vqa/accuracy": 81.25, "vqa/accuracy/count": 60.0}
    found = front_matter(card(metrics=metrics).page())
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "visual-question-answering"
    (model,) = found["model-index"]
    (result,) = model["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 81.25}]  # the whole, not its parts
    assert result["dataset"] == {"name": "birds", "type": "birds"}


def test_a_family_that_transformers_does_not_have_is_ours_to_open() -> None:
    page = card(model_type="uniter").page()
    assert front_matter(page)["library_name"] == "sightline"
    assert "from_pretrained" not in page
    assert "sightline predict FOLDER --image photo.jpg --question" in page


def test_it_says_what_was_not_measured_and_not_finished() -> None:
    page = card(made={"step": 5}, figures={"mlm": 0.5}).page()
    assert "Not scored on held-out data when this was written." in page
    assert "In training at step 5: mlm 0.5000." in page
    assert "nobody had measured how good it is" in page
    assert "It was taken from training at step 5 of 20, before the learning rate" in page
    assert "before the learning rate" not in card().page()


def test_what_the_twin_without_images_reaches_stands_beside_the_score() -> None:
    page = card(metrics={"vqa/accuracy": 81.25, "vqa/accuracy_blind": 40.5}).page()
    assert "Of 81.25 in vqa/accuracy, a twin that never sees an image reaches 40.50." in page


def test_settings_of_a_release_without_groups_are_read() -> None:
    flat = {"steps": 9, "global_batch_size": 8, "precision": "fp32", "zero_stage": 1}
    flat |= {"learning_rate": 0.25, "warmup_steps": 2, "decay": "linear", "weight_decay": 0.125}
    page = card(made={"training": flat, "step": 9}).page()
    assert "| learning rate | 0.25 |" in page
    assert "step 9 of 9" in page


def test_what_was_taken_over_from_another_model_is_told() -> None:
    initial = {"initial": "bert", "taken": 199, "new": 1, "new_parameters": ["answer_head.weight"]}
    initial |= {"left_out": 0, "left_out_tensors": [], "misshaped": []}
    page = card(made={"initial": initial}).page()
    assert "| parameters taken over | 199 |" in page
    assert "| new (1) | answer_head.weight |" in page
    assert "## Initial weights" not in card().page()
