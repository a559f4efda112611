"""The one door for traces and metrics: today the W3C trace context, which a client sends and every process of a request passes on."""

from collections.abc import Mapping, Sequence

TRACE_FIELDS = ("traceparent", "tracestate")
MAX_FIELD_CHARACTERS = 512


def trace_context(metadata: Sequence[tuple[str, str | bytes]] | None) -> Mapping[str, str]:
    """The trace fields of a call's metadata; what is too long is left out."""
    return {
        name: value
        for name, value in metadata or ()
        if name in TRACE_FIELDS and isinstance(value, str) and len(value) <= MAX_FIELD_CHARACTERS
    }
