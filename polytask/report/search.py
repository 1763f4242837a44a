"""The picture of a search: score against trained parameters, what was tried and what nothing beats."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import count, number
from .pictures import INK, LINE, MUTED, PAINT, SMALL, TEXT, _style, fit, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRONT = PAINT["m0"][0]
KEY = 4.4  # inches for the words at the right
COLUMNS = ((0.15, "right"), (0.8, "right"), (1.35, "right"), (1.5, "left"))  # of them
ROW = 0.2  # height of a line of them


def picture(search: Mapping[str, Any]) -> bytes:
    """A PNG of what `polytask search` writes as ``search.json``: every trial faint, the front marked and named."""
    return png(figure(search))


def figure(search: Mapping[str, Any]) -> Figure:
    """The same as a figure of matplotlib's."""
    from matplotlib.figure import Figure

    tried = [t for t in search["trials"] if t["score"] is not None]
    by_number = {t["number"]: t for t in tried}
    front = [by_number[n] for n in search["front"]]
    height = max(3.4, 1.3 + ROW * len(front))
    wide = 5.2 + KEY
    with _style():
        made = Figure(figsize=(wide, height))
        axes = made.add_axes((0.75 / wide, 0.62 / height, 4.2 / wide, 1 - 1.12 / height))
        _panel(axes, tried, front)
        better = "" if search["higher_is_better"] else " (lower is better)"
        axes.set_ylabel(f"{search['metric']} on dev{better}", fontsize=SMALL + 1)
        axes.set_xlabel("trained parameters, heads not counted", fontsize=SMALL + 1)
        title = f"{search['task']} with {search['base']['name']}: {len(search['trials'])} configurations"
        top = 1 - 0.28 / height
        made.text(
            0.75 / wide, top, fit(title, wide - 1, TEXT + 1), fontsize=TEXT + 1, fontweight="semibold", va="baseline"
        )
        rows = [("", search["metric"][:10], "size", "the front"), *((str(p["number"]), *_words(p)) for p in front)]
        for row, words in enumerate(rows):
            y = top - (0.34 + ROW * row) / height
            for column, (x, side) in enumerate(COLUMNS):
                text = fit(words[column], wide - 5.2 - x, SMALL) if side == "left" else words[column]
                look = MUTED if row == 0 else FRONT if column == 0 else INK
                made.text((5.2 + x) / wide, y, text, fontsize=SMALL, va="baseline", ha=side, color=look)
    return made


def _words(point: Mapping[str, Any]) -> tuple[str, str, str]:
    return number(point["score"]), count(point["parameters"]), point["what"]


def _panel(axes: Axes, tried: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]]) -> None:
    sizes = [t["parameters"] for t in tried if t["parameters"]]
    low, high = math.log10(min(sizes, default=1)), math.log10(max(sizes, default=10))
    nothing = low - 0.14 * max(1.0, high - low)  # where 0 is drawn on a logarithmic axis

    def place(points: Sequence[Mapping[str, Any]]) -> list[float]:
        return [math.log10(p["parameters"]) if p["parameters"] else nothing for p in points]

    axes.scatter(place(tried), [t["score"] for t in tried], s=22, color=MUTED, alpha=0.38, linewidths=0, zorder=2)
    xs, ys = place(front), [p["score"] for p in front]
    end = high + 0.06 * max(1.0, high - low)
    if front:
        axes.step([*xs, end], [*ys, ys[-1]], where="post", color=FRONT, linewidth=1.1, alpha=0.7, zorder=3)
    axes.scatter(xs, ys, s=34, color=FRONT, linewidths=0, zorder=4)
    for x, y, point in zip(xs, ys, front, strict=True):
        axes.annotate(
            str(point["number"]), (x, y), (-4, 5), textcoords="offset points", ha="right", fontsize=SMALL, color=FRONT
        )
    zero = any(not t["parameters"] for t in tried)
    decades = list(range(math.ceil(low - 0.01), math.floor(high + 0.01) + 1)) or [round(low)]
    axes.set_xticks([*([nothing] if zero else []), *decades])
    axes.set_xticklabels([*(["0"] if zero else []), *(re.sub(r"[.]0+", "", count(10**d)) for d in decades)])
    axes.set_xlim((nothing if zero else low) - 0.07 * max(1.0, high - low), end)
    axes.margins(y=0.12)
    axes.tick_params(labelsize=SMALL, length=0, labelcolor=MUTED)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)
