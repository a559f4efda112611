"""The sampler against an independent one in NumPy, token for token, and against the distribution that it must draw from."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import event, given, settings

from services.core.noise import MAX_SEED
from services.core.types import SamplingParams
from services.engine import sampler
from services.engine.sampler import NUM_CANDIDATES, SampleRow, filter_logits, sample
from tests.numpy_philox import numpy_words

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
VOCAB_SIZES = [5, 6, 40, NUM_CANDIDATES - 1, NUM_CANDIDATES, NUM_CANDIDATES + 1, 300, 1000, 5000]


def numpy_noise(seed: int, position: int, vocab_size: int) -> Floats:
    """Gumbel noise of one row."""
    words = numpy_words(seed, position, -(-vocab_size // 4))[:vocab_size]
    noise: Floats = (-np.log(-np.log((words.astype(np.float64) + 0.5) / 2.0**32))).astype(np.float32)
    return noise


def numpy_scores(logits: Floats, row: SampleRow) -> Floats:
    """Bias, then repetition, then frequency and presence penalties, then held-back tokens."""
    params, scores = row.params, logits.copy()
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += np.float32(bias)
    penalty = np.float32(params.repetition_penalty)
    if penalty != 1:
        for token_id in set(row.tokens):
            scores[token_id] = scores[token_id] / penalty if scores[token_id] > 0 else scores[token_id] * penalty
    counts = np.bincount(np.array(row.tokens[row.prompt_length :], dtype=np.int64), minlength=len(logits))
    scores -= np.float32(params.frequency_penalty) * counts.astype(np.float32) + np.float32(params.presence_penalty) * (counts > 0)
    scores[list(row.held_back)] = -np.inf
    return scores


def numpy_kept(scaled: Floats, params: SamplingParams) -> Ids:
    """Ids that min-p, then top-k, then top-p leave, best first."""
    kept: Ids = np.lexsort((np.arange(len(scaled)), -scaled))
    best = scaled[kept[0]]
    kept = kept[scaled[kept] > -np.inf]
    if not len(kept):
        return kept  # everything is held back
    if params.min_p:
        kept = kept[scaled[kept] >= best + np.float32(math.log(params.min_p))]
    if params.top_k:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        mass = np.exp((scaled[kept] - best).astype(np.float64))
        before = np.concatenate(([0.0], np.cumsum(mass)[:-1]))
        kept = kept[before < params.top_p * mass.sum()]
    return kept


def numpy_sample(logits: Floats, row: SampleRow) -> int:
    scores = numpy_scores(logits, row)
    if row.params.temperature == 0:
        return int(np.lexsort((np.arange(len(scores)), -scores))[0])
    scaled = scores / np.float32(row.params.temperature)
    kept = np.sort(numpy_kept(scaled, row.params))
    if not len(kept):
        return 0
    noisy = scaled[kept] + numpy_noise(row.seed, row.position, len(logits))[kept]
    return int(kept[np.argmax(noisy)])


def make_row(logit_row: int = 0, *, seed: int = 1, position: int = 9, held_back: frozenset[int] = frozenset(), **fields: Any) -> SampleRow:
    """A row with the given sampling parameters after a prompt [0, 1] and the output [2]."""
    return SampleRow(
        logit_row=logit_row,
        params=SamplingParams(**fields),
        seed=seed,
        position=position,
        tokens=[0, 1, 2],
        prompt_length=2,
        held_back=held_back,
    )


def sample_ids(logits: Floats, rows: Sequence[SampleRow]) -> list[int]:
    return [token.token_id for token in sample(torch.from_numpy(logits), rows)]


def make_logits(kind: str, seed: int, vocab_size: int) -> Floats:
    """Logits of a shape that a filter may get wrong."""
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal(vocab_size)
    match kind:
        case "peaked":
            logits = normal * 8
        case "quantized":
            logits = np.round(normal * 4) / 2
        case "two levels":
            logits = np.where(generator.random(vocab_size) < 0.5, 1.0, -0.5)
        case "flat":
            logits = np.full(vocab_size, 0.25)
        case "nearly flat":
            logits = normal * 1e-3
        case _:
            logits = np.where(generator.random(vocab_size) < 0.5, -np.inf, np.round(normal * 2))
    return logits.astype(np.float32)


KINDS = ["peaked", "quantized", "two levels", "flat", "nearly flat", "with -inf"]
# Multiples of 1/1000: a top_p within a few roundings of 1 would ask which of two sums of the same masses is larger.
FRACTIONS = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)


@st.composite
def sample_rows(draw: st.DrawFn, vocab_size: int, num_logit_rows: int) -> SampleRow:
    token_ids = st.integers(0, vocab_size - 1)
    tokens = draw(st.lists(token_ids, min_size=1, max_size=12))
    rarely = st.sampled_from([False, False, True])
    penalized = draw(rarely)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0, 1.0]) | st.floats(2**-10, 100)),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 50, 255, 256, 257, 400, vocab_size, 2**70]) | st.integers(1, vocab_size)),
        top_p=draw(st.just(1.0) | FRACTIONS),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.0, 1e-6, 0.02, 0.3, 1.0]) | FRACTIONS),
        frequency_penalty=draw(st.floats(-2, 2)) if penalized else 0.0,
        presence_penalty=draw(st.floats(-2, 2)) if penalized else 0.0,
        repetition_penalty=draw(st.floats(0.25, 4)) if penalized else 1.0,
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-100, 100), max_size=4)) if draw(rarely) else {},
    )
    return SampleRow(
        logit_row=draw(st.integers(0, num_logit_rows - 1)),
        params=params,
        seed=draw(st.integers(0, MAX_SEED)),
        position=draw(st.integers(0, 10**6)),
        tokens=tokens,
        prompt_length=draw(st.integers(1, len(tokens))),
        held_back=draw(st.frozensets(token_ids, max_size=3)) if draw(rarely) else frozenset(),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Floats, list[SampleRow]]:
    vocab_size, num_logit_rows = draw(st.sampled_from(VOCAB_SIZES)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32))
    logits = np.stack([make_logits(draw(st.sampled_from(KINDS)), seed + index, vocab_size) for index in range(num_logit_rows)])
    return logits, draw(st.lists(sample_rows(vocab_size, num_logit_rows), min_size=1, max_size=4))


@settings(max_examples=300, deadline=None)
@given(batches())
def test_sample_when_anything_comes_equals_the_numpy_sampler_token_for_token(batch: tuple[Floats, list[SampleRow]]) -> None:
    """Odds of a false alarm: the two libraries' fp64 exp and log may differ in the last bit, which moves a cut or a rounded noise value
    about once in 2**29 tokens, and only where two tokens are that close does the choice change: below 1e-9 per run."""
    logits, rows = batch
    kept = logits.copy()
    assert sample_ids(logits, rows) == [numpy_sample(logits[row.logit_row], row) for row in rows]
    np.testing.assert_array_equal(logits, kept)  # logprobs are read from them later
    event(f"candidates suffice: {logits.shape[1] <= NUM_CANDIDATES}")


@settings(max_examples=200, deadline=None)
@given(batches())
def test_filter_logits_when_anything_comes_keeps_exactly_the_tokens_numpy_keeps(batch: tuple[Floats, list[SampleRow]]) -> None:
    logits, rows = batch
    rows = [row for row in rows if not row.params.is_greedy]
    if not rows:
        return
    scaled = np.stack([logits[row.logit_row] / np.float32(row.params.temperature) for row in rows])
    filtered = filter_logits(torch.from_numpy(scaled), [row.params for row in rows]).numpy()
    for values, before, row in zip(filtered, scaled, rows, strict=True):
        expected = np.full_like(before, -np.inf)
        expected[numpy_kept(before, row.params)] = before[numpy_kept(before, row.params)]
        if np.isfinite(before).any():
            np.testing.assert_array_equal(values, expected)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_sample_when_a_row_is_alone_equals_the_row_in_its_batch(batch: tuple[Floats, list[SampleRow]]) -> None:
    logits, rows = batch
    together = sample(torch.from_numpy(logits), rows)
    for row, token in zip(rows, together, strict=True):
        alone = dataclasses.replace(row, logit_row=0)
        assert sample(torch.from_numpy(logits[row.logit_row : row.logit_row + 1]), [alone]) == [token]
    backwards = sample(torch.from_numpy(logits), rows[::-1])
    assert backwards[::-1] == together


@pytest.mark.parametrize(
    ("kind", "fields", "sorted_whole"),
    [
        ("peaked", {"top_p": 0.9}, False),
        ("peaked", {"top_k": 50}, False),
        ("peaked", {"min_p": 0.1}, False),
        ("peaked", {"top_k": NUM_CANDIDATES}, False),
        ("flat", {"top_k": 200, "top_p": 0.5}, False),
        ("nearly flat", {"top_p": 0.01}, False),  # 20 of 2,000: the candidates and the mass of all suffice
        ("nearly flat", {"top_k": NUM_CANDIDATES, "top_p": 0.5}, False),
        ("two levels", {"min_p": 0.5, "top_p": 0.05}, False),  # half of 2,000 are eligible, and only their mass counts
        ("flat", {"top_p": 0.9}, True),
        ("nearly flat", {"top_p": 0.9}, True),
        ("nearly flat", {"min_p": 0.5}, True),
        ("flat", {"min_p": 1.0}, True),
        ("quantized", {"top_k": NUM_CANDIDATES + 1}, True),
        ("two levels", {"top_k": 700, "top_p": 0.6}, True),
    ],
)
def test_filter_logits_when_candidates_do_or_do_not_suffice_sorts_whole_rows_only_then(
    kind: str, fields: dict[str, Any], sorted_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    num_kept = sampler._num_kept

    def counting(scaled: torch.Tensor, params: Sequence[SamplingParams], width: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        widths.append(width)
        return num_kept(scaled, params, width)

    monkeypatch.setattr(sampler, "_num_kept", counting)
    logits = make_logits(kind, 3, 2000)[None]
    rows = [make_row(seed=seed, **fields) for seed in range(20)]
    assert sample_ids(logits, rows) == [numpy_sample(logits[0], row) for row in rows]
    assert widths == ([NUM_CANDIDATES, 2000] if sorted_whole else [NUM_CANDIDATES])


@pytest.mark.parametrize("vocab_size", [8, 1000])
@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 3}, [1, 3, 0]),  # of 0, 4, 5, 6, which all have the third-best logit, the lowest id
        ({"top_k": 4}, [1, 3, 0, 4]),
        ({"top_p": 0.5}, [1, 3]),  # masses 1, 1, then four of 0.37: 0.5 of 3.52 is reached by the two
        ({"top_p": 0.6}, [1, 3, 0]),
        ({"min_p": 0.5}, [1, 3]),
        ({"min_p": 1.0, "top_k": 1}, [1]),
    ],
)
def test_filter_logits_when_the_last_place_is_tied_keeps_the_lowest_ids(fields: dict[str, Any], kept: list[int], vocab_size: int) -> None:
    logits = torch.full((1, vocab_size), -50.0)
    logits[0, :7] = torch.tensor([1.0, 2.0, -9.0, 2.0, 1.0, 1.0, 1.0])
    filtered = filter_logits(logits, [make_row(**fields).params])
    assert torch.nonzero(filtered[0] > -math.inf).flatten().tolist() == sorted(kept)


@pytest.mark.parametrize("top_p", [0.99997, 0.99999])
def test_filter_logits_when_much_of_the_mass_is_in_tiny_tokens_counts_each_of_them(top_p: float) -> None:
    """fp32 would add 5,000 tokens of 1e-8 to the best one and notice none of them."""
    logits = np.full((1, 5000), -18.4, dtype=np.float32)
    logits[0, 4321] = 0.0
    filtered = filter_logits(torch.from_numpy(logits), [SamplingParams(top_p=top_p)])
    tiny = math.exp(float(np.float32(-18.4)))
    num_kept = math.ceil((top_p * (1 + 4999 * tiny) - 1) / tiny)
    assert 1000 < num_kept < 4500
    expected = [*range(num_kept), 4321] if num_kept <= 4321 else list(range(num_kept + 1))
    assert torch.nonzero(filtered[0] > -math.inf).flatten().tolist() == expected


def test_filter_logits_when_no_filter_is_on_changes_nothing() -> None:
    logits = torch.from_numpy(make_logits("quantized", 0, 300))[None]
    assert torch.equal(filter_logits(logits, [SamplingParams()]), logits)


def chi_square_limit(degrees: int) -> float:
    """The value that chi-square exceeds once in a million (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.7534 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    ("axis", "fields"),
    [
        ("seeds", {}),
        ("positions", {}),
        ("seeds", {"temperature": 0.7}),
        ("seeds", {"temperature": 2.0}),
        ("seeds", {"top_k": 3}),
        ("seeds", {"top_p": 0.8}),
        ("seeds", {"min_p": 0.2}),
        ("positions", {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05}),
        ("seeds", {"logit_bias": {5: 2.0}, "presence_penalty": 1.0, "repetition_penalty": 1.5}),
    ],
)
def test_sample_when_drawn_often_has_the_distribution_of_the_filtered_softmax(axis: str, fields: dict[str, Any]) -> None:
    """Chi-square at one in a million. Seeds are fixed: a false alarm can come only once, when the noise or this test changes."""
    logits = np.array([[1.0, 2.0, 0.5, -1.0, 0.0, 0.9, -1.5, 1.5]], dtype=np.float32)
    count = 6000
    rows = [make_row(seed=n, **fields) if axis == "seeds" else make_row(position=n, seed=5, **fields) for n in range(count)]
    observed = np.bincount(sample_ids(logits, rows), minlength=8)
    scaled = numpy_scores(logits[0], rows[0]) / np.float32(rows[0].params.temperature)
    kept = numpy_kept(scaled, rows[0].params)
    mass = np.exp(scaled[kept].astype(np.float64))
    expected = count * mass / mass.sum()
    assert observed.sum() == observed[kept].sum() == count  # nothing that was filtered out
    assert expected.min() > 5
    assert ((observed[kept] - expected) ** 2 / expected).sum() < chi_square_limit(len(kept) - 1)


def test_sample_when_two_seeds_or_positions_differ_draws_independently() -> None:
    """Of 4,000 pairs of draws from 8 equal tokens one in eight agrees; 4.9 standard deviations: 1e-6, seeds fixed."""
    logits = np.zeros((1, 8), dtype=np.float32)
    count = 4000
    base = sample_ids(logits, [make_row(seed=n) for n in range(count)])
    for shifted in ([make_row(seed=n, position=10) for n in range(count)], [make_row(seed=n + 2**32) for n in range(count)]):
        agreements = sum(left == right for left, right in zip(base, sample_ids(logits, shifted), strict=True))
        assert abs(agreements - count / 8) < 4.9 * math.sqrt(count * 7 / 64)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_sample_when_greedy_and_tied_takes_the_lowest_id(vocab_size: int) -> None:
    logits = np.zeros((2, vocab_size), dtype=np.float32)
    logits[1, [2, 4, vocab_size - 1]] = 3.0
    assert sample_ids(logits, [make_row(0, temperature=0.0), make_row(1, temperature=0.0)]) == [0, 2]


def test_sample_when_greedy_ignores_seed_and_filters() -> None:
    logits = make_logits("peaked", 1, 300)[None]
    rows = [make_row(temperature=0.0, seed=seed, top_k=1 + seed, top_p=0.1) for seed in range(5)]
    assert set(sample_ids(logits, rows)) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e-2, 1e-4])
def test_sample_when_the_temperature_is_low_takes_the_best(temperature: float) -> None:
    logits = np.array([[1.0, 5.0, 3.0, 2.0, -1.0]], dtype=np.float32)
    for fields in ({}, {"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}):
        assert sample_ids(logits, [make_row(temperature=temperature, seed=seed, **fields) for seed in range(20)]) == [1] * 20


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300])
def test_sample_when_the_temperature_is_tiny_takes_the_best(temperature: float) -> None:
    logits = np.array([[1.0, 5.0, 30.0, 2.0, -1.0]], dtype=np.float32)
    assert sample_ids(logits, [make_row(temperature=temperature)]) == [2]


def adjusted(logits: list[float], *, output: list[int], held_back: frozenset[int] = frozenset(), **fields: Any) -> list[float]:
    """The scores of a row after the prompt [0, 1] and `output`."""
    scores = torch.tensor(logits)
    row = dataclasses.replace(make_row(held_back=held_back, **fields), tokens=[0, 1, *output])
    sampler._adjust(scores, row)
    np.testing.assert_array_equal(scores.numpy(), numpy_scores(np.array(logits, dtype=np.float32), row))
    return scores.tolist()


def test_penalties_when_computed_by_hand_are_these() -> None:
    logits, output = [2.0, -2.0, 1.0, 0.5, 4.0], [2, 2, 3]
    # per occurrence in the output; prompt tokens do not count
    assert adjusted(logits, output=output, frequency_penalty=0.5) == [2.0, -2.0, 0.0, 0.0, 4.0]
    assert adjusted(logits, output=output, frequency_penalty=-0.5) == [2.0, -2.0, 2.0, 1.0, 4.0]
    # once if it occurs in the output
    assert adjusted(logits, output=output, presence_penalty=0.25) == [2.0, -2.0, 0.75, 0.25, 4.0]
    # prompt and output: positive logits are divided, negative ones multiplied
    assert adjusted(logits, output=output, repetition_penalty=2.0) == [1.0, -4.0, 0.5, 0.25, 4.0]
    assert adjusted(logits, output=output, repetition_penalty=0.5) == [4.0, -1.0, 2.0, 1.0, 4.0]
    # repetition comes before the other two
    assert adjusted(logits, output=output, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25) == [
        1.0, -4.0, -0.75, -0.5, 4.0,
    ]  # fmt: skip


def test_penalties_when_nothing_has_been_generated_touch_only_repeated_prompt_tokens() -> None:
    assert adjusted([2.0, -2.0, 1.0], output=[], frequency_penalty=2.0, presence_penalty=2.0) == [2.0, -2.0, 1.0]
    assert adjusted([2.0, -2.0, 1.0], output=[], repetition_penalty=2.0) == [1.0, -4.0, 1.0]


def test_logit_bias_when_given_is_added_before_penalties() -> None:
    assert adjusted([2.0, -2.0, 1.0], output=[], logit_bias={0: -3.0, 2: 0.5}) == [-1.0, -2.0, 1.5]
    assert adjusted([2.0, -2.0, 1.0], output=[], logit_bias={0: -3.0}, repetition_penalty=2.0) == [-2.0, -4.0, 1.0]


def test_logit_bias_when_extreme_forces_or_bans_a_token() -> None:
    logits = make_logits("peaked", 5, 300)[None]
    best = int(logits.argmax())
    assert sample_ids(logits, [make_row(seed=seed, logit_bias={7: 100.0}) for seed in range(20)]) == [7] * 20
    assert best not in sample_ids(logits, [make_row(seed=seed, logit_bias={best: -100.0}) for seed in range(20)])
    assert sample_ids(logits, [make_row(temperature=0.0, logit_bias={7: 100.0})]) == [7]


def test_held_back_tokens_when_they_are_the_best_do_not_come_however_large_their_bias() -> None:
    logits = np.array([[9.0, 1.0, 8.0, 0.0, 2.0]], dtype=np.float32)
    held_back = frozenset({0, 2})
    assert adjusted(logits[0].tolist(), output=[], held_back=held_back, logit_bias={0: 100.0}) == [-math.inf, 1.0, -math.inf, 0.0, 2.0]
    assert sample_ids(logits, [make_row(temperature=0.0, held_back=held_back)]) == [4]
    drawn = sample_ids(logits, [make_row(seed=seed, held_back=held_back, temperature=3.0, top_k=4) for seed in range(200)])
    assert set(drawn) == {1, 3, 4}


def test_logprobs_when_asked_for_are_those_of_the_raw_logits_best_first_and_ties_by_id() -> None:
    logits = np.array([[0.5, 2.0, 0.5, 2.0, -1.0, 0.5]], dtype=np.float32)
    expected = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    (token,) = sample(torch.from_numpy(logits), [make_row(temperature=0.0, logprobs=4)])
    assert token.logprobs is not None
    assert [token_id for token_id, _ in token.logprobs.top] == [1, 3, 0, 2]
    np.testing.assert_allclose([value for _, value in token.logprobs.top], expected[[1, 3, 0, 2]], rtol=1e-12)
    assert token.logprobs.chosen == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_when_the_vocabulary_is_large_equal_those_of_numpy(kind: str) -> None:
    logits = make_logits(kind, 11, 5000)[None]
    (token,) = sample(torch.from_numpy(logits), [make_row(logprobs=20)])
    exact = logits[0].astype(np.float64)
    order = np.lexsort((np.arange(5000), -exact))[:20]
    normalizer = np.logaddexp.reduce(exact)
    assert token.logprobs is not None
    assert [token_id for token_id, _ in token.logprobs.top] == order.tolist()
    np.testing.assert_allclose([value for _, value in token.logprobs.top], exact[order] - normalizer, rtol=1e-12)
    assert token.logprobs.chosen == pytest.approx(exact[token.token_id] - normalizer, rel=1e-12)


def test_logprobs_when_sampling_is_warped_do_not_change() -> None:
    logits = make_logits("quantized", 2, 400)[None]
    plain = make_row(logprobs=5)
    warped = make_row(
        logprobs=5, temperature=0.3, top_k=9, top_p=0.7, min_p=0.1, repetition_penalty=3.0, frequency_penalty=2.0,
        presence_penalty=-2.0, logit_bias={7: 100.0}, held_back=frozenset({3}),
    )  # fmt: skip
    tokens = sample(torch.from_numpy(logits), [plain, warped])
    exact = logits[0].astype(np.float64)
    normalizer = np.log(np.exp(exact).sum())
    assert tokens[1].token_id == 7
    assert tokens[0].logprobs is not None
    assert tokens[1].logprobs is not None
    assert tokens[0].logprobs.top == tokens[1].logprobs.top
    for token in tokens:
        assert token.logprobs is not None
        assert token.logprobs.chosen == pytest.approx(exact[token.token_id] - normalizer, rel=1e-12)


@pytest.mark.parametrize(("num_top", "length"), [(0, 0), (1, 1), (5, 5), (20, 5)])
def test_logprobs_when_more_are_asked_than_there_are_tokens_gives_all(num_top: int, length: int) -> None:
    logits = make_logits("flat", 0, 5)[None]
    (token,) = sample(torch.from_numpy(logits), [make_row(logprobs=num_top)])
    assert token.logprobs is not None
    assert [token_id for token_id, _ in token.logprobs.top] == list(range(length))
    assert token.logprobs.chosen == pytest.approx(-math.log(5))


def test_logprobs_when_not_asked_for_are_none() -> None:
    tokens = sample(torch.zeros(1, 5), [make_row(), make_row(logprobs=1)])
    assert tokens[0].logprobs is None
    assert tokens[1].logprobs is not None


def test_sample_when_siblings_share_a_logit_row_equals_a_row_for_each() -> None:
    logits = np.stack([make_logits("nearly flat", seed, 300) for seed in range(2)])
    rows = [make_row(index // 3, seed=index, top_p=0.9, logprobs=2) for index in range(6)]
    spread = [dataclasses.replace(row, logit_row=index) for index, row in enumerate(rows)]
    together = sample(torch.from_numpy(logits), rows)
    assert together == sample(torch.from_numpy(logits.repeat(3, axis=0)), spread)
    assert len({token.token_id for token in together}) == 6


def test_sample_when_siblings_are_adjusted_differently_does_not_mix_them() -> None:
    logits = np.array([[1.0, 0.9, 0.8, 0.7, 0.6]], dtype=np.float32)
    rows = [
        make_row(temperature=0.0, logit_bias={0: -5.0}),
        make_row(temperature=0.0),
        make_row(temperature=0.0, held_back=frozenset({0, 1})),
        make_row(temperature=1.0, top_k=1),
    ]
    assert sample_ids(logits, rows) == [1, 0, 2, 0]
