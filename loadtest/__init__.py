"""What Baton is measured with; `python -m loadtest --help`."""

import services as services  # before gRPC, which reads what is set there
