"""What Baton is measured with; `python -m loadtest --help`."""
