"""The picture of an evolution's archives: for each task a heat map of the best quality in each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .pictures import INK, LINE, MUTED, PAINT, PAPER, SMALL, _style, fit, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL, GAP, ACROSS = 2.5, 0.95, 3  # inches, and panels beside each other
LOW, HIGH = "#e8f1f8", PAINT["m0"][0]


def picture(evolved: Mapping[str, Any]) -> bytes:
    """A PNG of what the merge method cycleqd writes as ``archives.json``."""
    return png(figure(evolved["archives"]))


def figure(archives: Sequence[Mapping[str, Any]]) -> Figure:
    """The same as a figure of matplotlib's."""
    from matplotlib.figure import Figure

    wide = min(ACROSS, len(archives))
    down = math.ceil(len(archives) / wide)
    size = (0.4 + wide * (PANEL + GAP), down * (PANEL + GAP))
    with _style():
        made = Figure(figsize=size)
        for turn, archive in enumerate(archives):
            row, column = divmod(turn, wide)
            x, y = 0.75 + column * (PANEL + GAP), size[1] - (row + 1) * (PANEL + GAP) + 0.55
            _panel(made.add_axes((x / size[0], y / size[1], PANEL / size[0], PANEL / size[1])), archive)
    return made


def best(archive: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    """The best quality over the first two axes; with one axis all cells stand in row 0."""
    found: dict[tuple[int, int], float] = {}
    for entry in archive["cells"]:
        x, y = (*entry["cell"], 0)[:2] if len(entry["cell"]) < 2 else entry["cell"][:2]
        found[x, y] = max(entry["quality"], found.get((x, y), -math.inf))
    return found


def _panel(axes: Axes, archive: Mapping[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    bins, cells = archive["bins"], best(archive)
    high = bins if len(archive["axes"]) > 1 else 1
    low_q, high_q = min(cells.values(), default=0.0), max(cells.values(), default=0.0)
    shade = LinearSegmentedColormap.from_list("quality", [LOW, HIGH])
    span = high_q - low_q
    tones = [
        [shade((cells[x, y] - low_q) / span if span else 1.0) if (x, y) in cells else PAPER for x in range(bins)]
        for y in range(high)
    ]
    for (y, row), x in ((pair, x) for pair in enumerate(tones) for x in range(bins)):
        axes.fill((x, x + 1, x + 1, x), (y, y, y + 1, y + 1), color=row[x], linewidth=0)
    axes.set(xlim=(0, bins), ylim=(0, high))
    for side in axes.spines.values():
        side.set_color(LINE)
    axes.tick_params(length=0, pad=3, labelsize=SMALL, labelcolor=MUTED)
    _ends(axes.set_xticks, bins, archive["low"][0], archive["high"][0])
    axes.set_xlabel(fit(archive["axes"][0], PANEL, SMALL), fontsize=SMALL)
    if high > 1:
        _ends(axes.set_yticks, bins, archive["low"][1], archive["high"][1])
        axes.set_ylabel(fit(archive["axes"][1], PANEL, SMALL), fontsize=SMALL)
    else:
        axes.set_yticks([])
    axes.set_title(f"{fit(archive['task'], PANEL)}\n{low_q:.3f} to {high_q:.3f}", fontsize=SMALL + 1, color=INK)


def _ends(ticks: Any, bins: int, low: float, high: float) -> None:
    ticks([0, bins], [f"{low:.2f}", f"{high:.2f}"])
