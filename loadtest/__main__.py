"""`python -m loadtest`: the measuring commands."""

from loadtest.app import app

app()
