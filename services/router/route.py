"""What the policy is asked and what it answers. Values only; knows neither workers nor costs."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """
    prompt_tokens
    max_output_tokens   what the client allows for each choice; None: as many as the model does
    num_choices         choices share one prefill and decode side by side
    ttft_limit_s        until a first token is of no use any more: the objective's or the deadline's, whichever is nearer; None: no limit
    spread              any number that differs between requests (a counter, a hash): near-equal workers are taken in turn by it
    excluded            workers that have already failed this request
    max_local_tokens    decode workers compute at most this many prompt tokens while there is a prefill worker; None: by cost alone
    must_be_local       no prefill worker may compute the prompt
    """

    prompt_tokens: int
    max_output_tokens: int | None = None
    num_choices: int = 1
    ttft_limit_s: float | None = None
    spread: int = 0
    excluded: Collection[str] = ()
    max_local_tokens: int | None = None
    must_be_local: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes, and what is expected of it there.

    is_local                 the decode worker is expected to compute the prompt itself
    prefill_worker_ids       best first; the decode worker tries them in order. Empty: it must compute the prompt itself
    local_prefill_tokens     the decode worker computes the prompt itself when it finds no more tokens than this uncached
    *_cached_tokens          of the prompt, in full blocks, as far as the index tells; prefill_…: on each candidate, in order
    decode_blocks            KV blocks that the request is expected to own in the end
    decode_wait_s            until the decode worker has a place and blocks
    queue_s, compute_s       of the prompt, on the worker that is expected to compute it
    transfer_s               what moving the blocks adds when the prompt has been computed
    overhead_s               calls and wake-ups
    remote_ttft_s, local_ttft_s   through the best prefill worker (None: there is none), and without one
    predicted_tpot_s         of this request among the others
    predicted_output_tokens  of each choice
    """

    decode_worker_id: str
    prefill_worker_ids: tuple[str, ...]
    is_local: bool
    local_prefill_tokens: int
    prompt_tokens: int
    num_choices: int
    block_size: int
    decode_cached_tokens: int
    prefill_cached_tokens: tuple[int, ...]
    decode_blocks: int
    decode_wait_s: float
    queue_s: float
    compute_s: float
    transfer_s: float
    overhead_s: float
    remote_ttft_s: float | None
    local_ttft_s: float
    predicted_ttft_s: float
    predicted_tpot_s: float
    predicted_output_tokens: float

    @property
    def predicted_s(self) -> float:
        """From now to the last token."""
        return self.predicted_ttft_s + self.predicted_output_tokens * self.predicted_tpot_s

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that are expected to be computed."""
        return self.prompt_tokens - (self.decode_cached_tokens if self.is_local else self.prefill_cached_tokens[0])

    def explain(self) -> str:
        """Why this pair, for people: "decode-1 holds 12 of 16 blocks; prefill on prefill-0: …"."""
        total = -(-self.prompt_tokens // self.block_size)
        text = f"{self.decode_worker_id} holds {self.decode_cached_tokens // self.block_size} of {total} blocks"
        if self.decode_wait_s > 0:
            text += f" and has room in {_ms(self.decode_wait_s)}"
        parts = [f"queue {_ms(self.queue_s)}", f"{self.new_tokens} new tokens {_ms(self.compute_s)}", f"calls {_ms(self.overhead_s)}"]
        if self.is_local:
            other = "no prefill worker" if self.remote_ttft_s is None else f"remote {_ms(self.remote_ttft_s - self.decode_wait_s)}"
            return f"{text}; prefill there: {' + '.join(parts)}; {other}"
        parts.insert(2, f"transfer {_ms(self.transfer_s)}")
        local = f"local {_ms(self.local_ttft_s - self.decode_wait_s)}"
        return f"{text}; prefill on {self.prefill_worker_ids[0]}: {' + '.join(parts)}; {local}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
