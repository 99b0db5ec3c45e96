"""Image plus prefix tokens to new tokens: greedy, beam and nucleus decoding with a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.models.base import Decoder
from pipeline.models.inputs import Inputs


@torch.inference_mode()
def generate(
    model: Decoder, inputs: Inputs, *, eos: int, max_new_tokens: int, beams: int = 1
) -> list[list[int]]:
    """Returns the likeliest continuation of each row's tokens, without `eos`.

    Beams are ranked by log-likelihood divided by length, `eos` counted; one beam is greedy
    decoding. A row ends when as many beams have finished as it has, and what it says does not
    depend on the rows beside it.
    """
    _check_room(model, inputs, max_new_tokens)
    logits, cache = model.start(inputs)
    num_rows, device = len(logits), logits.device
    beam_rows = torch.arange(num_rows, device=device).repeat_interleave(beams)
    logits, cache = logits[beam_rows], cache.select(beam_rows)
    # All beams of a row begin equal, so only the first may put candidates forward.
    scores = torch.full((num_rows, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    written: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(num_rows)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(num_rows)]
    for length in range(1, max_new_tokens + 1):
        totals = scores.unsqueeze(-1) + logits.float().log_softmax(-1).view(num_rows, beams, -1)
        # Each beam may end only once, so of twice as many candidates enough go on.
        best = totals.flatten(1).topk(2 * beams)
        alive: list[list[tuple[float, int, int]]] = [[] for _ in range(num_rows)]
        values, places = best.values.tolist(), best.indices.tolist()
        for row in range(num_rows):
            for rank, (score, place) in enumerate(zip(values[row], places[row], strict=True)):
                beam, token = divmod(place, totals.shape[-1])
                if token != eos:
                    alive[row].append((score, beam, token))
                elif rank < beams and len(finished[row]) < beams:
                    finished[row].append((score / length, written[row][beam]))
            alive[row] = alive[row][:beams]
            written[row] = [[*written[row][beam], token] for _, beam, token in alive[row]]
        if all(len(done) == beams for done in finished):
            break
        scores = torch.tensor([[score for score, _, _ in row] for row in alive], device=device)
        if length < max_new_tokens:
            kept = torch.tensor([[beam for _, beam, _ in row] for row in alive], device=device)
            tokens = torch.tensor([[token for _, _, token in row] for row in alive], device=device)
            if beams > 1:
                cache = cache.select((beam_rows.view(num_rows, beams) * beams + kept).flatten())
            logits, cache = model.extend(tokens.flatten(), cache)
    return [
        _best(finished[row], scores[row].tolist(), written[row], max_new_tokens)
        for row in range(num_rows)
    ]


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


def _best(
    finished: list[tuple[float, list[int]]],
    scores: list[float],
    written: list[list[int]],
    beams_length: int,
) -> list[int]:
    """Picks a row's best text; beams cut off at the length limit fill up what has not finished."""
    cut_off = [(score / beams_length, text) for score, text in zip(scores, written, strict=True)]
    candidates = finished + cut_off[: len(scores) - len(finished)]
    return max(candidates, key=lambda candidate: candidate[0])[1]


def _check_room(model: Decoder, inputs: Inputs, max_new_tokens: int) -> None:
    assert not model.training, "call eval() first: dropout would change what is written"
    needed = inputs.tokens.shape[1] + max_new_tokens
    if needed > model.config.max_positions:
        raise ModelError(
            f"max_new_tokens={max_new_tokens} after {inputs.tokens.shape[1]} prefix tokens needs "
            f"{needed} positions, but max_positions={model.config.max_positions}"
        )
