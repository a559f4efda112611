"""The commands of `python -m loadtest`."""

import typer

from loadtest.micro.app import app as micro
from loadtest.report.app import report
from loadtest.sim.app import sim

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(micro, name="micro", help="Small benchmarks, each beside a reference measured in the same run.")
app.command()(sim)
app.command()(report)


@app.callback()
def loadtest() -> None:
    """Measures Baton."""
