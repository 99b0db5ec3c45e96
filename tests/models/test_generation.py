"""Decoding with a cache equals decoding without, and rows do not see each other."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models.generation import EarlyStopping, generate, sample
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


@pytest.mark.slow
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


@dataclass(frozen=True)
class Table:
    """A model of B rows whose next token is a function of all it has read, by a table."""

    logits: dict[tuple[int, ...], Tensor]  # by what was written, (V,)
    texts: tuple[tuple[int, ...], ...] = ((),)  # what each sequence has read

    training = False
    config = visualbert_config()

    def start(self, inputs: Inputs) -> tuple[Tensor, Any]:  # noqa: ARG002
        return self.logits[()][None], self

    def extend(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        texts = tuple(
            (*text, token) for text, token in zip(cache.texts, tokens.tolist(), strict=True)
        )
        return torch.stack([self.logits[text] for text in texts]), replace(self, texts=texts)

    def select(self, rows: Tensor) -> "Table":
        return replace(self, texts=tuple(self.texts[index] for index in rows.tolist()))

    def score(self, text: Sequence[int], most: int, penalty: float) -> float:
        """What a text comes to, with its end if it has one within `most` tokens."""
        whole = tuple(text) if len(text) == most else (*text, 0)
        total: float = sum(
            float(self.logits[whole[:index]].log_softmax(-1)[token])
            for index, token in enumerate(whole)
        )
        scored: float = total / len(whole) ** penalty
        return scored


def random_table(seed: int, words: int, most: int) -> Table:
    """A model whose token 0 ends a text."""
    generator = torch.Generator().manual_seed(seed)
    return Table(
        {
            text: 2 * torch.randn(words, generator=generator)
            for length in range(most)
            for text in itertools.product(range(1, words), repeat=length)
        }
    )


NO_INPUTS = row(batch(), 0)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_that_holds_everything_finds_the_best_text_of_all(penalty: float) -> None:
    words, most = 4, 4
    texts = [
        text for length in range(most + 1) for text in itertools.product((1, 2, 3), repeat=length)
    ]
    for seed in range(30):
        model = random_table(seed, words, most)
        settings: Any = {"eos": 0, "max_new_tokens": most, "length_penalty": penalty}
        (found,) = generate(model, NO_INPUTS, **settings, beams=81, early_stopping="never")
        best = max(texts, key=lambda text: model.score(text, most, penalty))
        assert model.score(found, most, penalty) == pytest.approx(model.score(best, most, penalty))


def test_a_beam_is_worse_than_greedy_only_where_it_has_dropped_what_greedy_wrote() -> None:
    words, most, num_models = 4, 5, 100
    worse = 0
    for seed in range(num_models):
        model = random_table(seed, words, most)
        settings: Any = {"eos": 0, "max_new_tokens": most}
        (greedy,) = generate(model, NO_INPUTS, **settings)
        (found,) = generate(model, NO_INPUTS, **settings, beams=2, early_stopping="never")
        if model.score(found, most, 1.0) < model.score(greedy, most, 1.0) - 1e-6:
            assert not _kept(model, greedy, beams=2, most=most)
            worse += 1
    assert worse <= num_models // 50


def _kept(model: Table, text: Sequence[int], beams: int, most: int) -> bool:
    """Whether a text was among the best open beams at each of its lengths, and at its end."""
    whole = (*text, 0)[:most]
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for length in range(1, len(whole) + 1):
        told = sorted(
            (
                (score + float(logit), (*written, token))
                for score, written in beam
                for token, logit in enumerate(model.logits[written].log_softmax(-1))
            ),
            reverse=True,
        )
        if length == len(whole):
            return whole in [written for _, written in told[:beams]]
        beam = [one for one in told if one[1][-1] != 0][:beams]
        if whole[:length] not in [written for _, written in beam]:
            return False
    return True


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.5, -1.0])
def test_beams_write_what_transformers_writes(
    beams: int, early_stopping: EarlyStopping, penalty: float
) -> None:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=10,
        n_embd=24,
        n_head=4,
        n_layer=2,
        n_positions=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs: Any = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in theirs.named_parameters():  # wide: texts end at different lengths
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2.0 if "wpe" in name else 0.4)
    ours = _Gpt2(theirs)
    prefixes = torch.randint(10, (12, 2))
    inputs = replace(NO_INPUTS, tokens=prefixes)
    written = generate(
        ours,
        inputs,
        eos=EOS,
        max_new_tokens=9,
        beams=beams,
        length_penalty=penalty,
        early_stopping=early_stopping,
    )
    expected = theirs.generate(
        prefixes,
        attention_mask=torch.ones_like(prefixes),
        do_sample=False,
        num_beams=beams,
        length_penalty=penalty,
        early_stopping=early_stopping,
        max_new_tokens=9,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    assert written == [
        list(itertools.takewhile(lambda token: token != EOS, text))
        for text in expected[:, 2:].tolist()
    ]
    assert penalty > 1 or len({len(text) for text in written}) > 1


@dataclass
class _Gpt2:
    """transformers' own model, driven one token at a time without a cache."""

    model: Any
    training = False
    config = visualbert_config(max_positions=64)

    @torch.no_grad()
    def start(self, inputs: Inputs) -> tuple[Tensor, Any]:
        return self.model(inputs.tokens).logits[:, -1], _Read(inputs.tokens)

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        read = torch.cat([cache.tokens, tokens[:, None]], dim=1)
        return self.model(read).logits[:, -1], _Read(read)


@dataclass
class _Read:
    tokens: Tensor

    def select(self, rows: Tensor) -> "_Read":
        return _Read(self.tokens[rows])


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
