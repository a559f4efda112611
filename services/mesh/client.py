"""Channels to other services. One channel for each address; calls carry a deadline of their own, given where they are made."""

import grpc

MAX_PORT = 65535
MAX_MESSAGE_BYTES = 64 << 20

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # A worker that restarts is there again in a second; waiting longer would only lose time.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Retrying is decided where the caller knows what it means, not in the library.
    ("grpc.enable_retries", 0),
    # Two channels to one address must not share a connection: one with a stalled stream would hold up the other.
    ("grpc.use_local_subchannel_pool", 1),
]


def is_address(text: str, *, lowest_port: int = 1) -> bool:
    """Whether `text` is host:port. The libraries below take a port beyond the last one modulo 65536: somebody else's."""
    host, _, port = text.rpartition(":")
    # Length first: Python refuses to read thousands of digits.
    return bool(host) and port.isascii() and port.isdigit() and len(port) <= 5 and lowest_port <= int(port) <= MAX_PORT


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port, to be closed by the caller. Connects when it is first used."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)
