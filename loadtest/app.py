"""The commands of `python -m loadtest`."""

import typer

from loadtest.convert import convert
from loadtest.micro.app import app as micro
from loadtest.report.app import report
from loadtest.run.app import run
from loadtest.sim.app import sim

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(micro, name="micro", help="Small benchmarks, each beside a reference measured in the same run.")
app.command()(sim)
app.command()(run)
app.command()(report)
app.command()(convert)


@app.callback()
def loadtest() -> None:
    """Measures Baton."""
