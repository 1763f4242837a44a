"""The picture of a library's family: who came from whom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError
from .pictures import INK, LINE, MUTED, PAINT, PAPER, SMALL, _style, fit, png, svg, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW, GAP, EDGE, WIDEST = 0.3, 0.7, 0.15, 2.4  # inches: of a node's line, between columns, around all, of a name


def draw(graph: Mapping[str, Any], file: str | Path) -> Path:
    """Draws a family into a file.

    Args:
        graph: `polytask.core.library.graph.Graph` as plain values.
        file: with the ending ``.png`` or ``.svg``.

    Raises:
        ConfigError: another ending, or there is nobody to draw.
        StorageError: the file cannot be written.
    """
    from ..core.storage import write, writing

    path = Path(file).expanduser()
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"{path.name} ends in {path.suffix or 'nothing'}; a picture's file ends in .png or .svg")
    if not graph["nodes"]:
        raise ConfigError("the library is empty, so there is no family to draw; add an adapter")
    made = picture(graph)
    alt = f"{len(graph['nodes'])} adapters and {len(graph['edges'])} lines from parents to children"
    data = png(made) if path.suffix.lower() == ".png" else _page(svg(made, "family", alt))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, data)
    return path


def _page(text: str) -> bytes:
    """An SVG that stands alone: the colours of a light page."""
    for name, (light, _) in PAINT.items():
        text = text.replace(f"var(--{name})", light)
    return text.encode()


def picture(graph: Mapping[str, Any]) -> Figure:
    """Parents on the left, children on the right, a line for each of both; what the library lacks is pale."""
    from matplotlib.figure import Figure

    columns: list[list[int]] = [[] for _ in range(1 + max(node["level"] for node in graph["nodes"]))]
    for place, node in enumerate(graph["nodes"]):
        columns[node["level"]].append(place)
    labels = [fit(node["name"], WIDEST, SMALL) for node in graph["nodes"]]
    place_of = _ordered(columns, graph["edges"])
    rows = max(map(len, columns))
    wide = [max(width(labels[i], SMALL) for i in column) + 0.2 for column in columns]
    left = [EDGE + sum(wide[:i]) + GAP * i for i in range(len(wide))]
    whole, high = left[-1] + wide[-1] + EDGE, rows * ROW + 2 * EDGE
    with _style():
        figure = Figure(figsize=(max(whole, 2.0), high))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, max(whole, 2.0)), ylim=(high, 0))
        axes.axis("off")
        spot = {}
        for level, column in enumerate(columns):
            step = (high - 2 * EDGE) / len(column)
            for i in column:
                spot[i] = (left[level], EDGE + (place_of[i] + 0.5) * step, level)
        for parent, child in graph["edges"]:
            x, y, level = spot[parent]
            to, end, _ = spot[child]
            start = x + width(labels[parent], SMALL) + 0.12
            axes.plot([start, left[level] + wide[level], to], [y, y, end], color=LINE, linewidth=1.1, zorder=1)
        for i, node in enumerate(graph["nodes"]):
            x, y, _ = spot[i]
            there = node["state"] == "there"
            axes.plot(
                x, y, "o", color=PAINT["m0"][0] if there else PAPER, markeredgecolor=MUTED, markersize=5, zorder=3
            )
            axes.text(x + 0.1, y, labels[i], color=INK if there else MUTED, fontsize=SMALL, va="center", zorder=3)
    return figure


def _ordered(columns: list[list[int]], edges: list[tuple[int, int]]) -> dict[int, int]:
    """The line of each node in its column: near the mean line of its parents, so that few lines cross."""
    place = {i: line for column in columns[:1] for line, i in enumerate(column)}
    for column in columns[1:]:
        parents = {i: [place[p] for p, child in edges if child == i and p in place] for i in column}
        order = sorted(column, key=lambda i: (sum(parents[i]) / max(len(parents[i]), 1), i))
        place |= {i: line for line, i in enumerate(order)}
    return place
