"""What every family promises: the same questions asked of each."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.errors import ModelError
from pipeline.models.base import ModelConfig
from pipeline.models.families import FAMILIES, build, from_saved, load_weights, to_saved
from pipeline.models.inputs import Inputs
from tests.excerpts import EXCERPTS
from tests.models import examples
from tests.models.examples import ANSWERS, WIDTH, WORDS, assert_close, batch, randomise, row

CONFIGS: dict[str, Callable[..., ModelConfig]] = {
    "visualbert": examples.visualbert_config,
    "lxmert": examples.lxmert_config,
    "vilbert": examples.vilbert_config,
    "uniter": examples.uniter_config,
    "late_fusion": examples.late_fusion_config,
    "attention_fusion": examples.attention_fusion_config,
    "visual_prefix": examples.visual_prefix_config,
}

every_family = pytest.mark.parametrize("family", CONFIGS)


def test_every_family_is_asked_here() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@every_family
@torch.no_grad()
def test_padding_changes_nothing(family: str) -> None:
    model = randomise(build(CONFIGS[family]()))
    inputs = batch((6, 4, 3), (2, 5, 3))
    together = model.encode(inputs)
    for index in range(3):
        alone_inputs = row(inputs, index)
        alone = model.encode(alone_inputs)
        tokens, regions = ~inputs.token_padding[index], ~inputs.region_padding[index]
        assert_close(together.text[index, tokens], alone.text[0])
        assert_close(together.regions[index, regions], alone.regions[0])
        assert_close(model.match_logits(together)[index], model.match_logits(alone)[0])
        answers = model.answer_logits(together, inputs)[index]
        assert_close(answers, model.answer_logits(alone, alone_inputs)[0])


@every_family
def test_heads_have_the_shapes_they_promise(family: str) -> None:
    model = build(CONFIGS[family]())
    inputs = batch()
    encoded = model.encode(inputs, attention=True)
    assert encoded.text.shape == (2, 6, WIDTH)
    assert encoded.regions.shape[:2] == (2, 5)
    assert model.token_logits(encoded.text[:, 1]).shape == (2, WORDS)
    assert model.match_logits(encoded).shape == (2, 2)
    assert model.answer_logits(encoded, inputs).shape == (2, ANSWERS)
    assert encoded.attention is not None
    assert all(each.shape[-2:] == (11, 11) for each in encoded.attention)


@every_family
def test_blind_inputs_and_images_without_regions_train_without_nan(family: str) -> None:
    model = build(CONFIGS[family]()).train()
    inputs = batch()
    nothing_seen = replace(inputs, region_padding=torch.ones_like(inputs.region_padding))
    for given in (inputs.without_image(), nothing_seen):
        encoded = model.encode(given, attention=True)
        loss = encoded.text.square().sum() + model.match_logits(encoded).square().sum()
        for each in encoded.attention or ():
            loss = loss + each.square().sum()
        gradients = torch.autograd.grad(loss, _trained(model), allow_unused=True)
        assert all(bool(each.isfinite().all()) for each in gradients if each is not None)
    assert_close(
        model.eval().match_logits(model.encode(nothing_seen)),
        model.match_logits(model.encode(inputs.without_image())),
    )


@every_family
def test_saved_models_are_read_back_unchanged(family: str) -> None:
    ours = randomise(build(CONFIGS[family]()))
    answers = [f"answer {index}" for index in range(ANSWERS)]
    document, tensors = to_saved(ours.config, dict(ours.named_parameters()), answers)
    again, report = from_saved(json.loads(json.dumps(document)), tensors)
    assert again.config == ours.config
    assert report.new == report.ignored == ()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name])
    assert document["id2label"]["3"] == "answer 3"


@every_family
def test_pretrained_weights_start_a_model_with_another_answer_head(family: str) -> None:
    pretrained = build(CONFIGS[family](num_answers=0))
    _, tensors = to_saved(pretrained.config, dict(pretrained.named_parameters()))
    model = build(CONFIGS[family]())
    report = load_weights(model, tensors)
    assert {name.split(".")[0] for name in report.new} == {"answer_head"}
    other = build(CONFIGS[family](num_answers=ANSWERS + 1))
    _, answering = to_saved(other.config, dict(other.named_parameters()))
    with pytest.raises(ModelError, match="mis-shaped"):
        load_weights(model, answering)
    load_weights(model, answering, fresh=("answer_head",))


@pytest.mark.parametrize("family", [name for name in CONFIGS if "bert" in FAMILIES[name].layouts])
def test_bert_fills_the_text_side(family: str) -> None:
    bert = randomise(
        transformers.BertForPreTraining(
            transformers.BertConfig(
                vocab_size=WORDS,
                hidden_size=WIDTH,
                num_hidden_layers=5,
                num_attention_heads=3,
                intermediate_size=20,
                max_position_embeddings=17,
            )
        )
    )
    model = build(CONFIGS[family]())
    report = load_weights(model, bert.state_dict(), "bert")
    words = dict(model.named_parameters())["text_embeddings.word.weight"]
    assert torch.equal(words, bert.bert.embeddings.word_embeddings.weight)
    assert not any(name.startswith(("text_emb", "text_norm", "token_head")) for name in report.new)
    assert all("attention" in name or "encoder" not in name for name in report.new)


@every_family
def test_a_layout_that_a_family_does_not_read_is_named(family: str) -> None:
    with pytest.raises(ModelError, match="reads saved, "):
        load_weights(build(CONFIGS[family]()), {}, "keras")


@every_family
def test_recomputing_layers_gives_the_same_gradients(family: str) -> None:
    model = build(CONFIGS[family]()).train()
    inputs = batch()
    parameters = _trained(model)
    kept = torch.autograd.grad(model.encode(inputs).text.sum(), parameters, allow_unused=True)
    model.checkpoint_layers = True
    again = torch.autograd.grad(model.encode(inputs).text.sum(), parameters, allow_unused=True)
    for mine, other in zip(kept, again, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert_close(mine, other)


@every_family
@pytest.mark.parametrize("stored", [torch.uint8, torch.float16, torch.float32])
@torch.no_grad()
def test_features_as_stored_feed_a_model_of_lower_precision(
    family: str, stored: torch.dtype
) -> None:
    model = build(CONFIGS[family]()).eval().bfloat16()
    inputs = batch()
    inputs = replace(inputs, features=(inputs.features.abs() * 50).to(stored))
    encoded = model.encode(inputs)
    assert encoded.text.dtype == encoded.regions.dtype == torch.bfloat16
    assert model.answer_logits(encoded, inputs).dtype == torch.bfloat16


@pytest.mark.slow
@every_family
def test_encoding_compiles_to_one_graph(family: str) -> None:
    model = build(CONFIGS[family]()).eval()
    inputs = batch()

    def score(tokens: Tensor, features: Tensor) -> Tensor:
        encoded = model.encode(replace(inputs, tokens=tokens, features=features))
        return model.match_logits(encoded)

    compiled = torch.compile(score, backend="eager", fullgraph=True)
    found = compiled(inputs.tokens, inputs.features)
    assert_close(found, score(inputs.tokens, inputs.features))


@pytest.mark.slow
@every_family
def test_a_handful_of_pictures_is_learnt_by_heart(family: str, photographs: list[Path]) -> None:
    inputs, masked, words = captioned(photographs)
    torch.manual_seed(0)
    config = CONFIGS[family](
        vocab_size=int(inputs.tokens.max()) + 1,
        feature_dim=192,
        max_positions=40,
        num_answers=6,
        initializer_range=0.2,  # about 1 / sqrt(width): narrow models learn sooner
    )
    model = build(config).train()
    rows = torch.arange(len(words))
    mismatched = replace(inputs, features=inputs.features.roll(1, dims=0))
    matches = torch.full_like(rows, model.match_index)
    optimizer = torch.optim.AdamW(_trained(model), lr=3e-3)

    def loss() -> Tensor:
        encoded = model.encode(inputs)
        wrong = model.encode(mismatched)
        return (
            F.cross_entropy(model.token_logits(encoded.text[rows, masked]), words)
            + F.cross_entropy(model.answer_logits(encoded, inputs), rows)
            + F.cross_entropy(model.match_logits(encoded), matches)
            + F.cross_entropy(model.match_logits(wrong), 1 - matches)
        )

    first = float(loss().detach())
    for _ in range(400):
        optimizer.zero_grad()
        step = loss()
        torch.autograd.backward(step)
        optimizer.step()
        if float(step.detach()) < 0.05 * first:
            break
    assert float(step.detach()) < 0.05 * first


def captioned(photographs: list[Path]) -> tuple[Inputs, Tensor, Tensor]:
    """Six pictures as 16 patches, a COCO caption each, one word hidden, and which it was."""
    document: dict[str, Any] = json.loads((EXCERPTS / "captions_train2017.json").read_text())
    captions = {each["image_id"]: each["caption"] for each in document["annotations"]}
    chosen = sorted(document["images"], key=lambda each: each["id"])[:6]
    texts = [captions[each["id"]].lower().split() for each in chosen]
    vocabulary = sorted({word for text in texts for word in text})
    words = {word: index for index, word in enumerate(vocabulary, start=4)}
    features = []
    for path in photographs[:6]:
        picture = Image.open(path).convert("RGB")
        pixels = torch.tensor(list(picture.resize((32, 32)).tobytes()), dtype=torch.uint8)
        patches = pixels.view(4, 8, 4, 8, 3).permute(0, 2, 1, 3, 4).reshape(16, 192)
        features.append(patches)
    length = max(len(text) for text in texts) + 3
    tokens = torch.zeros(6, length, dtype=torch.long)
    for index, text in enumerate(texts):  # 1 begins, 2 ends, 3 is a mask
        known = [1, *(words[word] for word in text), 3, 2]
        tokens[index, : len(known)] = torch.tensor(known)
    masked = torch.tensor([2, 4, 3, 5, 1, 2])
    hidden = tokens[torch.arange(6), masked].clone()
    tokens[torch.arange(6), masked] = 3
    corners = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1)
    boxes = torch.cat([corners, corners + 1], dim=-1).view(1, 16, 4).repeat(6, 1, 1) / 4
    inputs = Inputs(
        tokens, tokens == 0, torch.stack(features), boxes, torch.zeros(6, 16, dtype=torch.bool)
    )
    return inputs, masked, hidden


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
