"""The command line: one command per verb. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 it could not be done, 2 the command or its settings are wrong."""
    from polytask.core.errors import ConfigError, PolytaskError

    from .app import app

    debug = os.environ.get("POLYTASK_DEBUG", "") not in ("", "0")
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        _fail("interrupted", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PolytaskError as error:
        if debug:
            raise
        _fail(str(error), 2 if isinstance(error, ConfigError) else 1)
    except Exception as error:
        if hasattr(error, "show") and hasattr(
            error, "exit_code"
        ):  # what the parser of flags says, click's or typer's own
            error.show()
            sys.exit(2)
        if type(error).__name__ == "Abort":
            sys.exit(1)
        if debug:
            raise
        text = str(error).strip().split("\n")[0]
        _fail(f"{type(error).__name__}: {text} (not expected; POLYTASK_DEBUG=1 shows where)", 1)


def _fail(text: str, code: int) -> None:
    print(f"polytask: {text}", file=sys.stderr)
    sys.exit(code)
