"""The table that a comparison gives, as plain values."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polytask.core.storage import write, writing


@dataclass
class Table:
    """What `compare` found, as plain values.

    Attributes:
        rows: a score of a method on a task each: method, task, metric, value, low, high, n, note.
        methods: a method each: what it is, average, worst, trained parameters, bytes, seconds, peak memory, what it forgot.
        ranks: how a budget dealt the ranks of an adapter out, for each that has had one.
        base, tasks, cross, forgetting, settings: see ``docs/compare.md``.
    """

    base: dict[str, Any] = field(default_factory=dict)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    methods: list[dict[str, Any]] = field(default_factory=list)
    cross: dict[str, Any] = field(default_factory=dict)
    forgetting: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return dict(vars(self))

    def value(self, method: str, task: str) -> float | None:
        """The score of a method on a task."""
        return next((r["value"] for r in self.rows if (r["method"], r["task"]) == (method, task)), None)

    def to_json(self, path: str | Path) -> Path:
        """Writes the table as JSON."""
        return save_text(path, json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        names = [t["name"] for t in self.tasks]
        width = max([len("method"), *(len(m["method"]) for m in self.methods)])
        lines = [" | ".join(["method".ljust(width), *names, "average"])]
        for method in self.methods:
            values = [self.value(method["method"], name) for name in names]
            cells = [("-" if v is None else f"{v:.3f}").rjust(len(n)) for v, n in zip(values, names, strict=True)]
            mean = "-" if method["average"] is None else f"{method['average']:.3f}"
            lines.append(" | ".join([method["method"].ljust(width), *cells, mean.rjust(7)]))
        return "\n".join(lines)


def save_text(path: str | Path, text: str) -> Path:
    """Writes a text file whole or not at all."""
    file = Path(path)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, text.encode())
    return file
