"""The pictures of task vectors: their cosines, and signs that conflict, in all and layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import listed, number
from .pictures import MUTED, PAPER, SMALL, WIDTH, _style, fit, width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTENT = Mapping[str, Any]
MOST_PAIRS = 15  # pairs of models with a row each; of more, each model's mean with the others is drawn


def look_words(look: CONTENT) -> str:
    found = [(c, a, b) for c, a, b in _pairs(look["whole"]["cosine"], look["names"]) if c is not None]
    if not found:
        return "The task vectors have no direction: they are zero."
    (low, *far), (high, *near) = min(found), max(found)
    text = f"Cosines of {len(look['names'])} task vectors, from {number(low, 2)} ({listed(far)}) to {number(high, 2)}"
    text += f" ({listed(near)})"
    conflict = look["whole"]["conflict"]
    if conflict is None:
        return f"{text}. No number is changed by two of them."
    return f"{text}. Signs conflict at {number(100 * conflict, 1)}% of the numbers that at least two of them change."


def _pairs(cosine: Sequence[Sequence[float | None]], names: Sequence[str]) -> list[tuple[float | None, str, str]]:
    return [(cosine[i][j], names[i], names[j]) for i, j in itertools.combinations(range(len(names)), 2)]


def _tone(value: float | None, largest: float) -> tuple[float, float, float]:
    """Blue for the same direction, red for the opposite one; white for none."""
    from matplotlib import colormaps

    return colormaps["RdBu"](0.5 + 0.37 * (value or 0.0) / largest)[:3]


def _warm(value: float | None) -> tuple[float, float, float]:
    from matplotlib import colormaps

    return colormaps["Oranges"](0.06 + 0.7 * (value or 0.0))[:3]


def cosines(look: CONTENT) -> Figure:
    """The cosine of every two task vectors."""
    from matplotlib.figure import Figure

    names, cosine = look["names"], look["whole"]["cosine"]
    labels = [fit(name, 2.3) for name in names]
    left = max(map(width, labels)) + 0.24
    cell = min(0.8, max(0.42, (WIDTH - left - 1.4) / len(names)))
    heads = [fit(name, 1.6) for name in names]
    above = max(map(width, heads)) * 0.72 + 0.3
    high, whole = 0.34, left + cell * len(names) + max(map(width, heads)) * 0.72
    height = above + high * len(names) + 0.1
    largest = _largest([c for c, _, _ in _pairs(cosine, names)])
    with _style():
        figure = Figure(figsize=(whole, height))
        axes = figure.add_axes((left / whole, 0.1 / height, cell * len(names) / whole, high * len(names) / height))
        tones = [
            [(_tone(v, largest) if i != j else _tone(0, 1)) for j, v in enumerate(r)] for i, r in enumerate(cosine)
        ]
        _cells(axes, tones, [[_cosine(v) for v in row] for row in cosine], cell)
        for place, label in enumerate(labels):
            axes.annotate(label, (0, place + 0.5), (-8, 0), textcoords="offset points", ha="right", va="center")
            axes.annotate(
                heads[place], (place + 0.4, 0), (0, 6), textcoords="offset points", rotation=46, rotation_mode="anchor"
            )
    return figure


def layers(look: CONTENT) -> Figure:
    """By layer: the share of shared numbers whose signs conflict, and the cosine of every two task vectors."""
    from matplotlib.figure import Figure

    names, parts = look["names"], look["layers"]
    every = [_pairs(part["cosine"], names) for part in parts]
    if len(every[0]) <= MOST_PAIRS:
        labels = [f"{fit(a, 1.3, SMALL)} \u00b7 {fit(b, 1.3, SMALL)}" for _, a, b in every[0]]
        values = [[pairs[i][0] for pairs in every] for i in range(len(labels))]
    else:
        labels = [f"{fit(name, 1.7, SMALL)}, mean with others" for name in names]
        values = [[_mean([c for c, a, b in pairs if name in (a, b)]) for pairs in every] for name in names]
    heads = [_head(part["name"]) for part in parts]
    left = max(width(t, SMALL) for t in [*labels, "signs that conflict"]) + 0.24
    cell = min(0.6, (WIDTH - left - 0.3) / len(parts))
    high, whole = 0.26, left + cell * len(parts) + 0.3
    height = 0.3 + high * (len(labels) + 1.5) + 0.42
    largest = _largest([v for row in values for v in row])
    with _style():
        figure = Figure(figsize=(whole, height))
        conflict = [part["conflict"] for part in parts]
        for bottom, rows, tones, texts in (
            (0.42 + high * (len(labels) + 0.5), 1, [[_warm(v) for v in conflict]], [[_percent(v) for v in conflict]]),
            (
                0.42,
                len(labels),
                [[_tone(v, largest) for v in r] for r in values],
                [[_cosine(v) for v in r] for r in values],
            ),
        ):
            axes = figure.add_axes((left / whole, bottom / height, cell * len(parts) / whole, high * rows / height))
            _cells(axes, tones, texts, cell)
            sides = ["signs that conflict"] if bottom > 0.42 else labels
            for place, label in enumerate(sides):
                axes.annotate(
                    label,
                    (0, place + 0.5),
                    (-8, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=SMALL,
                )
        free = -1.0
        for place, head in enumerate(heads):
            middle, half = (place + 0.5) * cell, width(head, SMALL) / 2 + 0.03
            if middle - half >= free:
                axes.annotate(
                    head,
                    (place + 0.5, len(labels)),
                    (0, -5),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=SMALL,
                )
                free = middle + half
        figure.text(left / whole, 0.06 / height, "layer", fontsize=SMALL, color=MUTED)
    return figure


def _head(name: str) -> str:
    """``3`` of ``encoder.layer.3``; what lies outside is the rest."""
    last = name.rpartition(".")[2]
    return last if last.isdigit() else "rest"


def _cells(axes: Axes, tones: Sequence[Sequence[Any]], texts: Sequence[Sequence[str]], cell: float) -> None:
    axes.set(xlim=(0, len(tones[0])), ylim=(len(tones), 0))
    axes.axis("off")
    edges: dict[str, Any] = {"edgecolors": PAPER, "linewidth": 1.2}
    axes.pcolormesh(list(range(len(tones[0]) + 1)), list(range(len(tones) + 1)), tones, **edges)
    longest = max(width(text, SMALL) for row in texts for text in row)
    if longest > cell - 0.04:
        return  # the numbers are in the page's table
    for row, (colours, words) in enumerate(zip(tones, texts, strict=True)):
        for column, ((red, green, blue), text) in enumerate(zip(colours, words, strict=True)):
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=SMALL).set_color(
                "#fdfdfd" if dark else "#1b2026"
            )


def _largest(values: Sequence[float | None]) -> float:
    """The end of the colours: at least 0.2, so that vectors that are almost at right angles look so."""
    return max([0.2, *(abs(value) for value in values if value is not None)])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cosine(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")


def _percent(value: float | None) -> str:
    return "\u2013" if value is None else f"{100 * value:.0f}%"
