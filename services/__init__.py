"""Baton's services and the libraries they share; see README.md for the map."""

import os

# The thread that waits for grpc.aio's events does the I/O itself, where gRPC's event engine would wake another one for each: a round trip
# takes 10 to 30 % less. Here, because it must be set before gRPC is imported: this package is the first that a process of ours imports.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
