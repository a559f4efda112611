"""What work costs in seconds: how it grows with its size, learnt from the whole fleet, and how slow each worker is, learnt from itself.

A *shape* tells the seconds of a piece of work on a typical worker; every observation of every worker teaches it. A worker adds nothing
but a factor for each kind of work, its *slowness*: one number is known after a handful of requests, a curve of its own after hundreds.
A factor that is not observed drifts back to the fleet's median, where new workers start: a worker that was slow once is tried again.
It differs from that median only as far as noise does not explain it: of equal workers each would be avoided for a while otherwise.

    seconds of (work, worker) = shape(work) × slowness(worker)

Shapes may be declared instead of learnt, for simulated workers. Time is passed in; nothing here reads a clock.
"""

import math
from itertools import combinations
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

HALF_LIFE_S = 10.0  # of what is known about a worker that does no work: long beside a request, short beside an operator's patience
# A single hiccup may move a factor by a sixth; each further surprise in the same direction counts twice as much as the one before it.
SURPRISE = 0.35  # in log units: a factor of 1.4
MAX_EXPLAINED = 3.0  # whoever takes longer than that by far is slow, however many were there
GAIN = 0.2  # of an observation that is no surprise
MAX_LOG_FACTOR = math.log(1e4)

PRIOR_BYTES_PER_S = 1e9  # a plain TCP socket, until transfers have been seen
PRIOR_OVERHEAD_S = 5e-3
PRIOR_OUTPUT_TOKENS = 128.0
# A typical accelerator with a small model; the first observation of any worker already replaces their scale.
PRIOR_PREFILL = (5e-3, 5e-5, 1e-9)
PRIOR_STEP = (5e-3, 1e-4, 1e-6)


class PrefillShape(Protocol):
    """Seconds to compute `new_tokens` of a prompt behind `cached_tokens` of it."""

    def seconds(self, new_tokens: int, cached_tokens: int) -> float: ...

    def observe(self, new_tokens: int, cached_tokens: int, seconds: float, *, weight: float = 1.0) -> None: ...


class StepShape(Protocol):
    """Seconds of one decode step of `running` sequences when `used_blocks` of the pool's `total_blocks` are owned."""

    def seconds(self, running: float, used_blocks: float, total_blocks: float) -> float: ...

    def observe(self, running: float, used_blocks: float, total_blocks: float, seconds: float) -> None: ...


class RelativeFit:
    """Non-negative coefficients c of seconds ≈ Σ c·feature, by least squares of the relative error; old observations fade.

    A weak pull towards the prior's proportions (its scale is fitted too) decides what the data leaves open, such as a slope when all
    prompts have been equally long.
    """

    MEMORY = 256.0  # observations
    PULL = 1e-3

    def __init__(self, prior: tuple[float, ...]) -> None:
        self.coefficients = prior
        self._prior = np.array(prior)
        self._gram = np.zeros((len(prior), len(prior)))
        self._moment = np.zeros(len(prior))
        self._num_observations = 0

    def observe(self, features: tuple[float, ...], seconds: float, *, weight: float = 1.0) -> None:
        """Takes `seconds` > 0 for a piece of work whose features are >= 0. `weight`, 0 … 1: how much it says, beside others."""
        predicted = sum(c * f for c, f in zip(self.coefficients, features, strict=True))
        row = np.array(features) / seconds
        # In relative terms work that took far less than predicted would outweigh all else: most likely it was cut short.
        if predicted > 2.0 * seconds and self._num_observations:
            weight *= (2.0 * seconds / predicted) ** 3
        fade = 1.0 - weight / self.MEMORY
        self._gram = fade * self._gram + weight * np.outer(row, row)
        self._moment = fade * self._moment + weight * row
        self._num_observations += 1
        # Solving is dear beside observing: seldom, once there is something to stand on.
        if self._num_observations <= 16 or self._num_observations % 16 == 0:
            self._solve()

    def _solve(self) -> None:
        """Minimises over all supports: there are at most three features."""
        scale = float(self._moment @ self._prior) / float(self._prior @ self._gram @ self._prior)
        pull = self.PULL * np.diag(self._gram) + 1e-300
        gram = self._gram + np.diag(pull)
        moment = self._moment + pull * self._prior * scale
        best, best_error = None, math.inf
        indices = range(len(self._prior))
        for size in range(1, len(self._prior) + 1):
            for support in map(list, combinations(indices, size)):
                solution = np.linalg.solve(gram[np.ix_(support, support)], moment[support])
                error = -float(moment[support] @ solution)
                if error < best_error and (solution >= 0.0).all():
                    best, best_error = np.zeros(len(self._prior)), error
                    best[support] = solution
        if best is not None and np.isfinite(best).all():
            self.coefficients = tuple(best.tolist())


class LearntPrefill:
    """A constant, a cost per token, and one per pair of tokens that attend to each other."""

    def __init__(self) -> None:
        self._fit = RelativeFit(PRIOR_PREFILL)

    def seconds(self, new_tokens: int, cached_tokens: int) -> float:
        constant, per_token, per_pair = self._fit.coefficients
        return constant + new_tokens * (per_token + per_pair * (new_tokens + 2 * cached_tokens))

    def observe(self, new_tokens: int, cached_tokens: int, seconds: float, *, weight: float = 1.0) -> None:
        self._fit.observe((1.0, float(new_tokens), float(new_tokens * (new_tokens + 2 * cached_tokens))), seconds, weight=weight)


class DeclaredPrefill:
    """A quadratic for each of as few equal chunks as `chunk_tokens` permits, whatever is cached: how published models are written."""

    def __init__(self, *, constant_s: float, per_token_s: float, per_token_squared_s: float, chunk_tokens: int) -> None:
        self._coefficients = (constant_s, per_token_s, per_token_squared_s)
        self._chunk_tokens = chunk_tokens

    def seconds(self, new_tokens: int, cached_tokens: int) -> float:
        constant, per_token, per_token_squared = self._coefficients
        num_chunks = -(-new_tokens // self._chunk_tokens)
        return num_chunks * constant + new_tokens * (per_token + per_token_squared * new_tokens / max(1, num_chunks))

    def observe(self, new_tokens: int, cached_tokens: int, seconds: float, *, weight: float = 1.0) -> None:
        """Declared is declared."""


class LearntStep:
    """A constant, a cost per running sequence, and one per KV block that is read."""

    def __init__(self) -> None:
        self._fit = RelativeFit(PRIOR_STEP)

    def seconds(self, running: float, used_blocks: float, total_blocks: float) -> float:
        constant, per_sequence, per_block = self._fit.coefficients
        return constant + per_sequence * running + per_block * used_blocks

    def observe(self, running: float, used_blocks: float, total_blocks: float, seconds: float) -> None:
        self._fit.observe((1.0, running, used_blocks), seconds)


class DeclaredStep:
    """A quadratic of the share of the pool that is in use."""

    def __init__(self, *, constant_s: float, per_share_s: float, per_share_squared_s: float) -> None:
        self._coefficients = (constant_s, per_share_s, per_share_squared_s)

    def seconds(self, running: float, used_blocks: float, total_blocks: float) -> float:
        constant, per_share, per_share_squared = self._coefficients
        share = min(1.0, used_blocks / total_blocks)
        return constant + share * (per_share + per_share_squared * share)

    def observe(self, running: float, used_blocks: float, total_blocks: float, seconds: float) -> None:
        """Declared is declared."""


class Slowness:
    """For each row of a table one factor over a shape. `factor` is what the policy reads; drift() lets time pass."""

    def __init__(self) -> None:
        self.factor: Floats = np.zeros(0)
        self._log: Floats = np.zeros(0)
        self._observed_s: Floats = np.full(0, -np.inf)  # -inf: never
        self._surprises: list[int] = []  # in a row; negative: towards faster
        self._noise = 0.0  # mean square of what an observation differs by from the factor so far, over the fleet
        self.median_log = 0.0

    def resize(self, factor: Floats) -> None:
        """More rows; from now on `factor` is where the factors are kept, and it has those of the old rows."""
        more = len(factor) - len(self.factor)
        self.factor = factor
        self._log = np.concatenate([self._log, np.zeros(more)])
        self._observed_s = np.concatenate([self._observed_s, np.full(more, -np.inf)])
        self._surprises.extend([0] * more)

    def reset(self, row: int) -> None:
        """A new worker: it starts where the fleet is."""
        self._observed_s[row] = -np.inf  # which makes its estimate the median
        self._surprises[row] = 0
        self.factor[row] = math.exp(self.median_log)

    def relative(self, row: int) -> float:
        """The factor of one worker over the fleet's."""
        return float(self.factor[row]) / math.exp(self.median_log)

    def observe(self, row: int, ratio: float, now_s: float, *, at_most: float = 1.0) -> None:
        """Takes observed seconds over the shape's; > 0.

        at_most   the shape's seconds with all that may have been done at the same time, over those without; >= 1
        """
        log = self._faded(row, now_s)
        error = math.log(ratio) - log
        if error > 0.0 and at_most > 1.0:
            # Faster than expected is always true; of slower the others explain a half, and the more they may explain the less it says.
            error = max(0.0, error - math.log(0.5 * (1.0 + min(at_most, MAX_EXPLAINED)))) / at_most
            self._set(row, log + GAIN * min(SURPRISE, error), now_s)
            return
        # Whoever is as slow as never seen before is no noise.
        self._noise += 0.02 * (min(error * error, SURPRISE * SURPRISE) - self._noise)
        if abs(error) <= SURPRISE:
            self._surprises[row] = 0
            log += GAIN * error
        else:
            sign, before = (1 if error > 0.0 else -1), self._surprises[row]
            count = self._surprises[row] = max(-8, min(8, before + sign if before * sign >= 0 else sign))
            step = SURPRISE * 2.0 ** (abs(count) - 1)
            log += 0.5 * max(-step, min(step, error))
        self._set(row, log, now_s)

    def _set(self, row: int, log: float, now_s: float) -> None:
        log = max(-MAX_LOG_FACTOR, min(MAX_LOG_FACTOR, log))
        self._log[row], self._observed_s[row] = log, now_s
        deviation = log - self.median_log
        self.factor[row] = math.exp(self.median_log + deviation * float(self._believed(np.float64(deviation * deviation))))

    def drift(self, now_s: float) -> None:
        """Moves all factors towards the fleet's median as far as they have not been observed lately."""
        known = self._observed_s > -np.inf
        if known.any():
            self.median_log = float(np.median(self._log[known]))
        fade = np.exp2((self._observed_s - now_s) * (1.0 / HALF_LIFE_S))
        deviation = self._log - self.median_log
        np.exp(self.median_log + deviation * self._believed(deviation * deviation) * fade, out=self.factor)

    def _believed(self, squares: npt.NDArray[np.float64] | np.float64) -> npt.NDArray[np.float64] | np.float64:
        """The share of deviations from the median, given by their squares, that noise does not explain.

        Source: the positive-part estimator of James and Stein 1961, with the variance that moving by GAIN leaves of an observation's.
        """
        variance = self._noise * GAIN / (2.0 - GAIN)
        return np.maximum(0.0, 1.0 - variance / np.maximum(squares, 1e-12))

    def _faded(self, row: int, now_s: float) -> float:
        age_s = now_s - float(self._observed_s[row])
        return self.median_log + (float(self._log[row]) - self.median_log) * math.exp2(-age_s / HALF_LIFE_S)


class CostModel:
    """What all workers of a fleet have in common.

    wire_s_per_block                     on a link of slowness 1
    remote_overhead_s, local_overhead_s  of a first token: what waiting, computing and moving blocks do not explain (calls, wake-ups),
                                         when a prefill worker computes the prompt, and when decode does so itself
    learns                               False: factors stay 1, what was declared is the truth
    """

    def __init__(self, *, prefill: PrefillShape, step: StepShape, wire_s_per_block: float, overhead_s: float, learns: bool) -> None:
        self.prefill = prefill
        self.step = step
        self.wire_s_per_block = wire_s_per_block
        self.remote_overhead_s = self.local_overhead_s = overhead_s
        self.learns = learns
        self.mean_output_tokens = PRIOR_OUTPUT_TOKENS
        # Recent prompts, fading: what a reported backlog costs per token depends on how long its prompts are.
        self._recent_s = prefill.seconds(1024, 0)
        self._recent_tokens = 1024.0

    @classmethod
    def learnt(cls, *, block_bytes: int) -> "CostModel":
        """Starts from priors; scale and proportions come from the fleet."""
        wire_s = block_bytes / PRIOR_BYTES_PER_S
        return cls(prefill=LearntPrefill(), step=LearntStep(), wire_s_per_block=wire_s, overhead_s=PRIOR_OVERHEAD_S, learns=True)

    @classmethod
    def declared(cls, *, prefill: PrefillShape, step: StepShape, wire_s_per_block: float = 0.0, overhead_s: float = 0.0) -> "CostModel":
        """Costs that somebody else has measured, or made up."""
        return cls(prefill=prefill, step=step, wire_s_per_block=wire_s_per_block, overhead_s=overhead_s, learns=False)

    @property
    def token_s(self) -> float:
        """Seconds per prompt token, over recent prompts."""
        return self._recent_s / self._recent_tokens

    def note_prompt(self, new_tokens: int, seconds: float) -> None:
        """A prompt that was sent somewhere, and the shape's seconds for it."""
        self._recent_s += 0.02 * (seconds - self._recent_s)
        self._recent_tokens += 0.02 * (new_tokens - self._recent_tokens)

    def note_overhead(self, seconds: float, *, is_local: bool) -> None:
        """Of one first token. Each moves the estimate by a tenth at most: a stall is no more telling than any other."""
        if not self.learns or not math.isfinite(seconds):
            return
        before = self.local_overhead_s if is_local else self.remote_overhead_s
        step = 0.1 * before + 1e-5
        after = max(0.0, before + max(-step, min(step, 0.2 * (seconds - before))))
        if is_local:
            self.local_overhead_s = after
        else:
            self.remote_overhead_s = after

    def note_output(self, output_tokens: int) -> None:
        """A choice that has ended by itself."""
        self.mean_output_tokens += 0.02 * (output_tokens - self.mean_output_tokens)


class WorkerCosts:
    """The factors of one table of workers. Observations that cannot be (not finite, not positive) are left out."""

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self.prefill = Slowness()
        self.step = Slowness()
        self.wire = Slowness()
        self._all = (self.prefill, self.step, self.wire)

    def resize(self, *, prefill: Floats, step: Floats, wire: Floats) -> None:
        """More rows; the factors are kept in these columns."""
        self.prefill.resize(prefill)
        self.step.resize(step)
        self.wire.resize(wire)

    def reset(self, row: int) -> None:
        for slowness in self._all:
            slowness.reset(row)

    def drift(self, now_s: float) -> None:
        """Lets what has not been observed lately go back to what is usual."""
        if self._model.learns:
            for slowness in self._all:
                slowness.drift(now_s)

    def observe_prefill(
        self, row: int, *, new_tokens: int, cached_tokens: int, seconds: float, now_s: float, beside_s: float = 0.0
    ) -> None:
        """A prompt was computed, its time in the queue not counted.

        beside_s   predicted for the prompts of which parts may have been computed in the same steps: a step ends for all at once
        """
        if not self._model.learns or new_tokens <= 0 or cached_tokens < 0 or not _is_duration(seconds):
            return
        shape = self._model.prefill
        # The shape is the typical worker's: a slow worker's seconds are brought to its scale first.
        alone_s = shape.seconds(new_tokens, cached_tokens) * self.prefill.factor.item(row)
        at_most = 1.0 + beside_s / alone_s if alone_s > 0.0 else 1.0
        shape.observe(new_tokens, cached_tokens, seconds / self.prefill.relative(row), weight=1.0 / at_most)
        expected_s = shape.seconds(new_tokens, cached_tokens)
        if expected_s > 0.0:  # a fit may have lost all terms that this work has
            self.prefill.observe(row, seconds / expected_s, now_s, at_most=at_most)

    def observe_steps(self, row: int, *, running: float, used_blocks: float, total_blocks: float, seconds: float, now_s: float) -> None:
        """Decode steps of about `running` sequences took `seconds` each."""
        if not self._model.learns or running <= 0 or used_blocks < 0 or total_blocks <= 0 or not _is_duration(seconds):
            return
        shape = self._model.step
        shape.observe(running, used_blocks, total_blocks, seconds / self.step.relative(row))
        expected_s = shape.seconds(running, used_blocks, total_blocks)
        if expected_s > 0.0:
            self.step.observe(row, seconds / expected_s, now_s)

    def observe_transfer(self, row: int, *, num_blocks: int, seconds: float, tail_s: float, now_s: float) -> None:
        """Blocks came in over `seconds`, the last `tail_s` of them after the prompt had been computed."""
        expected_s = num_blocks * self._model.wire_s_per_block
        if not self._model.learns or expected_s <= 0.0 or not (_is_duration(seconds) and 0.0 <= tail_s < math.inf):
            return
        # While a prompt is computed its blocks wait for it, not for the wire: slower than expected means something only when the
        # transfer went on afterwards. Faster than expected is always true.
        if seconds < expected_s * self.wire.factor.item(row) or tail_s >= 0.5 * seconds:
            self.wire.observe(row, seconds / expected_s, now_s)


def _is_duration(seconds: float) -> bool:
    """Whether work may take so long; false for NaN too."""
    return 1e-7 <= seconds <= 1e6
