"""The command line: one command per verb. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from typing import Any


def commands() -> Any:
    """The command line with every command registered."""
    from .app import app

    importlib.import_module(".merging", __name__)
    importlib.import_module(".grouping", __name__)
    importlib.import_module(".library", __name__)
    importlib.import_module(".routing", __name__)
    return app


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 it could not be done, 2 the command or its settings are wrong."""
    from polytask.core.errors import ConfigError, PolytaskError

    from .streams import flush

    # torch's threads wait by spinning; where another program holds a core, that makes every step several times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    debug = os.environ.get("POLYTASK_DEBUG", "") not in ("", "0")
    try:
        code = commands()(standalone_mode=False)
        flush()
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        _fail("interrupted", 1)
    except BrokenPipeError:
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
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
            _fail(f"out of memory ({text or type(error).__name__}); lower --batch-size, or choose a smaller base", 1)
        _fail(f"{type(error).__name__}: {text} (not expected; POLYTASK_DEBUG=1 shows where)", 1)


def _fail(text: str, code: int) -> None:
    if sys.stderr is not None:
        with suppress(OSError):  # nobody reads it: the code has to do
            print(f"polytask: {text}", file=sys.stderr)
    sys.exit(code)
