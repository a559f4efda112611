"""`python -m services.cli` is `baton`."""

from services.cli.app import main

main()
