"""The commands of `baton` and how their errors and interrupts end: one line on stderr, an exit status, never a traceback.

0 done, 1 failed, 2 wrong usage or input, 130 interrupted. Each command has a file of its own.
"""

import os
import sys

import typer

from services.cli.bench import bench
from services.cli.demo import demo
from services.cli.generate import generate
from services.cli.top import top
from services.cli.up import up
from services.core.errors import BatonError, ConfigurationError, InvalidRequest, ResourceExhausted, Unavailable

app = typer.Typer(name="baton", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (up, generate, top, demo):
    app.command()(command)
app.add_typer(bench)


@app.callback()
def baton() -> None:
    """Serves large language models with prefill and decode on separate workers."""


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except (InvalidRequest, ConfigurationError) as error:
        _fail(error, status=2)
    except BatonError as error:
        _fail(error, status=1)
    except UnicodeEncodeError:
        print("error: the prompt or an option is not valid UTF-8", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe has left (`| head`); what is still buffered for it must not be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(error: BatonError, *, status: int) -> None:
    retry = f"; try again in {error.retry_after_s:.3g} s" if isinstance(error, ResourceExhausted | Unavailable) else ""
    print(f"error: {error.message}{retry}", file=sys.stderr)
    sys.exit(status)
