"""Decoding with a cache equals decoding without, and rows do not see each other."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models.generation import generate, sample
from pipeline.models.inputs import Inputs
from pipeline.models.single_stream import SingleStream
from pipeline.models.uniter import Uniter
from pipeline.models.visualbert import VisualBert
from tests.models.examples import WORDS, batch, row, uniter_config, visualbert_config

EOS = 9
PREFIXES, REGIONS = (2, 5, 1), (4, 2, 5)


@pytest.fixture(params=["visualbert", "uniter"])
def model(request: pytest.FixtureRequest) -> SingleStream:
    torch.manual_seed(8)
    made: dict[str, Callable[[], SingleStream]] = {
        "visualbert": lambda: VisualBert(visualbert_config(max_positions=25)),
        "uniter": lambda: Uniter(uniter_config(max_positions=25)),
    }
    model = made[request.param]().eval()
    for module in model.modules():  # wide enough that texts differ, and end at different lengths
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.7)
    torch.nn.init.normal_(model.text_embeddings.position.weight, std=2.0)
    return model.double()  # no tie is near enough for rounding to decide it


def greedy_without_cache(model: SingleStream, inputs: Inputs, max_new_tokens: int) -> list[int]:
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


def test_cached_greedy_equals_encoding_everything_again(model: SingleStream) -> None:
    inputs = batch(PREFIXES, REGIONS)
    expected = [greedy_without_cache(model, row(inputs, index), 12) for index in range(3)]
    assert generate(model, inputs, eos=EOS, max_new_tokens=12) == expected
    assert len({len(text) for text in expected}) > 1
    assert len({token for text in expected for token in text}) > 3


@torch.no_grad()
def test_cached_logits_equal_uncached_logits(model: SingleStream) -> None:
    inputs = batch((6, 6), (5, 3))
    whole = model.encode(inputs, mask="prefix")
    expected = model.token_logits(whole.text.flatten(0, 1)).view(2, 6, WORDS)
    prefix = replace(inputs, tokens=inputs.tokens[:, :3], token_padding=inputs.token_padding[:, :3])
    logits, cache = model.start(prefix)
    for position in range(3, 6):
        torch.testing.assert_close(logits, expected[:, position - 1], rtol=0, atol=1e-9)
        logits, cache = model.extend(inputs.tokens[:, position], cache)
    torch.testing.assert_close(logits, expected[:, 5], rtol=0, atol=1e-9)


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_a_batch_of_different_lengths_writes_what_each_row_writes_alone(
    model: SingleStream, beams: int
) -> None:
    inputs = batch(PREFIXES, REGIONS)
    together = generate(model, inputs, eos=EOS, max_new_tokens=9, beams=beams)
    alone = [
        generate(model, row(inputs, index), eos=EOS, max_new_tokens=9, beams=beams)[0]
        for index in range(3)
    ]
    assert together == alone


def test_beams_find_the_likeliest_text_when_they_hold_every_candidate(model: SingleStream) -> None:
    inputs = row(batch(PREFIXES, REGIONS), 1)

    def score(text: list[int]) -> float:
        logits, cache = model.start(inputs)
        total = 0.0
        for token in text:
            total += float(logits.log_softmax(-1)[0, token].detach())
            logits, cache = model.extend(torch.tensor([token]), cache)
        return total / len(text)

    texts = [[EOS]] + [
        [first, second] for first in range(WORDS) for second in range(WORDS) if first != EOS
    ]
    best = max(texts, key=score)
    found = generate(model, inputs, eos=EOS, max_new_tokens=2, beams=WORDS)[0]
    assert found == [token for token in best if token != EOS]


def test_sampling_repeats_itself_and_rows_do_not_see_each_other(model: SingleStream) -> None:
    inputs = batch(PREFIXES, REGIONS)
    seeds = [11, 12, 13]
    together = sample(model, inputs, eos=EOS, max_new_tokens=8, seeds=seeds)
    assert together == sample(model, inputs, eos=EOS, max_new_tokens=8, seeds=seeds)
    for index in range(3):
        alone = sample(
            model, row(inputs, index), eos=EOS, max_new_tokens=8, seeds=seeds[index : index + 1]
        )
        assert alone[0] == together[index]


def test_a_nucleus_of_one_token_is_greedy(model: SingleStream) -> None:
    inputs = batch(PREFIXES, REGIONS)
    narrow = sample(model, inputs, eos=EOS, max_new_tokens=8, seeds=[1, 2, 3], top_p=1e-6)
    assert narrow == generate(model, inputs, eos=EOS, max_new_tokens=8)


def test_samples_follow_the_distribution_inside_the_nucleus(model: SingleStream) -> None:
    inputs = row(batch(PREFIXES, REGIONS), 0)
    with torch.no_grad():
        logits, _ = model.start(inputs)
    ranked = logits[0].softmax(-1).sort(descending=True)
    inside = int((ranked.values.cumsum(0) - ranked.values < 0.6).sum())
    expected = ranked.values[:inside] / ranked.values[:inside].sum()
    many = Inputs(
        inputs.tokens.repeat(4000, 1),
        inputs.token_padding.repeat(4000, 1),
        inputs.features.repeat(4000, 1, 1),
        inputs.boxes.repeat(4000, 1, 1),
        inputs.region_padding.repeat(4000, 1),
    )
    drawn = sample(model, many, eos=-1, max_new_tokens=1, seeds=range(4000), top_p=0.6)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=WORDS)[ranked.indices]
    assert counts[inside:].sum() == 0
    torch.testing.assert_close(counts[:inside] / 4000, expected.float(), rtol=0, atol=0.04)


def test_a_text_longer_than_the_position_table_is_refused(model: SingleStream) -> None:
    with pytest.raises(ModelError, match="max_positions=25"):
        generate(model, batch(PREFIXES, REGIONS), eos=EOS, max_new_tokens=21)
