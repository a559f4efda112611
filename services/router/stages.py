"""Where a request's time goes in this router, over all its attempts: marks on its way, and the stages that lie between two of them.

    received ─ tokenized ─ routing ─ sent ──▶ decode, prefill ──▶ first token ─ shown … last token ─ responded
                             ▲                     │ failed                         │ failed
                             └──── retry_s ────────┘        decode_retry_s ◀────────┘

A handful of marks for each attempt and nothing for a token. What the workers measure comes with the first token, in Prefilled; what each
stage means is said at RequestTiming.
"""

import time

from protos.baton.v1 import decode_pb2, inference_pb2
from services.core.clock import unix_s

# Stages that decode and prefill measure, by the same name in Prefilled and RequestTiming.
_ELSEWHERE = (
    "to_decode_s",
    "decode_queue_s",
    "prefill_retry_s",
    "to_prefill_s",
    "prefill_queue_s",
    "prefill_s",
    "transfer_tail_s",
    "prefill_return_s",
)


class Stages:
    """Of one request, on time.perf_counter()."""

    def __init__(self, *, received_at: float, tokenize_s: float) -> None:
        self._received_at = received_at
        self._received_unix_s = unix_s(received_at)
        self._tokenize_s = tokenize_s
        self._first_routing_at: float | None = None
        self._routing_at = self._sent_at = 0.0  # of the latest attempt; of the one that brought the first token, once it has
        self._decoding_at: float | None = None  # since when tokens come; None while none do
        self._failed_at = 0.0  # the latest attempt that had brought tokens
        self._decode_s = self._decode_retry_s = self._first_token_return_s = 0.0
        self._shown_at = self._last_token_at = 0.0
        self._first_token_at: float | None = None

    def routing(self) -> None:
        """A route is about to be chosen."""
        if self._first_token_at is None:
            self._routing_at = time.perf_counter()
            if self._first_routing_at is None:
                self._first_routing_at = self._routing_at

    def sent(self) -> float:
        """The request is about to be handed over to be sent to decode; returns the stamp for it."""
        now = time.perf_counter()
        if self._first_token_at is None:
            self._sent_at = now
        return unix_s(now)

    def token(self, prefilled: decode_pb2.Prefilled) -> None:
        """An attempt has brought its first token."""
        now = self._decoding_at = time.perf_counter()
        if self._first_token_at is None:
            self._first_token_at = now
            self._first_token_return_s = unix_s(now) - prefilled.first_token_unix_s
        else:
            self._decode_retry_s += now - self._failed_at

    def shown(self) -> None:
        """Tokens are about to be handed to the client."""
        if not self._shown_at:
            self._shown_at = time.perf_counter()

    def failed(self) -> None:
        """An attempt has."""
        if self._decoding_at is not None:
            self._failed_at = self._end_decoding()

    def finished(self) -> None:
        """The last token has come."""
        self._last_token_at = self._end_decoding()

    def fill(self, timing: inference_pb2.RequestTiming, prefilled: decode_pb2.Prefilled) -> None:
        """Sets the stages and stamps of a request that is about to be answered; `prefilled` came with its first token."""
        now = time.perf_counter()
        assert self._first_routing_at is not None and self._first_token_at is not None
        for name in _ELSEWHERE:
            setattr(timing, name, getattr(prefilled, name))
        timing.tokenize_s = self._tokenize_s
        timing.admission_s = self._first_routing_at - self._received_at - self._tokenize_s
        timing.retry_s = self._routing_at - self._first_routing_at
        timing.route_s = self._sent_at - self._routing_at
        timing.first_token_return_s = self._first_token_return_s
        timing.first_response_s = self._shown_at - self._first_token_at
        timing.decode_s = self._decode_s
        timing.decode_retry_s = self._decode_retry_s
        timing.finish_s = now - self._last_token_at
        timing.route_to_first_token_s = self._first_token_at - self._sent_at
        timing.ttft_s = self._shown_at - self._received_at
        timing.total_s = now - self._received_at
        timing.received_unix_s = self._received_unix_s
        timing.first_token_unix_s = unix_s(self._shown_at)
        timing.responded_unix_s = unix_s(now)

    def _end_decoding(self) -> float:
        assert self._decoding_at is not None
        now = time.perf_counter()
        self._decode_s += now - self._decoding_at
        self._decoding_at = None
        return now
