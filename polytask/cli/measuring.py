"""Merges that are scored: ``polytask merge ... --evaluate tasks``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.core.errors import ConfigError

from .app import _notes, _say, _show, _writable


def evaluated(
    given: Sequence[str], methods: Sequence[Mapping[str, Any]], base: str, tasks: str, sweep: str, out: str, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Merges in every way that is asked for, scores each, and writes the best with a report.

    Args:
        given: adapters, or models.
        methods: each with its settings.
        base: of the adapters, or what the models' differences are taken to.
        tasks: what `read_tasks` takes.
        sweep: ``lambda=0.1..1.0``, or nothing.
        out: the folder.
        as_json: print the table as JSON.
        options: of `polytask.jobs.compare_merges`.
    """
    from polytask.core.task import read_tasks
    from polytask.jobs import compare_merges

    _writable(out)
    found = read_tasks(tasks)
    _notes(found)
    table = compare_merges(
        base or None, list(given), found, methods=list(methods), sweep=sweep or None, out=out, say=_say, **options
    )
    said = f"{table}\n\nbest: {table.best}, saved in {out}; report: {Path(out) / 'report.html'}"
    _show({"out": out, **table.as_dict()}, as_json, said)


def choosing(methods: Sequence[Any], tasks: str, sweep: str) -> None:
    """Raises `ConfigError` where there are several merges and nothing to choose the best by."""
    if not tasks and (len(methods) > 1 or sweep):
        what = f"--sweep {sweep}" if sweep else f"{len(methods)} methods"
        raise ConfigError(f"{what}: the best is chosen by its scores; say on which tasks with --evaluate tasks/")


def unscored(tasks: str, sweep: str, resume: bool, what: str) -> None:
    """Raises `ConfigError` for what cannot be scored as it is made."""
    if tasks or sweep:
        if what:
            raise ConfigError(
                f"--evaluate and --sweep are for inputs with --method, and not for {what}; merge it, and score the result "
                "with polytask evaluate"
            )
        if resume:
            raise ConfigError("--resume goes on with a single merge; leave it out with --evaluate")
