"""The commands themselves: each explains itself."""

import pytest
from typer.testing import CliRunner

from loadtest.app import app


@pytest.mark.parametrize("command", ["run", "sim", "report", "convert", "micro"])
def test_help_of_every_command_is_shown(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert command in result.output
