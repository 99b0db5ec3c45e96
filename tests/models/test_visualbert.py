"""VisualBERT against transformers, head by head, and the properties of its masks and heads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.models.families import from_saved, load_weights, to_saved
from pipeline.models.inputs import Inputs
from pipeline.models.visualbert import VisualBert, VisualBertConfig
from tests.models.examples import (
    WIDTH,
    WORDS,
    assert_close,
    batch,
    randomise,
    read,
    save,
    transformers_visualbert_config,
    visualbert,
)


def transformers_inputs(inputs: Inputs, segment: int = 1) -> dict[str, Tensor]:
    return {
        "input_ids": inputs.tokens,
        "attention_mask": (~inputs.token_padding).long(),
        "visual_embeds": inputs.features,
        "visual_attention_mask": (~inputs.region_padding).long(),
        "visual_token_type_ids": torch.full_like(inputs.region_padding, segment, dtype=torch.long),
    }


def assert_equal_on_real_positions(inputs: Inputs, ours: Tensor, theirs: Tensor) -> None:
    visible = ~torch.cat([inputs.token_padding, inputs.region_padding], dim=1)
    assert_close(ours[visible], theirs[visible])


@torch.no_grad()
def test_transformers_pretraining_weights_give_its_outputs(tmp_path: Path) -> None:
    theirs = randomise(transformers.VisualBertForPreTraining(transformers_visualbert_config()))
    theirs.save_pretrained(tmp_path)
    ours, report = from_saved(*read(tmp_path))
    ours.eval()
    inputs = batch()
    expected = theirs(**transformers_inputs(inputs), output_hidden_states=True)
    encoded = ours.encode(inputs)
    states = torch.cat([encoded.text, encoded.regions], dim=1)
    assert_equal_on_real_positions(inputs, states, expected.hidden_states[-1])
    scores = ours.token_logits(states.flatten(0, 1)).view(*states.shape[:2], WORDS)
    assert_equal_on_real_positions(inputs, scores, expected.prediction_logits)
    matches = ours.match_logits(encoded)
    assert_close(matches, expected.seq_relationship_logits)
    assert report.new == ()
    assert report.ignored == ()


@torch.no_grad()
def test_transformers_question_answering_weights_give_its_answers(tmp_path: Path) -> None:
    theirs = randomise(
        transformers.VisualBertForQuestionAnswering(transformers_visualbert_config())
    )
    theirs.save_pretrained(tmp_path)
    ours, report = from_saved(*read(tmp_path))
    ours.eval()
    inputs = batch()
    expected = theirs(**transformers_inputs(inputs)).logits
    assert_close(ours.answer_logits(ours.encode(inputs), inputs), expected)
    assert {name.split(".")[0] for name in report.new} == {"token_head", "match_head"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Model", "ForPreTraining", "ForQuestionAnswering"])
def test_transformers_opens_what_we_save(tmp_path: Path, kind: str) -> None:
    ours = visualbert()
    config, tensors = to_saved(ours.config, dict(ours.named_parameters()))
    save(tmp_path, config, tensors)
    opened: Any = getattr(transformers, f"VisualBert{kind}")
    theirs, loading = opened.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    inputs = batch()
    outputs = theirs.eval()(**transformers_inputs(inputs))
    encoded = ours.encode(inputs)
    if kind == "Model":
        assert_close(encoded.pooled, outputs.pooler_output)
    elif kind == "ForPreTraining":
        states = torch.cat([encoded.text, encoded.regions], dim=1)
        scores = ours.token_logits(states.flatten(0, 1)).view(*states.shape[:2], WORDS)
        assert_equal_on_real_positions(inputs, scores, outputs.prediction_logits)
        matches = ours.match_logits(encoded)
        assert_close(matches, outputs.seq_relationship_logits)
    else:
        answers = ours.answer_logits(encoded, inputs)
        assert_close(answers, outputs.logits)


def test_saved_model_is_read_back_unchanged() -> None:
    ours = visualbert(position_fourier=8, visual_token_type=0)
    config, tensors = to_saved(ours.config, dict(ours.named_parameters()))
    again, report = from_saved(config, tensors)
    assert again.config == ours.config
    assert report.new == ()
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, dict(ours.named_parameters())[name], rtol=0, atol=0)


@torch.no_grad()
def test_original_weights_are_read_with_their_segment_for_regions() -> None:
    theirs = randomise(transformers.VisualBertForPreTraining(transformers_visualbert_config()))
    renames = {
        "visual_bert.": "bert.bert.",
        "cls.": "bert.cls.",
        "visual_token_type_embeddings": "token_type_embeddings_visual",
        "visual_position_embeddings": "position_embeddings_visual",
        "visual_projection": "projection",
    }
    original = {}
    for name, tensor in theirs.state_dict().items():
        for new, old in renames.items():
            name = name.replace(new, old, 1)
        original[name] = tensor
    del original["bert.cls.predictions.decoder.bias"]
    original["detector.mask.weight"] = torch.zeros(1)
    ours = visualbert(visual_token_type=0)
    report = load_weights(ours, original, "original")
    inputs = batch()
    expected = theirs.visual_bert(**transformers_inputs(inputs, segment=0)).pooler_output
    assert_close(ours.encode(inputs).pooled, expected)
    assert report.ignored == ("detector.mask.weight",)
    assert set(report.new) == {"answer_head.weight", "answer_head.bias"}


@torch.no_grad()
def test_bert_fills_the_text_side_and_regions_begin_as_its_segment() -> None:
    bert = randomise(
        transformers.BertForPreTraining(
            transformers.BertConfig(
                vocab_size=WORDS,
                hidden_size=WIDTH,
                num_hidden_layers=3,
                num_attention_heads=3,
                intermediate_size=20,
                max_position_embeddings=17,
            )
        )
    )
    tensors = {  # as in the oldest files
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in bert.state_dict().items()
    }
    ours = visualbert(num_layers=3)
    report = load_weights(ours, tensors, "bert")
    inputs = batch().without_image()
    expected = bert(inputs.tokens, attention_mask=(~inputs.token_padding).long())
    encoded = ours.encode(inputs)
    scores = ours.token_logits(encoded.text.flatten(0, 1)).view(*encoded.text.shape[:2], WORDS)
    assert_equal_on_real_positions(inputs, scores, expected.prediction_logits)
    embeddings = bert.bert.embeddings
    assert torch.equal(
        ours.visual_embeddings.token_type.weight, embeddings.token_type_embeddings.weight
    )
    assert {name.split(".")[0] for name in report.new} == {
        "visual_embeddings",
        "match_head",
        "answer_head",
    }


@torch.no_grad()
def test_attention_maps_are_those_of_transformers() -> None:
    ours = visualbert()
    theirs = transformers.VisualBertForPreTraining(transformers_visualbert_config()).eval()
    config, tensors = to_saved(ours.config, dict(ours.named_parameters()))
    theirs.load_state_dict(tensors, strict=False)
    inputs = batch()
    expected = theirs(**transformers_inputs(inputs), output_attentions=True).attentions
    found = ours.encode(inputs, attention=True).attention
    assert found is not None
    looks = ~torch.cat([inputs.token_padding, inputs.region_padding], dim=1)[:, None, :, None]
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine * looks, other * looks)
    assert config["model_type"] == "visual_bert"


@torch.no_grad()
def test_bytes_are_read_as_pixels_between_minus_one_and_one() -> None:
    model = visualbert()
    inputs = batch()
    pixels = torch.randint(0, 256, inputs.features.shape, dtype=torch.uint8)
    as_bytes = replace(inputs, features=pixels)
    as_floats = replace(inputs, features=(pixels.float() / 255 - 0.5) / 0.5)
    assert_close(model.encode(as_bytes).pooled, model.encode(as_floats).pooled)


@torch.no_grad()
def test_a_box_matters_only_with_fourier_features() -> None:
    inputs = batch()
    moved = replace(inputs, boxes=inputs.boxes.flip(-1))
    blind_to_place, placed = visualbert(), visualbert(position_fourier=16)
    assert torch.equal(blind_to_place.encode(inputs).pooled, blind_to_place.encode(moved).pooled)
    assert not torch.allclose(placed.encode(inputs).pooled, placed.encode(moved).pooled, atol=1e-3)


def test_the_published_size_has_the_published_tensors() -> None:
    with torch.device("meta"):
        model = VisualBert(VisualBertConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 112_074_812
    _, tensors = to_saved(model.config, dict(model.named_parameters()))
    assert len(tensors) == 212 - 2  # transformers counts the decoder's second names too
