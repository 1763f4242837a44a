"""The picture of grafts: how good for how few weights, and which weights two skills share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .merge import _colour, _names, _plain, _room
from .pictures import INK, MUTED, SMALL, TEXT, _style, fit, png, width
from .vectors import _cells, _warm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTENT = Mapping[str, Any]
WORDS = "Share of a row's weights that a column has too."


def picture(grafts: CONTENT) -> bytes:
    """A PNG of what `polytask merge --method graft` writes as ``graft.json``."""
    return png(figure(grafts))


def figure(grafts: CONTENT) -> Figure:
    """The same as a figure of matplotlib's."""
    from matplotlib.figure import Figure

    names = [fit(entry["name"], 1.6, SMALL) for entry in grafts["models"]]
    label = max(width(name, SMALL) for name in names)
    curve, side = 4.6, label + 0.3
    cell = max(0.42, min(0.8, 3.2 / len(names)))
    table = max(side + cell * len(names) + label * 0.72, width(WORDS, SMALL) + 0.2) if len(names) > 1 else 0.0
    wide, height = 0.8 + curve + side + 0.4 + table, max(3.6, 1.5 + 0.36 * len(names) + label)
    with _style():
        made = Figure(figsize=(wide, height))
        axes = made.add_axes((0.8 / wide, 0.75 / height, curve / wide, (height - 1.35) / height))
        _curves(axes, grafts, names, (height - 1.35) * 72, side)
        title = f"{len(names)} skill{'s' * (len(names) > 1)} in {grafts['base']}, of {grafts['weights']:,} weights"
        words = fit(title, wide - 1, TEXT + 1)
        made.text(0.8 / wide, 1 - 0.28 / height, words, fontsize=TEXT + 1, fontweight="semibold")
        made.text(
            0.8 / wide, 0.1 / height, "Dashed: the tuned model. Ring: what is saved.", fontsize=SMALL, color=MUTED
        )
        if len(names) > 1:
            left, high = 0.8 + curve + side + 0.4 + side, 0.36 * len(names)
            top = height - 0.75 - label * 0.72
            axes = made.add_axes((left / wide, (top - high) / height, cell * len(names) / wide, high / height))
            _shared(axes, grafts["overlap"], names, cell)
            made.text((left - side) / wide, (top - high - 0.25) / height, WORDS, fontsize=SMALL, color=MUTED)
    return made


def _shared(axes: Axes, shares: Sequence[Sequence[float]], names: Sequence[str], cell: float) -> None:
    """How much of each skill's weights (rows) each other's (columns) has."""
    _cells(axes, [[_warm(v) for v in row] for row in shares], [[f"{v:.2f}" for v in row] for row in shares], cell)
    small: dict[str, Any] = {"textcoords": "offset points", "fontsize": SMALL}
    for place, name in enumerate(names):
        axes.annotate(name, (0, place + 0.5), (-6, 0), ha="right", va="center", **small)
        axes.annotate(name, (place + 0.4, 0), (0, 5), rotation=46, rotation_mode="anchor", **small)


def _curves(axes: Axes, grafts: CONTENT, names: list[str], points: float, room: float) -> None:
    """Score over the number of weights, a line per model."""
    _plain(axes, "y")
    axes.set_xscale("log")
    ends, heights = [], []
    for turn, (entry, name) in enumerate(zip(grafts["models"], names, strict=True)):
        there = [point for point in entry["points"] if point["entries"]]
        xs, ys = [point["entries"] for point in there], [point["score"] for point in there]
        colour = _colour(turn)
        axes.axhline(entry["tuned"]["score"], color=colour, linewidth=0.9, linestyle=(0, (3, 2.5)), zorder=1.5)
        axes.plot(xs, ys, "o-", color=colour, linewidth=1.6, markersize=4, zorder=3)
        kept = [point for point in there if point["sparsity"] == entry["kept"]]
        axes.plot(
            [p["entries"] for p in kept], [p["score"] for p in kept], "o", markersize=10, markerfacecolor="none",
            color=INK, zorder=4,
        )  # fmt: skip
        heights += [*ys, entry["tuned"]["score"]]
        ends += [(ys[-1], name, colour)] if ys else []
    _room(axes, heights, "y")
    _decades(axes, [point["entries"] for entry in grafts["models"] for point in entry["points"] if point["entries"]])
    metrics = dict.fromkeys(entry["metric"] for entry in grafts["models"])
    axes.set_ylabel(", ".join(metrics), fontsize=SMALL + 1)
    axes.set_xlabel("weights that differ from the base", fontsize=SMALL + 1)
    _names(axes, ends, points, room)


def _decades(axes: Axes, entries: list[int]) -> None:
    """Marks powers of ten along a logarithmic axis; the numbers themselves where none lies among them."""
    from matplotlib.ticker import NullLocator

    low, high = min(entries, default=1) / 1.6, max(entries, default=1) * 1.6
    powers = [10**d for d in range(math.floor(math.log10(high)) + 1) if low <= 10**d <= high]
    marks = powers or sorted(set(entries))
    axes.set_xlim(low, high)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(marks, [f"{mark:,}" for mark in marks])
