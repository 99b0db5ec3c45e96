"""Published names to ours and back: what fits is loaded, and what does not is named."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models.families import (
    FAMILIES,
    build,
    from_saved,
    load_weights,
    require_same_computation,
    take_over,
    to_saved,
)
from pipeline.models.layouts import export, grouped
from tests.models.examples import (
    ANSWERS,
    WIDTH,
    WORDS,
    lxmert_config,
    randomise,
    read,
    save,
    transformers_visualbert_config,
    uniter_config,
    vilbert_config,
    visualbert,
    visualbert_config,
)

CONFIGS: dict[str, Callable[..., Any]] = {
    "visualbert": partial(visualbert_config, visual_token_type=0),
    "lxmert": lxmert_config,
    "vilbert": vilbert_config,
    "uniter": uniter_config,
}
every_published = pytest.mark.parametrize("family", list(CONFIGS))


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


def published(family: str, **changes: object) -> tuple[Any, dict[str, Tensor]]:
    """A trained model, and the file that its authors would publish of it."""
    theirs = randomise(build(CONFIGS[family](**changes)))
    layout = FAMILIES[family].layouts["original"](theirs.config)
    return theirs, export(layout, dict(theirs.named_parameters()))


@every_published
def test_a_file_with_an_answer_head_starts_a_phase_without_answers(family: str) -> None:
    theirs, tensors = published(family, num_answers=31)
    ours = build(CONFIGS[family](num_answers=0))
    report = take_over(ours, tensors, "original", fresh=("answer_head",))
    assert report.new == report.misshaped == ()
    spelled = FAMILIES[family].layouts["original"](theirs.config).names
    head = [name for name in spelled if name.startswith("answer_head")]
    assert set(report.ignored) == {other for name in head for other in spelled[name]}
    trained = dict(theirs.named_parameters())
    assert all(torch.equal(trained[name], one) for name, one in ours.named_parameters())


@every_published
def test_heads_of_another_size_and_features_of_another_width_are_new_and_told(family: str) -> None:
    _, tensors = published(family, num_answers=31, feature_dim=6)
    ours = build(CONFIGS[family]())
    before = {name: one.clone() for name, one in ours.named_parameters()}
    report = take_over(ours, tensors, "original")
    told = " ".join(report.misshaped)
    assert "is (31, " in told
    assert "expected (7, " in told
    new = set(report.new)
    assert any("answer_head" in name for name in new)
    assert any("projection" in name or "region_embeddings.feature" in name for name in new)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in new) or not before[name].any()


@every_published
def test_a_shallower_or_deeper_file_gives_the_layers_that_both_have(family: str) -> None:
    depth = {"visualbert": "num_layers", "uniter": "num_layers"}.get(family, "text_layers")
    deep, tensors = published(family, **{depth: 6})
    ours = build(CONFIGS[family](**{depth: 4}))
    report = take_over(ours, tensors, "original")
    assert report.new == ()
    (left_out,) = grouped(report.ignored)
    assert "layer.4-5 (" in left_out
    shallow, tensors = published(family, **{depth: 4})
    ours = build(CONFIGS[family](**{depth: 6}))
    report = take_over(ours, tensors, "original")
    assert [one.split(" (")[0] for one in grouped(report.new)] in (
        ["layers.4-5"],
        ["text_layers.4-5"],
    )
    assert report.ignored == ()
    del deep, shallow


def test_what_has_no_place_here_is_left_out_and_named() -> None:
    theirs, tensors = published("vilbert")
    tensors |= {
        "bert.embeddings.task_embeddings.weight": torch.zeros(20, WIDTH),
        "vil_prediction.main.0.weight_g": torch.zeros(1),
        "vil_prediction.main.0.weight_v": torch.zeros(3, 4),
        "bert.encoder.layer.9.output.dense.bias": torch.zeros(WIDTH),
    }
    report = take_over(build(theirs.config), tensors, "original")
    assert report.new == ()
    assert grouped(report.ignored) == [
        "bert.embeddings.task_embeddings (1)",
        "bert.encoder.layer.9 (1)",
        "vil_prediction.main.0 (2)",
    ]
    assert "4 left out: bert.embeddings.task_embeddings (1)" in report.summary()
    assert report.to_json()["left_out"] == 4


def test_a_weight_normed_head_is_new_and_what_it_was_is_left_out() -> None:
    theirs, tensors = published("vilbert")
    weight = tensors.pop("vil_prediction.logit_fc.0.weight")
    tensors |= {
        "vil_prediction.logit_fc.0.weight_g": weight.norm()[None],
        "vil_prediction.logit_fc.0.weight_v": weight,
    }
    report = take_over(build(theirs.config), tensors, "original")
    assert {name.split(".")[0] for name in report.new} == {"answer_head"}
    assert grouped(report.ignored) == ["vil_prediction.logit_fc.0,2-3 (7)"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vocab_size": 50},
            "vocabulary has 50 words, and the tokenizer has 29.*`model.tokenizer`",
        ),
        ({"width": 48}, "mis-shaped: .*sizes are set by `model.sizes`"),
        ({"intermediate_size": 64}, "mis-shaped: .*sizes are set by `model.sizes`"),
        ({"max_positions": 40}, "mis-shaped: .*position.* is .40, 24., expected .17, 24."),
    ],
)
@every_published
def test_a_bad_surprise_is_refused_and_changes_nothing(
    family: str, changes: dict[str, int], said: str
) -> None:
    _, tensors = published(family, **changes)
    ours = build(CONFIGS[family]())
    before = {name: one.clone() for name, one in ours.named_parameters()}
    with pytest.raises(ModelError, match=said):
        take_over(ours, tensors, "original")
    assert all(torch.equal(before[name], one) for name, one in ours.named_parameters())


@every_published
def test_a_file_without_the_encoder_is_refused(family: str) -> None:
    ours = build(CONFIGS[family]())
    unlike = {"resnet.conv1.weight": torch.zeros(3), "answer_head.bias": torch.zeros(7)}
    with pytest.raises(ModelError, match="nothing of its encoder is there: it holds answer_head"):
        take_over(ours, unlike, "original", fresh=("answer_head",))


@every_published
def test_half_a_layer_is_damage(family: str) -> None:
    theirs, tensors = published(family)
    name = next(name for name in tensors if ".layer.1." in name)
    del tensors[name]
    with pytest.raises(ModelError, match=f"missing: {name}"):
        take_over(build(theirs.config), tensors, "original")


def test_the_authors_files_are_refused_with_another_segment_for_regions() -> None:
    _, tensors = published("visualbert")
    for load in (load_weights, take_over):
        with pytest.raises(ModelError, match=r"visual_token_type=0.*has 1: set model\.sizes\."):
            load(build(visualbert_config()), tensors, "original")


def test_settings_that_no_shape_tells_are_compared_with_the_config() -> None:
    ours = build(visualbert_config(num_heads=4))
    document = transformers_visualbert_config().to_dict()
    with pytest.raises(ModelError, match=r"num_heads=3, and this model has 4: set model\.sizes\."):
        require_same_computation(ours, document)
    bert = transformers.BertConfig(num_attention_heads=6).to_dict()
    with pytest.raises(ModelError, match="num_heads=6"):
        require_same_computation(ours, bert)
    same = build(visualbert_config(visual_token_type=0))
    require_same_computation(same, document)  # which says nothing of the segment
    with pytest.raises(ModelError, match="visual_token_type=1, and this model has 0"):
        require_same_computation(same, document | {"visual_token_type": 1})


def test_folders_of_transformers_with_an_answer_head_start_a_phase_without(tmp_path: Path) -> None:
    config = transformers_visualbert_config()
    theirs = randomise(transformers.VisualBertForQuestionAnswering(config))
    theirs.save_pretrained(tmp_path)
    _, tensors = read(tmp_path)
    ours = build(visualbert_config(num_answers=0))
    report = take_over(ours, tensors)
    assert report.ignored == ("cls.bias", "cls.weight")
    assert {name.split(".")[0] for name in report.new} == {"token_head", "match_head"}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.layer.3.x", "a.layer.4.y", "a.layer.6.z"], ["a.layer.3-4,6 (3)"]),
        (["head.weight", "head.bias"], ["head (2)"]),
        (["bert.pooler.dense.weight", "bert.pooler.dense.bias"], ["bert.pooler.dense (2)"]),
        (["bias"], ["bias (1)"]),
        ([], []),
    ],
)
def test_names_are_told_in_groups(names: list[str], told: list[str]) -> None:
    assert grouped(names) == told
