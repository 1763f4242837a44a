"""The exception tree. Every message says what was wrong, where, what is allowed, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PolytaskError(Exception):
    """Base of every error that polytask raises on purpose."""


class ConfigError(PolytaskError):
    """A setting, flag or YAML key that is unknown or out of range."""


class DataError(PolytaskError):
    """A task's file or row that cannot be used. The message names file and line where there is one."""


class ModelError(PolytaskError):
    """A base model that cannot be found, read or used for what was asked."""


class SiteError(PolytaskError):
    """A selector that matches nothing, or a site that a form or a mix cannot act on."""


class AdapterError(PolytaskError):
    """An adapter that does not fit: another base, another shape, a damaged file, an unknown form."""


class MixError(PolytaskError):
    """Weights over adapters that cannot be applied: an unknown name, a wrong number of rows."""


class MergeError(PolytaskError):
    """Models or adapters that cannot be merged: other names or shapes, a damaged file, a missing base."""


class LearnError(PolytaskError):
    """Training that had to stop: a NaN loss, or not enough memory."""


class MemoryLimitError(LearnError):
    """A batch that does not fit into memory, in learning or in evaluation."""


class LibraryError(PolytaskError):
    """A library of adapters that cannot do what was asked: a name that is taken, unknown or not allowed, a damaged file."""


class StorageError(PolytaskError):
    """A file or folder that cannot be written or read: no space, no permission."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint for a misspelt name: `` (did you mean 'rank'?)``, or the empty string when nothing is close."""
    close = get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listing(names: Iterable[str], most: int = 20) -> str:
    """``a, b, c, ... (+12 more)``: a list short enough for a message."""
    all_names = list(names)
    tail = f", ... (+{len(all_names) - most} more)" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + tail
