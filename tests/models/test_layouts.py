"""Published names to ours and back: what fits is loaded, and what does not is named."""

from pathlib import Path

import pytest
import torch
import transformers

from pipeline.errors import ModelError
from pipeline.models.families import build, from_saved, load_weights, to_saved
from tests.models.examples import (
    ANSWERS,
    WIDTH,
    WORDS,
    randomise,
    read,
    save,
    transformers_visualbert_config,
    visualbert,
    visualbert_config,
)


def test_saved_folder_names_its_answers_for_transformers(tmp_path: Path) -> None:
    ours = visualbert(num_answers=3)
    config, tensors = to_saved(ours.config, dict(ours.named_parameters()), ["yes", "no", "two"])
    save(tmp_path, config, tensors)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.id2label == {0: "yes", 1: "no", 2: "two"}
    assert read.num_labels == 3


def test_weights_that_do_not_fit_are_named_all_at_once() -> None:
    ours = visualbert()
    _, tensors = to_saved(ours.config, dict(ours.named_parameters()))
    del tensors["visual_bert.encoder.layer.1.output.dense.bias"]
    tensors["visual_bert.encoder.layer.0.attention.self.key.weight"] = torch.zeros(2, 3)
    tensors["visual_bert.surprise"] = torch.zeros(1)
    del tensors["cls.weight"]  # half a head is a fault; a head that is wholly absent is not
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    with pytest.raises(ModelError) as raised:
        load_weights(ours, tensors)
    message = str(raised.value)
    assert "missing: visual_bert.encoder.layer.1.output.dense.bias" in message
    assert "mis-shaped: visual_bert.encoder.layer.0.attention.self.key.weight" in message
    assert "unexpected: visual_bert.surprise" in message
    assert "missing: cls.weight" in message
    assert all(torch.equal(before[name], value) for name, value in ours.named_parameters())


def test_a_head_named_fresh_keeps_its_initialisation() -> None:
    trained = visualbert(num_answers=3)
    _, tensors = to_saved(trained.config, dict(trained.named_parameters()))
    torch.manual_seed(4)
    ours = build(visualbert_config(num_answers=ANSWERS))
    report = load_weights(ours, tensors, fresh=("answer_head",))
    assert report.new == ("answer_head.weight", "answer_head.bias")
    assert report.ignored == ("cls.bias", "cls.weight")


def test_a_folder_with_a_head_for_something_else_opens_without_it(tmp_path: Path) -> None:
    theirs = randomise(transformers.VisualBertForMultipleChoice(transformers_visualbert_config()))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"unexpected: cls\.weight"):
        from_saved(*read(tmp_path))
    _, report = from_saved(*read(tmp_path), fresh=("answer_head",))
    assert report.ignored == ("cls.bias", "cls.weight")


def test_an_untied_decoder_is_refused() -> None:
    ours = visualbert()
    _, tensors = to_saved(ours.config, dict(ours.named_parameters()))
    tensors["cls.predictions.decoder.weight"] = torch.zeros(WORDS, WIDTH)
    with pytest.raises(ModelError, match=r"cls\.predictions\.decoder\.weight differs"):
        load_weights(ours, tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bypass_transformer", True),
        ("hidden_act", "relu"),
        ("model_type", "vilt"),
        ("num_attention_heads", 5),
    ],
)
def test_a_config_we_do_not_compute_is_refused(key: str, value: object) -> None:
    document = transformers_visualbert_config().to_dict() | {key: value}
    with pytest.raises(ModelError, match=r"config\.json"):
        from_saved(document, {})
