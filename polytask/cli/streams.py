"""Standard output that may be a pipe whose reader has gone, a file on a full disk, or closed."""

from __future__ import annotations

import os
import sys

from polytask.core.errors import StorageError


def first() -> bool:
    """Whether this is the only process, or the first of several that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def emit(text: str) -> None:
    """Prints a command's result, in the first of several processes.

    Raises `StorageError` when it cannot be written, BrokenPipeError when nobody reads.
    """
    if first():
        flush(text + "\n")


def flush(text: str = "") -> None:
    """Writes out what was printed, and ``text``, while an error can still be told."""
    if sys.stdout is None:  # the program was started with its output closed
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence()
        raise
    except OSError as error:
        silence()
        raise StorageError(f"the output cannot be written: {error.strerror or error}") from error


def silence() -> None:
    """Lets what is still unwritten lead to nothing, or the interpreter would try again when it ends, and complain."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
