"""Text generation from an image and a prefix: greedy, beam and nucleus, with a cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models.base import Decoder
from pipeline.models.inputs import Inputs

EarlyStopping = bool | Literal["never"]
Penalty = Annotated[float, Field(gt=-100, lt=100, allow_inf_nan=False)]  # beyond, scores overflow


@dataclass(frozen=True)
class Decoding:
    """How a text is written, as transformers' `generate` means it: the likeliest of several beams.

    A text is scored by its log-likelihood over its length, the end counted, to the power
    `length_penalty`: 0 is the likelihood itself, which favours short texts, and more favours longer
    ones. As many texts as there are beams are kept of those that have ended. With
    `early_stopping: true` the first so many are enough. With `false` a beam goes on while the best
    one that is open, if it ended now, would be better than the worst of those; with `never`, while
    any length that it may still have would make it so. One beam is greedy decoding and ends with
    its text. A beam is no search of everything: what greedy decoding would have found may be
    crowded out of it.
    """

    max_new_tokens: PositiveInt  # the end counted
    beams: PositiveInt = 3
    length_penalty: Penalty = 1.0
    early_stopping: EarlyStopping = False


@torch.inference_mode()
def generate(
    model: Decoder,
    inputs: Inputs,
    *,
    eos: int,
    max_new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
) -> list[list[int]]:
    """Returns the best continuation of each row's tokens, without `eos`; see Decoding.

    What a row says does not depend on the rows beside it.
    """
    decoding = Decoding(max_new_tokens, beams, length_penalty, early_stopping)
    _check_room(model, inputs, max_new_tokens)
    logits, cache = model.start(inputs)
    num_rows, device = len(logits), logits.device
    beam_rows = torch.arange(num_rows, device=device).repeat_interleave(beams)
    logits, cache = logits[beam_rows], cache.select(beam_rows)
    # All beams of a row begin equal, so only the first may put candidates forward.
    scores = torch.full((num_rows, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    rows = [_Row(decoding, eos, [[] for _ in range(beams)]) for _ in range(num_rows)]
    for length in range(1, decoding.max_new_tokens + 1):
        totals = scores.unsqueeze(-1) + logits.float().log_softmax(-1).view(num_rows, beams, -1)
        # Each beam may end only once, so of twice as many candidates enough go on.
        best = totals.flatten(1).topk(2 * beams)
        candidates = zip(rows, best.values.tolist(), best.indices.tolist(), strict=True)
        going = []
        for row, values, places in candidates:
            told = [
                (score, *divmod(place, totals.shape[-1]))
                for score, place in zip(values, places, strict=True)
            ]
            going.append(row.step(told, length))
        if length == decoding.max_new_tokens or all(row.is_done for row in rows):
            break
        scores = torch.tensor([[score for score, _, _ in of_row] for of_row in going]).to(device)
        kept = torch.tensor([[beam for _, beam, _ in of_row] for of_row in going]).to(device)
        tokens = torch.tensor([[token for _, _, token in of_row] for of_row in going]).to(device)
        if beams > 1:
            cache = cache.select((beam_rows.view(num_rows, beams) * beams + kept).flatten())
        logits, cache = model.extend(tokens.flatten(), cache)
    return [row.ended[0][1] for row in rows]


_Candidate = tuple[float, int, int]  # log-likelihood, the beam that puts it forward, its token


@dataclass
class _Row:
    """One row's beams: what each has written, and the best texts that have ended."""

    decoding: Decoding
    eos: int
    written: list[list[int]]
    ended: list[tuple[float, list[int]]] = field(default_factory=list)  # scores, the best first
    is_done: bool = False  # nothing that goes on is wanted

    def step(self, candidates: Sequence[_Candidate], length: int) -> list[_Candidate]:
        """Takes the best candidates of a length, in order; returns those that go on."""
        decoding, penalty = self.decoding, self.decoding.length_penalty
        is_last = length == decoding.max_new_tokens
        going = [] if is_last else [one for one in candidates if one[2] != self.eos]
        going = going[: decoding.beams]
        if not self.is_done:
            for score, beam, token in candidates[: decoding.beams]:
                if score == -math.inf or not (is_last or token == self.eos):
                    continue
                text = self.written[beam] + ([] if token == self.eos else [token])
                self.ended.append((score / length**penalty, text))
            self.ended.sort(key=lambda one: -one[0])
            del self.ended[decoding.beams :]
            self.is_done = is_last or self._is_done(going[0][0], length)
        self.written = [[*self.written[beam], token] for _, beam, token in going]
        return going

    def _is_done(self, best_open: float, length: int) -> bool:
        """Whether no open beam, of which the best has this log-likelihood, can be of use."""
        decoding, penalty = self.decoding, self.decoding.length_penalty
        if len(self.ended) < decoding.beams:
            return False
        if decoding.early_stopping is True or decoding.beams == 1:
            return True
        if decoding.early_stopping == "never" and penalty > 0:
            length = decoding.max_new_tokens
        possible: float = best_open / length**penalty
        return possible <= self.ended[-1][0]


@torch.inference_mode()
def sample(
    model: Decoder,
    inputs: Inputs,
    *,
    eos: int,
    max_new_tokens: int,
    seeds: Sequence[int],
    top_p: float = 0.9,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Draws a continuation of each row's tokens, without `eos` (nucleus, arXiv:1904.09751).

    Each draw is from the likeliest tokens that together hold `top_p`. Every row has a seed of its
    own, so what it says does not depend on the rows beside it.
    """
    _check_room(model, inputs, max_new_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    logits, cache = model.start(inputs)
    written: list[list[int]] = [[] for _ in generators]
    going = [True] * len(generators)
    for length in range(1, max_new_tokens + 1):
        luck = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        tokens = _nucleus(logits.float() / temperature, top_p, luck.to(logits.device))
        for row, token in enumerate(tokens.tolist()):
            going[row] = going[row] and token != eos
            if going[row]:
                written[row].append(token)
        if not any(going) or length == max_new_tokens:
            break
        logits, cache = model.extend(tokens, cache)
    return written


def _nucleus(logits: Tensor, top_p: float, luck: Tensor) -> Tensor:
    """Maps logits (B, V) and uniform draws (B,) to one token per row, (B,)."""
    ranked, tokens = logits.softmax(-1).sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    cumulative = ranked.masked_fill(before >= top_p, 0.0).cumsum(-1)
    drawn = torch.searchsorted(cumulative, (luck * cumulative[:, -1]).unsqueeze(-1), right=True)
    last = (before < top_p).sum(-1, keepdim=True) - 1  # rounding must not draw past the nucleus
    return tokens.gather(-1, torch.minimum(drawn, last)).squeeze(-1)


def _check_room(model: Decoder, inputs: Inputs, max_new_tokens: int) -> None:
    assert not model.training, "call eval() first: dropout would change what is written"
    needed = inputs.tokens.shape[1] + max_new_tokens
    if needed > model.config.max_positions:
        raise ModelError(
            f"max_new_tokens={max_new_tokens} after {inputs.tokens.shape[1]} prefix tokens needs "
            f"{needed} positions, but max_positions={model.config.max_positions}"
        )
