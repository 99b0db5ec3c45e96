"""A language model that reads images: what each way of reading promises."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline import causal_lm
from pipeline.benchmarks.caption import CaptionConfig
from pipeline.data.read.dataset import Dataset
from pipeline.data.text.vocabulary import build_tokenizer
from pipeline.errors import ModelError
from pipeline.models.base import ModelConfig
from pipeline.models.families import from_saved, load_weights, to_saved
from pipeline.models.generation import generate, sample
from pipeline.models.inputs import Inputs
from pipeline.models.visual_prefix import TanhGate, VisualPrefix
from pipeline.objectives.base import IGNORED
from pipeline.objectives.lm import LanguageModelling, LmConfig
from pipeline.pretrained.folder import initialise
from tests.data.tiny_dataset import EXTRACTOR, make_dataset
from tests.models.examples import (
    GPT2_STILL,
    LLAMA,
    WIDTH,
    WORDS,
    assert_close,
    batch,
    randomise,
    row,
    visual_prefix_config,
)
from tests.models.test_families import captioned

EOS = 0
LENGTHS, REGIONS = (1, 4, 2), (5, 2, 3)
READINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"projection": "mlp", "decoder": LLAMA},
    "resampler": {"projection": "resampler", "num_queries": 4},
    "cross": {"prefix": False, "cross_every": 2},
    "both": {"cross_every": 1, "decoder": LLAMA},
    "resampled-cross": {
        "prefix": False,
        "cross_every": 1,
        "projection": "resampler",
        "num_queries": 4,
    },
}

every_reading = pytest.mark.parametrize("reading", READINGS)


def build(reading: str, **changes: Any) -> VisualPrefix:
    """A model in double precision whose every weight matters, gates wide open."""
    torch.manual_seed(0)
    config = visual_prefix_config(**{"max_positions": 25, **READINGS[reading], **changes})
    model = randomise(VisualPrefix(config), seed=3)
    for module in model.modules():
        if isinstance(module, TanhGate):
            torch.nn.init.constant_(module.openness, 1.5)
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=2.5)
    return model.double()


def greedy_without_cache(model: VisualPrefix, inputs: Inputs, max_new_tokens: int) -> list[int]:
    """Encodes the whole text anew for each token of one row."""
    tokens, written = inputs.tokens, []
    for _ in range(max_new_tokens):
        grown = replace(
            inputs, tokens=tokens, token_padding=torch.zeros_like(tokens, dtype=torch.bool)
        )
        states = model.encode(grown, mask="prefix").text[:, -1]
        token = int(model.token_logits(states).argmax())
        if token == EOS:
            break
        written.append(token)
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    return written


@every_reading
def test_cached_greedy_equals_encoding_everything_again(reading: str) -> None:
    model, inputs = build(reading), batch(LENGTHS, REGIONS)
    expected = [greedy_without_cache(model, row(inputs, index), 10) for index in range(3)]
    assert generate(model, inputs, eos=EOS, max_new_tokens=10) == expected
    assert len({token for text in expected for token in text}) > 3


@every_reading
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_text(reading: str) -> None:
    model, inputs = build(reading), batch((6, 6, 6), REGIONS)
    encoded = model.encode(inputs, mask="prefix")
    begun = replace(inputs, tokens=inputs.tokens[:, :2], token_padding=inputs.token_padding[:, :2])
    logits, cache = model.start(begun)
    for place in range(2, 6):
        expected = model.token_logits(encoded.text[:, place - 1])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        logits, cache = model.extend(inputs.tokens[:, place], cache)


@every_reading
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_gives_the_same_texts_as_one_by_one(reading: str, beams: int) -> None:
    model, inputs = build(reading), batch(LENGTHS, REGIONS)
    together = generate(model, inputs, eos=EOS, max_new_tokens=7, beams=beams)
    alone = [
        generate(model, row(inputs, index), eos=EOS, max_new_tokens=7, beams=beams)[0]
        for index in range(3)
    ]
    assert together == alone
    seeds = [7, 8, 9]
    drawn = sample(model, inputs, eos=EOS, max_new_tokens=7, seeds=seeds)
    again = sample(model, row(inputs, 1), eos=EOS, max_new_tokens=7, seeds=seeds[1:2])
    assert drawn[1] == again[0]


@every_reading
@torch.no_grad()
def test_padding_changes_nothing(reading: str) -> None:
    model, inputs = build(reading), batch((6, 4, 3), REGIONS)
    together = model.encode(inputs)
    for index in range(3):
        alone = model.encode(row(inputs, index))
        tokens = ~inputs.token_padding[index]
        assert_close(together.text[index, tokens], alone.text[0])
        assert_close(together.pooled[index], alone.pooled[0])


@every_reading
@torch.no_grad()
def test_every_token_sees_the_image_and_none_sees_what_comes_after_it(reading: str) -> None:
    model, inputs = build(reading), batch()
    states = model.encode(inputs).text
    other_image = replace(inputs, features=inputs.features.flip(0))
    assert ((model.encode(other_image).text - states).abs().amax(-1) > 1e-6)[
        ~inputs.token_padding
    ].all()
    changed = inputs.tokens.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % WORDS
    later = model.encode(replace(inputs, tokens=changed)).text
    assert_close(later[:, :3], states[:, :3])


@pytest.mark.parametrize("decoder", [GPT2_STILL, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("projection", ["linear", "mlp", "resampler"])
@torch.no_grad()
def test_with_closed_gates_it_is_the_untouched_language_model(
    decoder: dict[str, Any], projection: str
) -> None:
    torch.manual_seed(1)
    config = visual_prefix_config(
        decoder=decoder, prefix=False, cross_every=1, projection=projection
    )
    model, inputs = VisualPrefix(config).eval(), batch()
    assert len(model.gates) == (3 if decoder is GPT2_STILL else 2)
    plain: Any = causal_lm.build(decoder, WORDS).eval()
    plain.load_state_dict(model.decoder.state_dict())
    mask = (~inputs.token_padding).long()
    expected = plain(input_ids=inputs.tokens, attention_mask=mask).logits
    found = model.token_logits(model.encode(inputs).text)
    assert torch.equal(found[~inputs.token_padding], expected[~inputs.token_padding])


@torch.no_grad()
def test_without_an_image_the_prefix_is_the_plain_language_model() -> None:
    model, inputs = build("mlp"), batch().without_image()
    plain: Any = causal_lm.build(LLAMA, WORDS).double().eval()
    plain.load_state_dict(model.decoder.state_dict())
    expected = plain(input_ids=inputs.tokens, attention_mask=(~inputs.token_padding).long()).logits
    found = model.token_logits(model.encode(inputs).text)
    assert_close(found[~inputs.token_padding], expected[~inputs.token_padding])


@every_reading
def test_an_image_without_regions_is_no_image_and_trains_without_nan(reading: str) -> None:
    model, inputs = build(reading).train(), batch()
    unseen = replace(inputs, region_padding=torch.ones_like(inputs.region_padding))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for given in (inputs.without_image(), unseen):
        states = model.encode(given).text[~inputs.token_padding]
        gradients = torch.autograd.grad(states.square().sum(), parameters, allow_unused=True)
        assert all(bool(each.isfinite().all()) for each in gradients if each is not None)
    blind = model.encode(inputs.without_image()).text[~inputs.token_padding]
    assert_close(states.detach(), blind.detach())


def test_a_closed_gate_learns_to_open() -> None:
    torch.manual_seed(1)
    model = VisualPrefix(visual_prefix_config(prefix=False, cross_every=2))
    torch.autograd.backward(model.encode(batch()).text.square().sum())
    gates = [module for module in model.modules() if isinstance(module, TanhGate)]
    assert len(gates) == 4
    assert all(gate.openness.grad is not None and gate.openness.grad != 0 for gate in gates)


def test_a_frozen_language_model_gets_no_gradient_and_the_rest_does() -> None:
    model = VisualPrefix(visual_prefix_config(train_decoder=False)).train()
    torch.autograd.backward(model.encode(batch()).text.square().sum())
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert all(parameter.grad is not None for parameter in model.visual.parameters())


@pytest.mark.parametrize("reading", ["linear", "cross", "both"])
@torch.no_grad()
def test_maps_are_those_by_which_the_states_were_made(reading: str) -> None:
    model, inputs = build(reading), batch()
    encoded = model.encode(inputs, attention=True)
    assert_close(encoded.text, model.encode(inputs).text)
    assert encoded.attention
    real = ~torch.cat([inputs.token_padding, inputs.region_padding], dim=1)
    for weights in encoded.attention:
        assert weights.shape[-2:] == (11, 11)
        assert not weights[:, :, :, ~real[0]].any() or real[0].all()
        for index in range(2):
            assert_close(
                weights[index, :, : inputs.tokens.shape[1]].sum(-1)[
                    :, ~inputs.token_padding[index]
                ],
                torch.ones(weights.shape[1], int((~inputs.token_padding[index]).sum())).double(),
            )
            assert not weights[index][..., ~real[index]].any()


@pytest.mark.parametrize("reading", ["both", "resampled-cross"])
def test_recomputing_layers_gives_the_same_gradients(reading: str) -> None:
    model, inputs = build(reading).train(), batch()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients() -> tuple[Tensor | None, ...]:
        first, second = model.encode(inputs).text, model.encode(batch((3, 5), (2, 4))).text
        return torch.autograd.grad(first.sum() + second.sum(), parameters, allow_unused=True)

    kept = gradients()
    model.checkpoint_layers = True
    for mine, other in zip(gradients(), kept, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other)


@every_reading
def test_saved_models_are_read_back_unchanged(reading: str) -> None:
    ours = build(reading).float()
    document, tensors = to_saved(ours.config, dict(ours.named_parameters()), [""] * 7)
    again, report = from_saved(document, tensors)
    assert again.config == ours.config
    assert report.new == report.ignored == ()
    assert_close(again.eval().encode(batch()).text, ours.encode(batch()).text)


@pytest.mark.parametrize("decoder", [GPT2_STILL, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_a_folder_of_transformers_fills_the_decoder(
    decoder: dict[str, Any], tmp_path: Path
) -> None:
    theirs: Any = randomise(causal_lm.build(decoder, WORDS), seed=9)
    theirs.save_pretrained(tmp_path)
    model = VisualPrefix(visual_prefix_config(decoder=decoder, cross_every=1))
    report = initialise(model, str(tmp_path))
    assert {name.split(".")[0] for name in report.loaded} == {"decoder"}
    assert {name.split(".")[0] for name in report.new} == {
        "visual",
        "gates",
        "match_head",
        "answer_head",
    }
    inputs = batch().without_image()
    mask = (~inputs.token_padding).long()
    expected = theirs(input_ids=inputs.tokens, attention_mask=mask).logits
    found = model.eval().token_logits(model.encode(inputs).text)
    assert_close(found[~inputs.token_padding], expected[~inputs.token_padding])


def test_an_old_gpt2_file_without_prefix_and_with_masks_fills_the_decoder() -> None:
    theirs: Any = causal_lm.build(GPT2_STILL, WORDS)
    old = dict(theirs.transformer.state_dict())
    old |= {f"h.{index}.attn.bias": torch.ones(1, 1, 8, 8) for index in range(3)}
    model = VisualPrefix(visual_prefix_config())
    report = load_weights(model, old, "decoder")
    assert len(report.ignored) == 3
    loaded = model.decoder.state_dict()
    assert torch.equal(loaded["transformer.wte.weight"], theirs.transformer.wte.weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder": {**GPT2_STILL, "n_embd": 32}}, "hidden size is 32"),
        ({"decoder": {**GPT2_STILL, "vocab_size": 12}}, "less than the tokenizer's 29"),
        ({"decoder": {"model_type": "resnet"}}, "no causal language model of model_type 'resnet'"),
        ({"decoder": {"model_type": "nonsense"}}, "model_type 'nonsense'"),
        (
            {"decoder": {"model_type": "gemma2", "hidden_size": WIDTH, "num_hidden_layers": 1}},
            "final_logit_softcapping=30",
        ),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        VisualPrefix(visual_prefix_config(**changes))


def test_a_text_that_leaves_no_room_for_the_image_is_refused() -> None:
    short = {**GPT2_STILL, "n_positions": 21}
    model = VisualPrefix(visual_prefix_config(decoder=short))
    with pytest.raises(ModelError, match="5 visual tokens and max_positions=17"):
        model.encode(batch())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder": {}}, "decoder.model_type is missing"),
        ({"prefix": False}, "the image would not be read"),
    ],
)
def test_a_model_that_could_not_work_is_refused(changes: dict[str, Any], said: str) -> None:
    make: Callable[..., ModelConfig] = visual_prefix_config
    with pytest.raises(ValidationError, match=said):
        make(**changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"decoder": GPT2_STILL}, {"decoder": LLAMA, "prefix": False, "cross_every": 1}]
)
def test_a_handful_of_coco_captions_is_learnt_and_written_word_for_word(
    changes: dict[str, Any], photographs: list[Path]
) -> None:
    inputs, _, _ = captioned(photographs)
    inputs = replace(inputs, token_padding=inputs.tokens == 0)
    target = torch.full_like(inputs.tokens, IGNORED)
    target[:, :-1] = inputs.tokens[:, 1:].masked_fill(inputs.token_padding[:, 1:], IGNORED)
    torch.manual_seed(0)
    words = int(inputs.tokens.max()) + 1
    config = visual_prefix_config(vocab_size=words, feature_dim=192, max_positions=40, **changes)
    model, objective = VisualPrefix(config).train(), LanguageModelling(LmConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        encoded = model.encode(inputs, mask=objective.stream.mask)
        loss = objective.loss(model, encoded, inputs, target).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        if float(loss.detach()) < 0.02:
            break
    begun = replace(inputs, tokens=inputs.tokens[:, :1], token_padding=inputs.token_padding[:, :1])
    written = generate(model.eval(), begun, eos=2, max_new_tokens=20)
    ends = (~inputs.token_padding).sum(1) - 1
    assert written == [
        row[1:end].tolist() for row, end in zip(inputs.tokens, ends.tolist(), strict=True)
    ]


def test_the_caption_benchmark_asks_it_like_any_other_family(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), num_samples=11)
    split = Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    tokenizer: Any = build_tokenizer(["a man's hat, on 1 of 2 wooden chairs", "caption of"], 90)
    config = visual_prefix_config(vocab_size=len(tokenizer), feature_dim=8, cross_every=1)
    model = randomise(VisualPrefix(config))
    caption = CaptionConfig(beams=2, max_tokens=9).build()
    one = caption.predict(model, tokenizer, [], caption.batches(split, 1))
    assert one == caption.predict(model, tokenizer, [], caption.batches(split, 64))
    assert len(one) == len(caption.references(split))


@torch.no_grad()
def test_a_copy_runs_its_own_weights() -> None:
    model, inputs = build("cross"), batch()
    expected = model.encode(inputs).text
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(copied.encode(inputs).text, expected)
