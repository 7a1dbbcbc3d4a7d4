"""The command `tilewise`: what happens around its sub-commands, which live in `commands.py` and need typer."""

from __future__ import annotations

import sys
from typing import NoReturn

from tilewise.errors import UserError


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    try:
        import typer

        from tilewise.commands import app
    except ModuleNotFoundError as missing:
        if missing.name != "typer":
            raise
        _stop('the command needs typer: pip install "tilewise[compare]"', 2)
    try:
        code = app(arguments, prog_name="tilewise", standalone_mode=False)
    except UserError as error:
        _stop(str(error), 2)
    except typer.TyperException as error:
        _stop(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        _stop("interrupted", 130)
    sys.exit(code or 0)


def _stop(message: str, code: int) -> NoReturn:
    if message:  # none after the help that a bare `tilewise` prints
        print("tilewise: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
