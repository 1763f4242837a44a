"""The picture of what tasks gain from each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .pictures import MUTED, SMALL, TEXT, WIDTH, _style, fit, png, width
from .vectors import _cells, _tone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTENT = Mapping[str, Any]
WORDS = "What a column's score gains from starting at a row's adapter; blue where that helps."


def picture(found: CONTENT) -> bytes:
    """A PNG of what `polytask transferability` writes as ``transferability.json``."""
    return png(figure(found))


def figure(found: CONTENT) -> Figure:
    """The same as a figure of matplotlib's: sources are rows, targets columns; the row below has the scores without a start."""
    from matplotlib.figure import Figure

    names, gains = found["names"], found["gains"]
    labels, heads = [fit(name, 2.3) for name in names], [fit(name, 1.6) for name in names]
    left = max(width(text) for text in [*labels, "alone"]) + 0.24
    over = max(map(width, heads)) * 0.72
    cell = min(0.8, max(0.55, (WIDTH - left - over) / len(names)))
    high, below, above = 0.34, 0.75, over + 0.75
    whole = max(left + cell * len(names) + over, width(WORDS, SMALL) + 0.3)
    height = below + high * len(names) + above
    largest = max(0.05, *(abs(value) for row in gains for value in row if value is not None))
    grid = (left / whole, below / height, cell * len(names) / whole, high * len(names) / height)
    with _style():
        made = Figure(figsize=(whole, height))
        axes = made.add_axes(grid)
        tones = [[_tone(0.0 if v is None else v, largest) for v in row] for row in gains]
        _cells(axes, tones, [["" if v is None else f"{v:+.3f}" for v in row] for row in gains], cell)
        for place, label in enumerate(labels):
            put: dict[str, Any] = {"textcoords": "offset points"}
            axes.annotate(label, (0, place + 0.5), (-8, 0), ha="right", va="center", **put)
            axes.annotate(heads[place], (place + 0.4, 0), (0, 6), rotation=46, rotation_mode="anchor", **put)
            axes.annotate(
                f"{found['alone'][place]:.3f}", (place + 0.5, len(names)), (0, -5), ha="center", va="top",
                fontsize=SMALL, color=MUTED, **put,
            )  # fmt: skip
        axes.annotate("alone", (0, len(names)), (-8, -5), ha="right", va="top", fontsize=SMALL, color=MUTED, **put)
        title = fit(f"Transfer between {len(names)} tasks on {found['settings']['base']}", whole - 0.3, TEXT + 1)
        made.text(0.15 / whole, 1 - 0.28 / height, title, fontsize=TEXT + 1, fontweight="semibold")
        made.text(0.15 / whole, 0.12 / height, WORDS, fontsize=SMALL, color=MUTED)
    return made
