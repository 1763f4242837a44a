"""The report of merges side by side: how much each keeps, the curve of a sweep, and how the task vectors stand to each other.

page = render(table)          # the JSON of `polytask merge ... --evaluate`, read into a dictionary
files = pictures(table, "docs")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _clean, number, page
from .pictures import (
    INK,
    LINE,
    MARKERS,
    MUTED,
    PAINT,
    ROW,
    SMALL,
    WIDTH,
    _short,
    _style,
    fit,
    png,
    svg,
    width,
)
from .vectors import cosines, layers, look_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = [PAINT[f"m{i}"][0] for i in range(6)]
CONTENT = dict[str, Any]


def render(table: Mapping[str, Any]) -> str:
    """One HTML page with everything in it: no network, no JavaScript.

    Args:
        table: the JSON of `polytask merge ... --evaluate`.
    """
    from markupsafe import Markup

    data: CONTENT = _clean(table)
    drawn = {name: Markup(svg(figure, name, words)) for name, (figure, words) in _drawn(data).items()}
    return page("merge.html").render(
        data=data,
        rows=data["rows"],
        tasks=data["tasks"],
        headline=headline(data),
        drawn=drawn,
        look=data.get("look") or {},
        look_words=look_words(data["look"]) if data.get("look") else "",
        inputs=data["inputs"],
        base=data.get("base") or {},
        settings=data.get("settings") or {},
        paint=PAINT,
        chosen=any(row["chosen_by"] != row["average"] for row in data["rows"]),
        able=any(row["ability"] is not None for row in data["rows"]),
        lower=any(not task["higher_is_better"] for task in data["tasks"]),
    )


def pictures(table: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Writes the page's pictures as PNG on white: ``shares.png``, ``curve.png`` of a sweep, ``cosines.png``, ``layers.png``.

    Raises:
        StorageError: the folder cannot be written.
    """
    from ..core.storage import write, writing

    folder = Path(folder)
    made = {f"{name}.png": png(figure) for name, (figure, _) in _drawn(_clean(table)).items()}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in made.items():
            write(folder / name, data)
    return [folder / name for name in made]


def _drawn(data: CONTENT) -> dict[str, tuple[Figure, str]]:
    """The pictures that the table has something for, with words for those who do not see them."""
    found = {"shares": (shares(data), shares_words(data))}
    if data.get("sweep"):
        found["curve"] = (curve(data), curve_words(data))
    if look := data.get("look"):
        found["cosines"] = (cosines(look), look_words(look))
        found["layers"] = (layers(look), "The same, and the share of conflicting signs, layer by layer.")
    return found


# Words


def headline(data: CONTENT) -> list[str]:
    """Which merge is best and how much it keeps; where it is weakest; how the others and the base stand."""
    best = next((row for row in data["rows"] if row["method"] == data["best"]), None)
    if best is None or best["average"] is None:
        return ["No merge has a score that can be set against the tasks' own models."]
    many = len(data["tasks"])
    text = f"\u201c{best['method']}\u201d reaches {number(best['average'])} of what each task\u2019s own model scores"
    first = f"{text}, on average over {many} tasks." if many > 1 else f"{text}."
    rest = []
    if many > 1:
        rest.append(f"Least on {best['worst_task']}: {number(best['worst'])}.")
    bare = next((row for row in data["rows"] if row["method"] == "base"), None)
    if bare is not None and bare["average"] is not None:
        rest.append(f"The bare base has {number(bare['average'])} ({bare['what']}).")
    tried = len(data["rows"]) - sum(row["method"] in ("base", "own model") for row in data["rows"])
    if tried > 1:
        split = data["settings"].get("chosen_on")
        other = split != data["settings"].get("split")
        rest.append(
            f"Chosen from {tried} by the {split} split{'' if other else ', on which the scores are too, so they flatter it'}."
        )
    return [first, *rest]


def shares_words(data: CONTENT) -> str:
    parts = [f"{row['method']} {number(row['average'])}" for row in data["rows"] if row["average"] is not None]
    return f"Normalised scores of {len(data['rows'])} rows on {len(data['tasks'])} tasks. Averages: {', '.join(parts)}."


def curve_words(data: CONTENT) -> str:
    name = data["sweep"]["name"]
    parts = [f"{row['method']}: {number(row['average'])}" for row in _swept(data) if row["average"] is not None]
    return f"Average normalised score over {name}. {'; '.join(parts)}."


# How much is kept


def shares(data: CONTENT) -> Figure:
    """A line per row: each task's normalised score as a mark, and their mean as a bar."""
    from matplotlib.figure import Figure

    rows, tasks = data["rows"], data["tasks"]
    labels = [fit(row["method"], 2.6) for row in rows]
    left, right = 1.14 * max(map(width, labels)) + 0.24, 0.55  # the best one is bold
    key, keys = _legend([task["name"] for task in tasks], WIDTH - 0.2)
    inside, foot = ROW * len(rows) + 0.1, 0.52 + 0.2 * keys
    height = 0.12 + inside + foot
    with _style():
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((left / WIDTH, foot / height, (WIDTH - left - right) / WIDTH, inside / height))
        _plain(axes, "x")
        axes.set_ylim(len(rows) - 0.25, -0.75)
        axes.set_yticks([])
        axes.axvline(1, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2.5)), zorder=1.5)
        for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
            _share(axes, place, row, tasks, row["method"] == data["best"])
            bold: CONTENT = {"fontweight": "bold"} if row["method"] == data["best"] else {}
            axes.annotate(
                label, (0, place), (-8, 0), ("axes fraction", "data"), "offset points", ha="right", va="center", **bold
            )
        _room(axes, [s for row in rows for s in row["normalised"].values() if s is not None], "x")
        figure.text(left / WIDTH, (foot - 0.36) / height, "share of the score of each task\u2019s own model").set(
            fontsize=SMALL, color=MUTED
        )
        for text, x, line, turn in key:
            y = (0.12 + 0.2 * (keys - 1 - line)) / height
            _mark(figure.add_axes((x / WIDTH, y - 0.02 / height, 0.12 / WIDTH, 0.12 / height)), turn)
            figure.text((x + 0.17) / WIDTH, y, text, fontsize=SMALL, va="baseline")
    return figure


def _share(axes: Axes, place: int, row: CONTENT, tasks: Sequence[CONTENT], best: bool) -> None:
    mean = row["average"]
    if mean is not None:
        axes.plot((mean, mean), (place - 0.36, place + 0.36), color=INK, linewidth=2.4, solid_capstyle="butt", zorder=2)
    for turn, task in enumerate(tasks):
        value = row["normalised"].get(task["name"])
        if value is not None:
            level = place + 0.44 * ((turn + 0.5) / len(tasks) - 0.5)  # equal scores stay apart
            axes.plot([value], [level], _marker(turn), color=_colour(turn), markersize=5.2, alpha=0.9, zorder=3)
    text = "\u2013" if mean is None else _short(mean)
    look: CONTENT = {"fontweight": "bold"} if best else {"color": MUTED}
    axes.annotate(
        text, (1, place), (36, 0), ("axes fraction", "data"), "offset points", ha="right", va="center", fontsize=SMALL + 0.5,
        **look,
    )  # fmt: skip


def _legend(names: Sequence[str], room: float) -> tuple[list[tuple[str, float, int, int]], int]:
    """Where each task's name goes: text, x in inches, line, turn; and how many lines there are."""
    found, x, line = [], 0.1, 0
    for turn, name in enumerate(names):
        text = fit(name, 2.4, SMALL)
        wide = width(text, SMALL) + 0.45
        if x + wide > room and x > 0.1:
            x, line = 0.1, line + 1
        found.append((text, x, line, turn))
        x += wide
    return found, line + 1


def _mark(axes: Axes, turn: int) -> None:
    axes.axis("off")
    axes.plot([0], [0], _marker(turn), color=_colour(turn), markersize=5.2)


def _marker(turn: int) -> str:
    return MARKERS[(turn + turn // 6) % 6]


def _colour(turn: int) -> str:
    return COLOURS[turn % 6]


def _plain(axes: Axes, side: str) -> None:
    """A panel without a frame, with faint lines across one axis."""
    axes.tick_params(length=0, pad=3, labelsize=SMALL, labelcolor=MUTED)
    axes.grid(axis=side, color=LINE, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _room(axes: Axes, values: Sequence[float], side: str) -> None:
    """Limits with a little room around the values and 1."""
    low, high = min([1.0, *values]), max([1.0, *values])
    room = max(0.02, (high - low) * 0.06)
    (axes.set_xlim if side == "x" else axes.set_ylim)(low - room, high + room)


# The curve of a sweep


def _swept(data: CONTENT) -> list[CONTENT]:
    return [row for row in data["rows"] if row["at"] is not None]


def curve(data: CONTENT) -> Figure:
    """Average normalised score over the swept setting, a line per method; of a single method, each task's too."""
    from matplotlib.figure import Figure

    rules = list(dict.fromkeys(row["rule"] for row in _swept(data)))
    height, left, right = 3.5, 0.7, 2.4
    with _style():
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((left / WIDTH, 0.6 / height, (WIDTH - left - right) / WIDTH, (height - 0.75) / height))
        _plain(axes, "y")
        ends: list[tuple[float, str, str]] = []
        tasks = [task["name"] for task in data["tasks"]]
        if len(rules) == 1 and len(tasks) > 1:
            for turn, task in enumerate(tasks):
                ends += _line(axes, data, rules[0], task, _colour(turn), task, 1.1)
            ends += _line(axes, data, rules[0], "", INK, "average", 2.4)
        else:
            for turn, rule in enumerate(rules):
                ends += _line(axes, data, rule, "", _colour(turn), rule, 2.0)
        for row in data["rows"]:
            if row["at"] is None and row["average"] is not None:
                axes.axhline(row["average"], color=MUTED, linewidth=0.9, linestyle=(0, (3, 2.5)), zorder=1.5)
                ends.append((row["average"], row["method"], MUTED))
        best = next((row for row in _swept(data) if row["method"] == data["best"]), None)
        if best is not None:
            axes.plot([best["at"]], [best["average"]], "o", markersize=11, markerfacecolor="none", color=INK, zorder=5)
        _room(axes, [y for y, _, _ in ends] + [y for line in axes.lines for y in _heights(line)], "y")
        axes.set_xlabel(data["sweep"]["name"], fontsize=SMALL + 1)
        axes.set_ylabel("normalised score", fontsize=SMALL + 1)
        _names(axes, ends, (height - 0.75) * 72, right - 0.2)
        figure.text(left / WIDTH, 0.08 / height, "Ring: the best.", fontsize=SMALL, color=MUTED)
    return figure


def _heights(line: Any) -> list[float]:
    return [float(y) for y in line.get_ydata()]


def _line(
    axes: Axes, data: CONTENT, rule: str, task: str, colour: str, name: str, thick: float
) -> list[tuple[float, str, str]]:
    """Draws a method's average, or its score on a task; gives where the line ends and what it is called."""
    rows = sorted((row for row in _swept(data) if row["rule"] == rule), key=lambda row: row["at"])
    points = [(row["at"], row["normalised"].get(task) if task else row["average"]) for row in rows]
    points = [(x, y) for x, y in points if y is not None]
    if not points:
        return []
    axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=thick, markersize=2.4 + thick, zorder=3)
    return [(points[-1][1], name, colour)]


def _names(axes: Axes, ends: Sequence[tuple[float, str, str]], points: float, room: float) -> None:
    """The lines' names at the right, moved apart where they would lie on each other."""
    low, high = axes.get_ylim()
    step = (SMALL + 2.5) / points * (high - low)
    ordered = sorted(ends)
    places = [y for y, _, _ in ordered]
    for _ in range(200):
        for i in range(1, len(places)):
            lack = step - (places[i] - places[i - 1])
            if lack > 1e-9:
                places[i - 1] -= lack / 2
                places[i] += lack / 2
    for (_, name, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            fit(name, room, SMALL + 0.5), (1.0, place), (9, 0), ("axes fraction", "data"), "offset points", va="center",
            fontsize=SMALL + 0.5, color=colour, annotation_clip=False,
        )  # fmt: skip
