"""Drawing: the scores as dots with intervals, the cross matrix and the ranks of a budget as heat maps.

A picture is drawn once. As SVG its text stays text, in the page's own font, and its colours become CSS variables, so
that it follows the page's light or dark colours; as PNG it has the light ones on white. matplotlib is imported when
something is drawn, and only its `Figure` is used, so nothing of a caller's own plotting state is touched.

Sizes are in inches, and at 100 pixels to the inch a picture 10 inches wide fills the page.
"""

from __future__ import annotations

import html
import io
import logging
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from . import Column, Comparison

# Each colour on white and on a dark page. The six of the methods can be told apart with any of the common kinds of
# colour blindness, and have a contrast of 3:1 or more on both grounds.
PAINT = {
    "paper": ("#fefefe", "#14181d"),
    "ink": ("#1b2027", "#e7eaee"),
    "muted": ("#5d6876", "#9eaab8"),
    "line": ("#dfe3e8", "#333b45"),
    "m0": ("#0a6cb3", "#4aa8ee"),
    "m1": ("#c8500a", "#f0803c"),
    "m2": ("#0d8a66", "#2fbf95"),
    "m3": ("#a8478a", "#dd86c2"),
    "m4": ("#8a6d00", "#d1ab2b"),
    "m5": ("#5560c8", "#98a1f5"),
}
INK, MUTED, LINE, PAPER = (PAINT[name][0] for name in ("ink", "muted", "line", "paper"))
MARKERS = "osD^vP"
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "WenQuanYi Zen Hei", "Arial Unicode MS")
WIDTH = 10.0
TEXT, SMALL = 9.0, 7.5  # points
ROW = 0.225  # height of one method in a panel


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's settings while something is measured or drawn; the caller's come back afterwards."""
    import matplotlib
    from matplotlib import font_manager

    names = {font.name for font in font_manager.fontManager.ttflist}
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    settings: Any = {
        "font.family": [name for name in FONTS if name in names],
        "font.size": TEXT,
        "text.parse_math": False,  # a name may hold a dollar sign
        "svg.fonttype": "none",
        "svg.hashsalt": "polytask",  # the same table gives the same bytes
        "axes.unicode_minus": True,
        "text.color": INK,
        "axes.labelcolor": MUTED,
    }
    try:
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page has its own fonts
            yield
    finally:
        log.setLevel(level)


@lru_cache(maxsize=8192)
def _em(character: str) -> float:
    """The width of a character in units of the font's size; an East Asian wide one is 1, whatever font is at hand."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    if unicodedata.east_asian_width(character) in "WF":
        return 1.0
    # measured between two bars, for a space alone has no width
    font = FontProperties(family="DejaVu Sans", size=100)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        pair, three = (text_to_path.get_text_width_height_descent(t, font, False)[0] for t in ("||", f"|{character}|"))
    return float(three - pair) / 100


def width(text: str, points: float = TEXT) -> float:
    """Inches that a line of text takes."""
    return sum(map(_em, text)) * points / 72


def fit(text: str, inches: float, points: float = TEXT) -> str:
    """The text, or its beginning and end around an ellipsis: long names often differ in their last part."""
    text = " ".join(text.split())
    if width(text, points) <= inches:
        return text
    for keep in range(min(len(text) - 1, int(inches * 72 / points / 0.2)), 1, -1):
        head = math.ceil(keep * 0.6)
        short = f"{text[:head].rstrip()}\u2026{text[len(text) - (keep - head) :].lstrip()}"
        if width(short, points) <= inches:
            return short
    return "\u2026"


def lines(text: str, inches: float, points: float = TEXT, most: int = 3) -> str | None:
    """The text broken at spaces, hyphens, slashes and underscores to lines that fit; None where it cannot be."""
    rows = [""]
    for part in re.findall(r"[^\s\-_/]+[\s\-_/]*|[\s\-_/]+", text):
        if width((rows[-1] + part).rstrip(), points) <= inches:
            rows[-1] += part
        elif width(part.rstrip(), points) <= inches:
            rows.append(part)
        else:
            return None
    rows = [row.rstrip() for row in rows if row.strip()]
    return "\n".join(rows) if len(rows) <= most else None


def colours(data: Comparison) -> dict[str, tuple[str, str]]:
    """A colour and a marker per method: grey for the majority, ink for the base, then the six in turn."""
    found, turn = {}, 0
    for method in data.methods:
        if method == data.base:
            found[method] = (INK, "o")
        elif method.lower() == "majority":
            found[method] = (MUTED, "o")
        else:
            found[method] = (PAINT[f"m{turn % 6}"][0], MARKERS[turn // 6 % 6])
            turn += 1
    return found


# Scores


def scores(data: Comparison) -> Figure:
    """One panel per task, one line per method in it, named at the left: the score, its interval, and the number."""
    from matplotlib.figure import Figure

    many = len(data.tasks)
    columns = many if many < 3 else 2 if many == 4 else 3
    rows = math.ceil(many / columns)
    labels = {m: fit(m, 2.1) for m in data.methods}
    left = max(width(label) for label in labels.values()) + 0.24
    gap, right, top, foot = 0.62, 0.5, 0.72, 0.42
    inside = len(data.methods) * ROW + 0.1
    panel = min(5.2, (WIDTH - left - right - gap * (columns - 1)) / columns)
    whole = left + columns * panel + (columns - 1) * gap + right
    height = 0.26 + rows * (inside + top + foot - 0.3)
    with _style():
        figure = Figure(figsize=(whole, height))
        for index, task in enumerate(data.tasks):
            x = left + (index % columns) * (panel + gap)
            y = height - 0.48 - inside - (index // columns) * (inside + top + foot - 0.3)
            axes = figure.add_axes((x / whole, y / height, panel / whole, inside / height))
            _panel(axes, data, task, _limits(data, task))
            title, metric = fit(task.name, panel + gap / 2, TEXT + 2), fit(_metric(task), panel, SMALL)
            looks: list[tuple[str, int, dict[str, Any]]] = [
                (title, 18, {"fontsize": TEXT + 1, "fontweight": "semibold"}),
                (metric, 6, {"fontsize": SMALL, "color": MUTED}),
            ]
            for text, rise, look in looks:
                axes.annotate(text, (0, 1), (0, rise), "axes fraction", "offset points", va="baseline", **look)
            if index % columns == 0:
                for place, method in enumerate(data.methods):
                    axes.annotate(
                        labels[method],
                        (0, place),
                        xycoords=("axes fraction", "data"),
                        xytext=(-8, 0),
                        textcoords="offset points",
                        ha="right",
                        va="center",
                    )
        dashed = " Dashed line and hollow dot: the bare base." if data.base else ""
        figure.text(0.02 / whole, 0.06 / height, f"Dot: score. Bar: 95% interval.{dashed} Bold: the best.").set(
            fontsize=SMALL, color=MUTED
        )
    return figure


def _metric(task: Column) -> str:
    return f"{task.metric}, lower is better" if task.lower else task.metric


def _limits(data: Comparison, task: Column) -> tuple[float, float]:
    """One axis for all tasks of a metric where it lies between 0 and 1 (or -1 and 1), else one per task."""

    def points(columns: Sequence[Column]) -> list[float]:
        found = [data.score(m, t) for m in data.methods for t in columns]
        return [p for s in found for p in (s.value, s.low, s.high) if p is not None]

    shared = points([t for t in data.tasks if t.metric == task.metric]) or [0.0, 1.0]
    if min(shared) >= -1 and max(shared) <= 1 and not task.lower:
        return math.floor(min(shared) * 10) / 10 - 0.02, math.ceil(max(shared) * 10 - 1e-9) / 10 + 0.02
    own = points([task]) or [0.0, 1.0]
    room = (max(own) - min(own)) * 0.06 or abs(own[0]) * 0.1 or 1.0
    return min(own) - room, max(own) + room


def _panel(axes: Axes, data: Comparison, task: Column, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    paint, best = colours(data), data.best(task)
    axes.set_xlim(*limits)
    axes.set_ylim(len(data.methods) - 0.25, -0.75)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, pad=3, labelsize=SMALL, labelcolor=MUTED)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
    base = data.score(data.base, task).value if data.base else None
    if base is not None:
        axes.axvline(base, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2.5)), zorder=1.5)
    for place, method in enumerate(data.methods):
        score, (colour, marker) = data.score(method, task), paint[method]
        number = "\u2013"
        if score.value is not None:
            number = _short(score.value)
            if score.interval:
                bar: dict[str, Any] = {"linewidth": 2.2, "solid_capstyle": "round", "alpha": 0.55}
                axes.plot(score.interval, (place, place), color=colour, **bar)
            face = PAPER if method == data.base else colour
            axes.plot(
                [score.value], [place], marker, color=colour, markersize=5.5, markerfacecolor=face, markeredgewidth=1.4
            )
        axes.annotate(
            number,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(33, 0),
            textcoords="offset points",
            ha="right",
            va="center",
        ).set(fontsize=SMALL + 0.5, **({"fontweight": "bold"} if method in best else {"color": MUTED}))


def _short(value: float) -> str:
    """At most five characters: ``0.842``, ``23.41``, ``1204``."""
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return (f"{value:.0e}" if abs(value) >= 1e6 else f"{value:.{digits}f}").replace("-", "\u2212")


# Cross matrix


def cross(data: Comparison) -> Figure:
    """The change against the base of each adapter (rows) on each task (columns): blue is better, red is worse.

    Without the base's values the scores themselves are printed, uncoloured.
    """
    from matplotlib.figure import Figure

    found = data.table["cross"]
    adapters, tasks = [str(a) for a in found["adapters"]], [str(t) for t in found["tasks"]]
    sides = ["bare base", *(fit(adapter, 2.3) for adapter in adapters)]
    left = max(map(width, sides)) + 0.26
    cell = min(1.15, max(0.42, (WIDTH - left - 0.1) / len(tasks)))
    heads = [lines(t, cell - 0.08) for t in tasks]
    slanted = None in heads
    names = [fit(t, 1.9) for t in tasks] if slanted else [str(h) for h in heads]
    above = max(map(width, names)) * 0.72 + 0.3 if slanted else 0.2 + 0.15 * max(n.count("\n") + 1 for n in names)
    if slanted:  # the last names lean out over the right edge
        lean = max(width(n) * 0.72 - cell * (len(names) - 1 - i) for i, n in enumerate(names)) + 0.1
        cell = min(cell, max(0.42, (WIDTH - left - max(0.1, lean)) / len(tasks)))
    right = max(0.1, lean - cell / 2) if slanted else 0.1
    high = 0.34
    whole = left + cell * len(tasks) + right
    height = above + high * (len(adapters) + 1) + 0.2 + 0.34
    with _style():
        figure = Figure(figsize=(whole, height))
        axes = figure.add_axes(
            (left / whole, 0.34 / height, cell * len(tasks) / whole, (height - above - 0.34) / height)
        )
        _heat(axes, data, cell)
        for place, name in enumerate(names):
            axes.annotate(
                name,
                (place + 0.5, -1.6),
                xytext=(0, 5),
                textcoords="offset points",
                annotation_clip=False,
                va="bottom" if not slanted else "baseline",
                **({"rotation": 46, "rotation_mode": "anchor", "ha": "left"} if slanted else {"ha": "center"}),
                linespacing=1.15,
            )
        for row, name in enumerate(sides):
            axes.annotate(
                name,
                (0, row - 0.5 if row else -1.1),
                xytext=(-8, 0),
                textcoords="offset points",
                ha="right",
                va="center",
            )
        _key(figure, left, whole, height)
    return figure


def _heat(axes: Axes, data: Comparison, cell: float) -> None:
    """Cells, numbers, and a frame where an adapter meets its own task. y grows downwards; row i is i..i+1."""
    found = data.table["cross"]
    tasks = [str(t) for t in found["tasks"]]
    bases = found.get("base") or [None] * len(tasks)
    changes = [
        [None if v is None or b is None else v - b for v, b in zip(row, bases, strict=True)] for row in found["values"]
    ]
    tones = _tones(data, tasks, changes)
    points = TEXT if cell >= 0.7 else SMALL if cell >= 0.48 else SMALL - 1
    axes.set(xlim=(0, len(tasks)), ylim=(len(changes) + 0.02, -1.6))
    axes.axis("off")
    for column, base in enumerate(bases):
        text = "\u2013" if base is None else _short(base)
        axes.text(column + 0.5, -1.1, text, ha="center", va="center", fontsize=points, color=MUTED)
    axes.plot((0, len(tasks)), (-0.3, -0.3), color=LINE, linewidth=0.8)
    x, y = list(range(len(tasks) + 1)), list(range(len(changes) + 1))
    axes.pcolormesh(x, y, tones, edgecolors=PAPER, linewidth=1.6)
    for row, adapter in enumerate(found["adapters"]):
        for column, (value, change) in enumerate(zip(found["values"][row], changes[row], strict=True)):
            red, green, blue = tones[row][column]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            text = "\u2013" if value is None else _short(value) if change is None else _change(change, cell)
            colour = "#fdfdfd" if dark else "#1b2026"  # on a cell's own colour, so not the page's ink
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=points, color=colour)
            if str(adapter) == tasks[column]:
                edge: dict[str, Any] = {"color": INK, "linewidth": 1.5, "solid_joinstyle": "miter"}
                near, far, up, down = column + 0.02, column + 0.98, row + 0.04, row + 0.96
                axes.plot((near, far, far, near, near), (up, up, down, down, up), clip_on=False, **edge)


def _tones(data: Comparison, tasks: Sequence[str], changes: Sequence[Sequence[float | None]]) -> list[list[Any]]:
    """Red, green and blue of each cell, from 0 to 1. One scale per metric, so that 0.2 accuracy is not lost beside 40
    points of perplexity; the ends of the map are left out, where numbers are hard to read."""
    from matplotlib import colormaps

    known = {t.name: t for t in data.tasks}
    metrics = [known[t].metric if t in known else "" for t in tasks]
    signs = [known[t].sign if t in known else 1 for t in tasks]
    largest: dict[str, float] = {}
    for row in changes:
        for metric, change in zip(metrics, row, strict=True):
            largest[metric] = max(largest.get(metric, 0.0), abs(change or 0.0))
    tones = []
    for row in changes:
        shares = [(c or 0.0) * s / (largest[m] or 1.0) for c, s, m in zip(row, signs, metrics, strict=True)]
        tones.append([colormaps["RdBu"](0.5 + 0.37 * share)[:3] for share in shares])
    return tones


def _change(change: float, cell: float) -> str:
    """``+0.15``, with a third digit where there is room."""
    digits = (3 if cell >= 0.6 else 2) - (abs(change) >= 10) - (abs(change) >= 100)
    text = f"{change:+.{max(0, digits)}f}".replace("-", "\u2212")
    return text if re.search("[1-9]", text) else "0"


def _key(figure: Figure, left: float, whole: float, height: float) -> None:
    """The legend below the map: worse, no change, better, and the frame."""
    from matplotlib import colormaps

    axes = figure.add_axes((left / whole, 0.0, (whole - left) / whole, 0.26 / height))
    axes.set(xlim=(0, whole - left), ylim=(0, 0.26))
    axes.axis("off")
    axes.text(0.02, 0.1, "worse", va="center", fontsize=SMALL, color=MUTED)
    steps = [[colormaps["RdBu"](0.13 + 0.74 * i / 8)[:3] for i in range(9)]]
    axes.pcolormesh([0.4 + 0.13 * i for i in range(10)], [0.03, 0.17], steps, edgecolors=PAPER, linewidth=0.4)
    axes.text(1.65, 0.1, "better than the base", va="center", fontsize=SMALL, color=MUTED)


# Ranks


MOST_ROWS = 48  # sites with a row each; of more, the mean of each layer is drawn


def rank_rows(entry: Mapping[str, Any]) -> tuple[list[str], list[int], list[list[float]]]:
    """Labels of the rows, steps, and the rank of each row at each step.

    A row is a site, called by its path without what all paths have in common; or a layer where there are many.
    """
    sites, history = list(entry["sites"]), entry["history"]
    paths = [site.split(".") for site in sites]
    same = 0
    while all(len(path) > same + 1 for path in paths) and len({path[same] for path in paths}) == 1 < len(paths):
        same += 1
    steps, columns = [row[0] for row in history], [row[1:] for row in history]
    if len(sites) <= MOST_ROWS:
        return [".".join(path[same:]) for path in paths], steps, [list(row) for row in zip(*columns, strict=True)]
    layers: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        number = next((part for part in path if part.isdigit()), None)
        layers.setdefault("outside the layers" if number is None else f"layer {number}", []).append(place)
    means = [[sum(row[i] for i in places) / len(places) for row in columns] for places in layers.values()]
    return [f"{name}, mean of {len(places)}" for name, places in layers.items()], steps, means


def ranks(entry: Mapping[str, Any]) -> Figure:
    """The rank of each site (rows) after some steps (columns): darker is more. The last column has its numbers beside it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names, steps, values = rank_rows(entry)
    names = [fit(name, 2.9, SMALL) for name in names]
    left = max(width(name, SMALL) for name in names) + 0.2
    cell = min(0.6, max(0.28, (WIDTH - left - 0.6) / len(steps)))
    high = 0.17
    whole, height = left + cell * len(steps) + 0.5, 0.12 + high * len(names) + 0.5
    top = max(map(max, values)) or 1
    with _style():
        figure = Figure(figsize=(whole, height))
        axes = figure.add_axes((left / whole, 0.5 / height, cell * len(steps) / whole, high * len(names) / height))
        axes.set(xlim=(0, len(steps)), ylim=(len(names), 0))
        axes.axis("off")
        tones = [[colormaps["Blues"](0.06 + 0.86 * value / top)[:3] for value in row] for row in values]
        x, y = list(range(len(steps) + 1)), list(range(len(names) + 1))
        axes.pcolormesh(x, y, tones, edgecolors=PAPER, linewidth=0.8)
        look: dict[str, Any] = {"textcoords": "offset points", "fontsize": SMALL, "annotation_clip": False}
        for place, name in enumerate(names):
            axes.annotate(name, (0, place + 0.5), xytext=(-5, 0), ha="right", va="center", **look)
            end = f"{values[place][-1]:.1f}".removesuffix(".0")
            axes.annotate(end, (len(steps), place + 0.5), xytext=(5, 0), ha="left", va="center", color=MUTED, **look)
        free = math.inf  # how much room there is to the left of what was written
        for place in range(len(steps) - 1, -1, -1):
            text = f"{steps[place]:,}"
            half, middle = width(text, SMALL) / 2 + 0.04, (place + 0.5) * cell
            if middle + half <= free:
                axes.annotate(text, (place + 0.5, len(names)), xytext=(0, -5), ha="center", va="top", **look)
                free = middle - half
        figure.text(left / whole, 0.08 / height, "optimiser step", fontsize=SMALL, color=MUTED)
    return figure


# Files


def svg(figure: Figure, prefix: str, alt: str) -> str:
    """The picture as an ``<svg>`` element for an HTML page.

    Args:
        prefix: put before every id, since two pictures share a page.
        alt: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with _style():
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)  # matplotlib repeats every label in a comment
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    head, body = text.split(">", 1)
    for name, (light, _) in PAINT.items():
        body = re.sub(rf"((?:fill|stroke): ?){light}\b", rf"\1var(--{name})", body)
    view = re.search(r'viewBox="[^"]*"', head)
    wide = round(figure.get_figwidth() * 100)
    size = f'style="width: {wide}px; min-width: {min(wide, 640)}px"'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} {view[0] if view else ""} {size} role="img" aria-label="{html.escape(alt)}">{body}'


def png(figure: Figure) -> bytes:
    """The picture as PNG on white, 160 pixels to the inch."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", pil_kwargs={"optimize": True})
    return buffer.getvalue()
