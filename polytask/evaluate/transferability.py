"""Which task helps which: what a task's score gains when its adapter starts from another task's."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from polytask.core.errors import ConfigError
from polytask.core.storage import write_together, writing

NAME = "transferability"


@dataclass
class Transferability:
    """What `polytask.transferability` measured, as plain values. Sources are rows, targets are columns.

    Attributes:
        names: the n tasks.
        metrics: of each, with the best of what it can be: ``name`` and ``higher_is_better``.
        alone: the score of each task's own adapter, [n].
        scores: of column j's task, learned from the adapter of row i's, [n][n]; None on the diagonal.
        settings: how it was done.
    """

    names: list[str]
    metrics: list[dict[str, Any]]
    alone: list[float]
    scores: list[list[float | None]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def gains(self) -> list[list[float | None]]:
        """What the start is worth, [n][n]: the difference to ``alone``, positive where the start helps."""
        sign = [1.0 if metric["higher_is_better"] else -1.0 for metric in self.metrics]
        return [
            [None if score is None else sign[j] * (score - self.alone[j]) for j, score in enumerate(row)]
            for row in self.scores
        ]

    def best(self) -> dict[str, str | None]:
        """For each task the source that it gains most from; None where none helps."""
        found: dict[str, str | None] = {}
        for j, name in enumerate(self.names):
            column = [(row[j] or 0.0, self.names[i]) for i, row in enumerate(self.gains) if row[j] is not None]
            gain, source = max(column, key=lambda pair: pair[0])
            found[name] = source if gain > 0 else None
        return found

    def groups(self, count: int | None = None) -> dict[str, list[str]]:
        """Tasks that help each other, by average linkage of the mean gain in both directions.

        Args:
            count: of groups; when None they are joined as long as that is a gain on average.

        Returns:
            Group to its tasks, as `polytask.groupwise` takes them.

        Raises:
            ConfigError: a count that is not between 1 and the number of tasks.
        """
        import numpy as np
        from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]

        n = len(self.names)
        if count is not None and not 1 <= count <= n:
            raise ConfigError(f"there can be 1 to {n} groups of {n} tasks, got {count}")
        gains = np.array([[0.0 if value is None else value for value in row] for row in self.gains])
        mutual = (gains + gains.T) / 2
        upper = mutual[np.triu_indices(n, 1)]
        most = max(0.0, float(upper.max()))  # distances are not negative: that of no gain is the largest gain
        tree = linkage(most - upper, method="average")
        labels = (
            fcluster(tree, np.nextafter(most, -1), "distance") if count is None else fcluster(tree, count, "maxclust")
        )
        found: dict[int, list[str]] = {}
        for name, label in zip(self.names, labels.tolist(), strict=True):
            found.setdefault(label, []).append(name)
        return {f"group-{i + 1}": own for i, own in enumerate(found.values())}

    def as_dict(self) -> dict[str, Any]:
        """All of it and the gains, JSON-able."""
        return {**vars(self), "gains": self.gains}

    def to_csv(self) -> str:
        """The gains as CSV: a row for each source, a column for each target; empty on the diagonal."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["gain of the column from the row", *self.names])
        for name, row in zip(self.names, self.gains, strict=True):
            rows.writerow([name, *("" if value is None else value for value in row)])
        return text.getvalue()

    def save(self, folder: str | Path) -> Path:
        """Writes ``transferability.json``, ``transferability.csv`` and ``groups.yaml``. Raises `StorageError`."""
        target = Path(folder).expanduser()
        files = {
            f"{NAME}.csv": self.to_csv(),
            "groups.yaml": yaml.safe_dump(self.groups(), allow_unicode=True, sort_keys=False),
            f"{NAME}.json": json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n",
        }
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            write_together(target, {name: text.encode() for name, text in files.items()})
        return target

    def __str__(self) -> str:
        head = ["from \\ to", *self.names]
        lines = [head, ["(alone)", *(f"{value:.3f}" for value in self.alone)]]
        for name, row in zip(self.names, self.gains, strict=True):
            lines.append([name, *("-" if value is None else f"{value:+.3f}" for value in row)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
