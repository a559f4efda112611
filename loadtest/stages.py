"""Where the time of one request went, from the client's send to its receipt: the mesh's own record and the client's two ends of it.

    client ─▶ router ─▶ decode ─▶ prefill ─▶ decode ─▶ router ─┬─ first response ──▶ client          TTFT
                                                               └─ decode … finish ─▶ client          E2E

Every stage is measured, none is what the others leave: residual_s() tells how far they are from the client's own clock, and a run whose
residuals are beyond tolerance_s() has a hole. Definitions and clocks: RequestTiming in protos/baton/v1/inference.proto, whose fields have
these names and end in _s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from loadtest.files import BadInput
from protos.baton.v1 import inference_pb2

TOLERANCE_SHARE, TOLERANCE_S = 0.01, 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """in_ttft, in_e2e: whether it is a part of the time to the first token, and of the time to the last response."""

    name: str
    meaning: str
    in_ttft: bool = True
    in_e2e: bool = True


STAGES = (
    Stage(name="send_lag", meaning="client: sent later than the schedule wanted"),
    Stage(name="request_hop", meaning="client → router: sent by the client, to the router's handler begins"),
    Stage(name="tokenize", meaning="router: text, chat or ids become checked token ids"),
    Stage(name="admission", meaning="router: checked, counted, given a place"),
    Stage(name="retry", meaning="router: lost on decode workers that failed before a first token"),
    Stage(name="route", meaning="router: prefix hashes, matches, the choice of workers"),
    Stage(name="to_decode", meaning="router → decode: to the engine's queue"),
    Stage(name="decode_queue", meaning="decode: waits for a place and KV blocks"),
    Stage(name="prefill_retry", meaning="decode: lost on prefill workers that failed"),
    Stage(name="to_prefill", meaning="decode → prefill: to the engine's queue; 0 when decode computes the prompt"),
    Stage(name="prefill_queue", meaning="whoever computes the prompt: waits for the engine"),
    Stage(name="prefill", meaning="whoever computes the prompt: first chunk begins, to first token sampled"),
    Stage(name="transfer_tail", meaning="KV blocks still on their way: on prefill until all are sent, on decode until all have landed"),
    Stage(name="prefill_return", meaning="prefill → decode: all sent, to heard"),
    Stage(name="first_token_return", meaning="decode → router: first token and blocks at hand, to received"),
    Stage(name="first_response", meaning="router: first token received, to handed to the client", in_e2e=False),
    Stage(name="first_response_hop", meaning="router → client: the first token", in_e2e=False),
    Stage(name="decode", meaning="router: first token received, to last token received", in_ttft=False),
    Stage(name="decode_retry", meaning="router: lost on decode workers that failed after the first token", in_ttft=False),
    Stage(name="finish", meaning="router: last token received, to last response handed to the client", in_ttft=False),
    Stage(name="response_hop", meaning="router → client: the last response", in_ttft=False),
)
TTFT_STAGES = tuple(stage.name for stage in STAGES if stage.in_ttft)
E2E_STAGES = tuple(stage.name for stage in STAGES if stage.in_e2e)


def stages_of(
    timing: inference_pb2.RequestTiming | Mapping[str, Any],
    *,
    client_sent_unix_s: float,
    client_first_unix_s: float,
    client_done_unix_s: float,
    client_lag_s: float = 0.0,
) -> dict[str, float]:
    """Seconds by stage, in the order of STAGES.

    timing         as gRPC gives it, or an entry of `baton.timings` of an answer over HTTP
    client_…_unix  the client's wall clock: request sent, first token received, last response received
    client_lag_s   how late it was sent, for who counts from the intended time
    Raises BadInput for a record that is none, or of a router that does not measure stages.
    """
    record = timing if isinstance(timing, inference_pb2.RequestTiming) else _from_json(timing)
    for stamp in ("received_unix_s", "first_token_unix_s", "responded_unix_s"):
        if not getattr(record, stamp) > 0.0:
            raise BadInput(f"timing, {stamp}: is {getattr(record, stamp)}, not above 0: the router does not measure stages")
    ends = {
        "send_lag": client_lag_s,
        "request_hop": record.received_unix_s - client_sent_unix_s,
        "first_response_hop": client_first_unix_s - record.first_token_unix_s,
        "response_hop": client_done_unix_s - record.responded_unix_s,
    }
    return {stage.name: ends[stage.name] if stage.name in ends else getattr(record, f"{stage.name}_s") for stage in STAGES}


def residual_s(stages: Mapping[str, float], names: Sequence[str], client_s: float) -> float:
    """What the stages `names` (TTFT_STAGES or E2E_STAGES) leave unexplained of the client's own time; below 0: they overlap."""
    return client_s - sum(stages[name] for name in names)


def tolerance_s(client_s: float) -> float:
    """How large a residual may be, either way, of so long a time."""
    return max(TOLERANCE_S, TOLERANCE_SHARE * client_s)


def _from_json(timing: Mapping[str, Any]) -> inference_pb2.RequestTiming:
    try:
        return ParseDict(dict(timing), inference_pb2.RequestTiming(), ignore_unknown_fields=True)
    except ParseError as error:
        raise BadInput(f"timing: {error}") from None
