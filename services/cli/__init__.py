"""`baton`, the command line."""

import os

# gRPC's core reads this when it is first imported; without it, it writes lines of its own between ours.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
