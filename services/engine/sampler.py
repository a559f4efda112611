"""Chooses tokens: a pure function of (logits, sampling parameters, seed, position, the tokens so far).

Adjust (stop tokens held back by min_tokens, bias, penalties), divide by the temperature, filter (min-p, top-k, top-p), add Gumbel noise
keyed by (seed, position), take the argmax. Filters rank by (logit descending, id ascending), so that equal logits leave no choice to a
sorting routine. Greedy is the argmax of the adjusted logits. Logprobs are of the raw logits.
Knows nothing of batches beyond its rows. Source: Gumbel-max sampling; filter order as in vLLM.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

import kernels
from services.core.types import SampledToken, SamplingParams, TokenLogprobs

# top-p rarely keeps more tokens than this; only rows that do are sorted whole.
NUM_CANDIDATES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One token to choose.

    logit_row    row of the step's logits; choices of one prompt share a row for their first token
    seed         of the choice; position: index of the new token in its sequence, prompt included
    tokens       prompt and output so far; the first prompt_length are the prompt
    held_back    token ids that must not come yet (min_tokens)
    """

    logit_row: int
    params: SamplingParams
    seed: int
    position: int
    tokens: Sequence[int]
    prompt_length: int
    held_back: frozenset[int]

    @property
    def is_adjusted(self) -> bool:
        return bool(self.held_back or self.params.logit_bias or self.params.has_penalties)


class ScoreRow(NamedTuple):
    """A known token whose logprobs are wanted: under row `logit_row` of the step's logits, beside those of the num_top best."""

    logit_row: int
    token_id: int
    num_top: int


def score(logits: torch.Tensor, rows: Sequence[ScoreRow]) -> list[TokenLogprobs]:
    """Logprobs of known tokens from fp32 logits [R, V]."""
    return [_logprobs(logits[row], token_id, num_top) for row, token_id, num_top in rows]


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """One token per row from fp32 logits [R, V]."""
    device = logits.device
    raw = logits
    if [row.logit_row for row in rows] != list(range(len(logits))):
        raw = logits.index_select(0, torch.tensor([row.logit_row for row in rows], device=device))
    scores = raw
    adjusted = [index for index, row in enumerate(rows) if row.is_adjusted]
    if adjusted:
        scores = raw.clone()
        for index in adjusted:
            _adjust(scores[index], rows[index])
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        picked = scores.argmax(-1) if len(drawn) < len(rows) else torch.empty(len(rows), dtype=torch.int64, device=device)
        where = torch.tensor(drawn, device=device)
        picked[where] = _draw(scores[where], [rows[index] for index in drawn])
    else:
        picked = scores.argmax(-1)
    token_ids: list[int] = picked.tolist()
    return [
        SampledToken(token_id, None if row.params.logprobs is None else _logprobs(raw[index], token_id, row.params.logprobs))
        for index, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
    ]


def _adjust(scores: torch.Tensor, row: SampleRow) -> None:
    """Bias, penalties and held-back tokens of one row [V], in place. Source: the definitions of OpenAI and of CTRL (repetition)."""
    params, vocab_size = row.params, len(scores)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=scores.device)
        scores[ids] += torch.tensor(list(params.logit_bias.values()), dtype=scores.dtype, device=scores.device)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(row.tokens)), device=scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        output = torch.tensor(row.tokens[row.prompt_length :], dtype=torch.int64, device=scores.device)
        counts = torch.bincount(output, minlength=vocab_size)
        scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if row.held_back:
        scores[torch.tensor(sorted(row.held_back), device=scores.device)] = -math.inf


def _draw(scores: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """[R] tokens drawn from softmax(filtered scores / temperature) by adding each row's Gumbel noise."""
    temperature = torch.tensor([row.params.temperature for row in rows], dtype=torch.float32, device=scores.device)
    scaled = scores / temperature[:, None]
    filtered = [index for index, row in enumerate(rows) if row.params.has_filters]
    if filtered:
        where = torch.tensor(filtered, device=scores.device)
        scaled[where] = filter_logits(scaled[where], [rows[index].params for index in filtered])
    noise = kernels.gumbel_noise([row.seed for row in rows], [row.position for row in rows], scores.shape[1], scores.device)
    return noise.add_(scaled).argmax(-1)


def filter_logits(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """[R, V] logits with everything that min-p, then top-k, then top-p (of what those leave) drop at -inf."""
    vocab_size = scaled.shape[1]
    width = min(vocab_size, NUM_CANDIDATES)
    num_kept, values, resolved = _num_kept(scaled, params, width)
    if not resolved:
        num_kept, values, _ = _num_kept(scaled, params, vocab_size)
    threshold = values.gather(1, num_kept[:, None] - 1)
    filtered = scaled.masked_fill(scaled < threshold, -math.inf)
    # Of the tokens equal to the threshold, the ones with the lowest ids fill the places that are left.
    places = num_kept - (values > threshold).sum(1)
    ties = scaled == threshold
    for index in torch.nonzero(ties.sum(1) > places).flatten().tolist():
        tied_ids = torch.nonzero(ties[index]).flatten()
        filtered[index, tied_ids[places[index] :]] = -math.inf
    return filtered


def _num_kept(scaled: torch.Tensor, params: Sequence[SamplingParams], width: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """How many tokens each row keeps [R], the `width` largest logits [R, width], and whether those were enough to tell."""
    vocab_size = scaled.shape[1]
    device = scaled.device
    values = scaled.topk(width, dim=-1).values
    best = values[:, :1]
    top_k = torch.tensor([min(p.top_k or vocab_size, vocab_size) for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    floor = best + torch.tensor([math.log(p.min_p) if p.min_p else -math.inf for p in params], device=device)[:, None]
    eligible = (torch.arange(width, device=device) < top_k[:, None]) & (values >= floor) & (values > -math.inf)
    num_eligible = eligible.sum(1)
    # Mass in fp64: a sum in another order must not move the cut.
    mass = (values - best).double().exp_().masked_fill_(~eligible, 0.0)
    total = mass.sum(1)
    beyond = num_eligible == width  # the eligible tokens may go on past the candidates
    if width < vocab_size and bool(beyond.any()):
        everything = (scaled - best).double().exp_().masked_fill_(scaled < floor, 0.0).sum(1)
        total = torch.where(beyond & (top_k >= vocab_size), everything, total)
    mass_before = mass.cumsum(1) - mass
    in_nucleus = eligible & (mass_before < (top_p * total)[:, None])
    num_kept = torch.where(top_p < 1.0, in_nucleus.sum(1), num_eligible).clamp_(min=1)
    exact = (num_eligible < width) | ((top_k >= vocab_size) & (top_p < 1.0) & (num_kept < width)) | (top_k == width)
    return num_kept, values, width == vocab_size or bool(exact.all())


def _logprobs(raw: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    normalizer = raw.double().logsumexp(0)
    if num_top == 0:
        return TokenLogprobs(chosen=float(raw[token_id] - normalizer), top=())
    least = raw.topk(min(num_top, len(raw))).values[-1]
    ids = torch.nonzero(raw >= least).flatten()  # ascending ids, a few more than num_top if the last place is tied
    order = raw[ids].sort(descending=True, stable=True).indices[:num_top]
    top_ids = ids[order]
    top = tuple(zip(top_ids.tolist(), (raw[top_ids].double() - normalizer).tolist(), strict=True))
    return TokenLogprobs(chosen=float(raw[token_id] - normalizer), top=top)
