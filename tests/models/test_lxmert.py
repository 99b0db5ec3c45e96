"""LXMERT against transformers, head by head, in both directions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.models import blocks
from pipeline.models.families import build, from_saved, load_weights, to_saved
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.lxmert import Lxmert, LxmertConfig
from tests.models.examples import (
    ANSWERS,
    ATTRIBUTES,
    FEATURES,
    OBJECTS,
    WIDTH,
    WORDS,
    assert_close,
    batch,
    lxmert_config,
    randomise,
    read,
    save,
)


def transformers_config() -> transformers.LxmertConfig:
    return transformers.LxmertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_attention_heads=3,
        intermediate_size=20,
        visual_feat_dim=FEATURES,
        max_position_embeddings=17,
        num_qa_labels=ANSWERS,
        num_object_labels=OBJECTS,
        num_attr_labels=ATTRIBUTES,
        l_layers=3,
        r_layers=2,
        x_layers=2,
    )


def transformers_inputs(inputs: Inputs) -> dict[str, Tensor]:
    return {
        "input_ids": inputs.tokens,
        "attention_mask": (~inputs.token_padding).long(),
        "visual_feats": inputs.features,
        "visual_pos": inputs.boxes,
        "visual_attention_mask": (~inputs.region_padding).long(),
    }


def assert_same_heads(ours: Any, encoded: Encoded, theirs: Any, inputs: Inputs) -> None:
    outputs = theirs(**transformers_inputs(inputs), output_hidden_states=True)
    text, regions = ~inputs.token_padding, ~inputs.region_padding
    assert_close(encoded.text[text], outputs.language_hidden_states[-1][text])
    assert_close(encoded.regions[regions], outputs.vision_hidden_states[-1][regions])
    assert_close(ours.token_logits(encoded.text[text]), outputs.prediction_logits[text])
    assert_close(ours.match_logits(encoded), outputs.cross_relationship_score)
    assert_close(ours.answer_logits(encoded, inputs), outputs.question_answering_score)
    expected = theirs.obj_predict_head(encoded.regions[regions])
    found = ours.region_predictions(encoded.regions[regions])
    assert_close(found["objects"], expected["obj"])
    assert_close(found["attributes"], expected["attr"])
    assert_close(found["features"], expected["feat"])


@torch.no_grad()
def test_transformers_weights_give_its_outputs(tmp_path: Path) -> None:
    theirs = randomise(transformers.LxmertForPreTraining(transformers_config()))
    theirs.save_pretrained(tmp_path)
    ours, report = from_saved(*read(tmp_path))
    inputs = batch()
    assert_same_heads(ours.eval(), ours.encode(inputs), theirs, inputs)
    assert report.new == ()
    assert report.ignored == ()


@torch.no_grad()
def test_transformers_question_answering_weights_give_its_answers(tmp_path: Path) -> None:
    theirs = randomise(transformers.LxmertForQuestionAnswering(transformers_config()))
    theirs.save_pretrained(tmp_path)
    ours, report = from_saved(*read(tmp_path))
    ours.eval()
    inputs = batch()
    expected = theirs(**transformers_inputs(inputs)).question_answering_score
    assert_close(ours.answer_logits(ours.encode(inputs), inputs), expected)
    heads = {name.split(".")[0] for name in report.new}
    assert heads == {"token_head", "match_head", "region_head"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Model", "ForPreTraining", "ForQuestionAnswering"])
def test_transformers_opens_what_we_save(tmp_path: Path, kind: str) -> None:
    ours = randomise(Lxmert(lxmert_config()))
    config, tensors = to_saved(ours.config, dict(ours.named_parameters()))
    save(tmp_path, config, tensors)
    opened: Any = getattr(transformers, f"Lxmert{kind}")
    theirs, loading = opened.from_pretrained(tmp_path, output_loading_info=True)
    theirs.eval()
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    inputs = batch()
    encoded = ours.encode(inputs)
    if kind == "ForPreTraining":
        assert_same_heads(ours, encoded, theirs, inputs)
    elif kind == "Model":
        assert_close(encoded.pooled, theirs(**transformers_inputs(inputs)).pooled_output)
    else:
        outputs = theirs(**transformers_inputs(inputs))
        assert_close(ours.answer_logits(encoded, inputs), outputs.question_answering_score)


@torch.no_grad()
def test_maps_of_text_reading_regions_are_those_of_transformers() -> None:
    ours = randomise(Lxmert(lxmert_config()))
    theirs = transformers.LxmertForPreTraining(transformers_config()).eval()
    theirs.load_state_dict(to_saved(ours.config, dict(ours.named_parameters()))[1], strict=False)
    inputs = batch()
    expected = theirs(**transformers_inputs(inputs), output_attentions=True)
    encoded = ours.encode(inputs, attention=True)
    assert encoded.attention is not None
    looks = ~inputs.token_padding[:, None, :, None]
    for mine, other in zip(encoded.attention, expected.cross_encoder_attentions, strict=True):
        assert mine.shape == (2, 3, 11, 11)
        assert_close(mine[:, :, :6, 6:] * looks, other * looks)
    assert torch.equal(encoded.text, ours.encode(inputs).text)


@torch.no_grad()
def test_original_weights_are_read() -> None:
    theirs = randomise(transformers.LxmertForPreTraining(transformers_config()))
    original = {
        "module." + name.replace("lxmert.", "bert.", 1): tensor
        for name, tensor in theirs.state_dict().items()
    }
    ours = Lxmert(lxmert_config()).eval()
    report = load_weights(ours, original, "original")
    inputs = batch()
    assert_same_heads(ours, ours.encode(inputs), theirs, inputs)
    assert report.new == ()


def test_bert_fills_the_text_encoder_from_its_first_layers() -> None:
    bert = randomise(
        transformers.BertForPreTraining(
            transformers.BertConfig(
                vocab_size=WORDS,
                hidden_size=WIDTH,
                num_hidden_layers=4,
                num_attention_heads=3,
                intermediate_size=20,
                max_position_embeddings=17,
            )
        )
    )
    ours = build(lxmert_config())
    report = load_weights(ours, bert.state_dict(), "bert")
    parameters = dict(ours.named_parameters())
    third = bert.bert.encoder.layer[2].intermediate.dense.weight
    assert torch.equal(parameters["text_layers.2.feed_forward.up.weight"], third)
    assert all(
        name.startswith(("bert.encoder.layer.3.", "cls.seq_relationship."))
        for name in report.ignored
    )
    assert not any(name.startswith(("text_", "token_head", "pooler")) for name in report.new)


def test_the_published_size_has_the_published_tensors() -> None:
    with torch.device("meta"):
        model = Lxmert(LxmertConfig(num_answers=9500))
    assert sum(parameter.numel() for parameter in model.parameters()) == 228_051_752
    _, tensors = to_saved(model.config, dict(model.named_parameters()))
    assert len(tensors) == 473 - 1  # transformers counts the decoder's second name too


def test_the_first_rows_of_positions_and_segments_learn_nothing_as_in_the_reference() -> None:
    theirs = randomise(transformers.LxmertModel(transformers_config()))
    ours = randomise(build(lxmert_config()))
    inputs = batch()
    text = ours.text_embeddings
    assert isinstance(text, blocks.TextEmbeddings)
    torch.autograd.backward(ours.encode(inputs).pooled.square().sum())
    torch.autograd.backward(theirs(**transformers_inputs(inputs)).pooled_output.square().sum())
    embeddings = theirs.embeddings
    for table, reference in (
        (text.word, embeddings.word_embeddings),
        (text.position, embeddings.position_embeddings),
        (text.token_type, embeddings.token_type_embeddings),
    ):
        assert table.padding_idx == reference.padding_idx == 0
        assert table.weight.grad is not None
        assert not table.weight.grad[0].any()
    learned = text.position.weight.grad
    assert learned is not None
    assert learned[1].any()
