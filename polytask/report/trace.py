"""The picture of a router: where each task went, what each site chose, and the tokens of examples by the adapter that led."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .pictures import INK, MUTED, PAINT, SMALL, TEXT, WIDTH, _style, fit, png, width
from .vectors import _cells, _warm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTENT = Mapping[str, Any]
MOST = 16  # adapters with a column of their own; the rest is summed up
ROW, LINE = 0.24, 0.115  # heights of a row with numbers, and of a site
TEXTS, TOKENS = 3, 48  # examples that are drawn, and tokens of each
COLOURS = [PAINT[f"m{i}"][0] for i in range(6)]


def picture(trace: CONTENT) -> bytes:
    """A PNG of what `polytask.route.trace.trace` saw."""
    return png(figure(trace))


def figure(trace: CONTENT) -> Figure:
    """The same as a figure of matplotlib."""
    from matplotlib.figure import Figure

    shown, names = _columns(trace)
    examples = [e for e in trace["examples"] if e["tokens"] and e["weights"]][:TEXTS]
    heads = [fit(name, 1.5, SMALL) for name in names]
    sides = [fit(task, 1.9) for task in trace["tasks"]]
    left = max([1.2, *map(width, sides)]) + 0.2
    cell = min(0.62, (WIDTH - left - 0.4) / max(1, len(names)))
    top = max(width(head, SMALL) for head in heads) * 0.72 + 0.5
    heights = [top + ROW * len(sides), top + LINE * len(trace["sites"])]
    heights += [0.8 + LINE * len(example["sites"]) for example in examples]
    ranked = _leaders(examples)
    height = sum(heights) + 0.2
    with _style():
        made = Figure(figsize=(WIDTH, height))
        at = height

        def axes(head: float, rows: float, across: float) -> Axes:
            return made.add_axes((left / WIDTH, (at - head - rows) / height, across / WIDTH, rows / height))

        table = [_picked(row, shown) for row in trace["tasks"].values()]
        own = axes(top, ROW * len(sides), cell * len(names))
        _heat(own, table, heads, cell, numbers=True)
        _sides(own, sides, TEXT)
        _title(own, "share of each adapter, by task", top)
        at -= heights[0]
        load = axes(top, LINE * len(trace["sites"]), cell * len(names))
        _heat(load, [_picked(row, shown) for row in trace["load"]], heads, cell, numbers=False)
        _some(load, trace["sites"], left)
        _title(load, "share of each adapter, by site", top)
        at -= heights[1]
        for example, high in zip(examples, heights[2:], strict=True):
            tokens = axes(0.5, LINE * len(example["sites"]), WIDTH - left - 0.2)
            _tokens(tokens, example, trace["adapters"], ranked, left)
            at -= high
    return made


def _columns(trace: CONTENT) -> tuple[list[int], list[str]]:
    """The adapters with the largest shares, and their names; the last column is all others where there are more."""
    adapters = trace["adapters"]
    sums = [sum(row[i] for row in trace["load"]) for i in range(len(adapters))]
    if len(adapters) <= MOST:
        return list(range(len(adapters))), list(adapters)
    best = sorted(sorted(range(len(adapters)), key=lambda i: -sums[i])[:MOST])
    return best, [*(adapters[i] for i in best), f"{len(adapters) - MOST} others"]


def _picked(row: Sequence[float], shown: Sequence[int]) -> list[float]:
    rest = [] if len(shown) == len(row) else [sum(row) - sum(row[i] for i in shown)]
    return [*(row[i] for i in shown), *rest]


def _heat(axes: Axes, table: Sequence[Sequence[float]], heads: Sequence[str], cell: float, numbers: bool) -> None:
    most = max(1e-9, max(max(row) for row in table))
    texts = [[f"{v:.2f}" if numbers and v >= 0.005 else "" for v in row] for row in table]
    _cells(axes, [[_warm(v / most) for v in row] for row in table], texts, cell)
    for place, head in enumerate(heads):
        axes.annotate(
            head,
            (place + 0.4, 0),
            (0, 5),
            textcoords="offset points",
            rotation=46,
            rotation_mode="anchor",
            fontsize=SMALL,
        )


def _sides(axes: Axes, labels: Sequence[str], points: float) -> None:
    for place, label in enumerate(labels):
        axes.annotate(
            label, (0, place + 0.5), (-7, 0), textcoords="offset points", ha="right", va="center", fontsize=points
        )


def _some(axes: Axes, sites: Sequence[str], left: float) -> None:
    """Names of as many rows as there is room for."""
    step = max(1, round(0.13 / LINE))
    for place in range(0, len(sites), step):
        axes.annotate(
            _end(sites[place], left - 0.2), (0, place + 0.5), (-7, 0), textcoords="offset points", ha="right", va="center",
            fontsize=5.5, color=MUTED,
        )  # fmt: skip


def _end(name: str, room: float) -> str:
    """The end of a long path, which tells sites apart."""
    while width(name, 5.5) > room and "." in name:
        name = name.split(".", 1)[1]
    return fit(name, room, 5.5)


def _title(axes: Axes, text: str, top: float) -> None:
    axes.annotate(text, (0, 0), (0, 72 * top - 16), textcoords="offset points", fontsize=SMALL + 1, color=INK)


def _leaders(examples: Sequence[CONTENT]) -> list[int]:
    """The adapters that lead most, in all examples: each has a colour."""
    leads: dict[int, float] = {}
    for example in examples:
        for weights in example["weights"]:
            for who, weight in map(_lead, weights):
                leads[who] = leads.get(who, 0.0) + weight
    return sorted(leads, key=lambda i: -leads[i])[: len(COLOURS)]


def _tokens(axes: Axes, example: CONTENT, adapters: Sequence[str], ranked: Sequence[int], left: float) -> None:
    """A row for each site, a column for each token: the colour of the adapter that leads, as strong as its weight."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    count, prompt = len(example["tokens"]), example.get("prompt")
    first = 0 if prompt is None else max(0, min(prompt - MOST, count - TOKENS))  # what was written matters most
    tokens = example["tokens"][first : first + TOKENS]
    rows = [[_lead(t) for t in _spread(weights, count)[first : first + TOKENS]] for weights in example["weights"]]
    paint = {who: to_rgb(COLOURS[turn]) for turn, who in enumerate(ranked)}
    grey = to_rgb(MUTED)
    tones = [[tuple(1 - w * (1 - c) for c in paint.get(who, grey)) for who, w in row] for row in rows]
    _cells(axes, tones, [[""] * len(tokens)] * len(rows), 1.0)
    across = (WIDTH - left - 0.2) / len(tokens)
    for place, token in enumerate(tokens):
        axes.annotate(
            fit(token, max(across, 0.12), 6), (place + 0.5, len(rows)), (0, -3), textcoords="offset points", ha="center",
            va="top", fontsize=6,
        )  # fmt: skip
    if prompt is not None:
        axes.axvline(prompt - first, color=INK, linewidth=1.2)
    _some(axes, example["sites"], left)
    keys = [Patch(color=COLOURS[turn], label=fit(adapters[who], 1.1, SMALL)) for turn, who in enumerate(ranked)]
    if len(adapters) > len(ranked):
        keys.append(Patch(color=MUTED, label="others"))
    axes.legend(
        handles=keys, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(keys), fontsize=SMALL, frameon=False,
        handlelength=0.8, handleheight=0.8, columnspacing=1.0, borderaxespad=0.1,
    )  # fmt: skip
    beyond = "" if prompt is None else ", after the line of those that it wrote"
    axes.annotate(
        f"an example of {example['task']}: the adapter that leads at each token{beyond}", (0, 0), (0, 21),
        textcoords="offset points", fontsize=SMALL + 1, color=INK,
    )  # fmt: skip


def _lead(token: Sequence[float]) -> tuple[int, float]:
    best = max(range(len(token)), key=token.__getitem__)
    return best, min(1.0, max(0.0, token[best]))


def _spread(weights: Sequence[Sequence[float]], count: int) -> list[Sequence[float]]:
    """The weights of each token; those of other numbers of tokens (a decoder's) are cut, or filled with nothing."""
    nothing = [0.0] * len(weights[0])
    return [weights[i] if i < len(weights) else nothing for i in range(count)]
