"""The report of a comparison: one HTML page that stands alone, and its pictures.

    page = render(table)          # the JSON of `polytask compare`, read into a dictionary
    files = pictures(table, "docs")

Only rows are needed; whatever else is missing from the table is left out of the page. Importing this package imports
neither matplotlib nor jinja2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

# Imported here, and by name, so that a later import cannot put the module in the place of the function `pictures`.
from . import pictures as _draw

__all__ = ["Comparison", "pictures", "render"]

_LOWER = {"perplexity", "ppl", "loss", "nll", "entropy", "error", "errors", "mse", "rmse", "mae"}
_LOWER |= {"wer", "cer", "ter", "distance", "bits"}


def lower_is_better(measure: str) -> bool:
    """Whether a smaller value of this metric is the better one: ``perplexity``, ``dev_loss``, ``wer``.

    A sentence that says itself whether higher or lower is better is believed.
    """
    if told := re.search(r"\b(higher|lower) is better", measure.lower()):
        return told[1] == "lower"
    return not _LOWER.isdisjoint(re.split(r"[^a-z]+", measure.lower()))


@dataclass(frozen=True)
class Score:
    """One method on one task. `value` is None where the method cannot do the task; `note` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.value is None or self.low is None or self.high is None else (self.low, self.high)

    def overlaps(self, other: Score) -> bool | None:
        """Whether the two intervals share a point; None where one of them is not known."""
        mine, theirs = self.interval, other.interval
        return None if mine is None or theirs is None else mine[0] <= theirs[1] and theirs[0] <= mine[1]


NOTHING = Score(None)


@dataclass(frozen=True)
class Column:
    """One task of the comparison, as its table describes it."""

    name: str
    metric: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lower(self) -> bool:
        return lower_is_better(self.metric)

    @property
    def sign(self) -> int:
        """-1 where less is better: ``sign * value`` always grows with quality."""
        return -1 if self.lower else 1


@dataclass(frozen=True)
class Comparison:
    """The table of `polytask compare`, checked, with what can be computed from it.

    Attributes:
        tasks: in the order of the table; a task that only a row names comes last.
        methods: the methods' entries by name, in the order of the table, likewise.
        scores: by ``(method, task)``.
        table: the rest of the table, as it came.
    """

    tasks: Sequence[Column]
    methods: Mapping[str, Mapping[str, Any]]
    scores: Mapping[tuple[str, str], Score]
    table: Mapping[str, Any]

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Comparison:
        """Checks and sorts the table.

        Raises:
            DataError: the table is no mapping or has no rows, a row lacks its method or task or comes twice, a number
                is something else, or the cross matrix does not have one value per adapter and task.
        """
        from ..core.errors import DataError

        table = _clean(table)
        rows = table.get("rows") if isinstance(table, Mapping) else None
        if not isinstance(rows, Sequence) or not rows:
            raise DataError("the table has no 'rows', so there is nothing to report; give the JSON of polytask compare")
        methods: dict[str, Mapping[str, Any]] = {str(m["method"]): m for m in table.get("methods") or []}
        columns = [Column(str(t["name"]), str(t.get("metric") or ""), t) for t in table.get("tasks") or []]
        tasks = {column.name: column for column in columns}
        scores: dict[tuple[str, str], Score] = {}
        for place, row in enumerate(rows):
            where = f"rows[{place}]"
            if not isinstance(row, Mapping) or not row.get("method") or not row.get("task"):
                raise DataError(f"{where} must have a 'method' and a 'task'; it is {row!r}")
            method, task = str(row["method"]), str(row["task"])
            if (method, task) in scores:
                raise DataError(f"{where} is a second score of {method!r} on {task!r}; one row per method and task")
            if not tasks.setdefault(task, Column(task)).metric:
                tasks[task] = Column(task, str(row.get("metric") or ""), tasks[task].about)
            methods.setdefault(method, {"method": method})
            value, low, high = (_number(row.get(key), f"{where}.{key}") for key in ("value", "low", "high"))
            scores[method, task] = Score(value, low, high, str(row.get("note") or ""))
        if table.get("cross"):
            _check_cross(table["cross"])
        for place, entry in enumerate(table.get("ranks") or []):
            _check_ranks(entry, f"ranks[{place}]")
        return cls(list(tasks.values()), methods, scores, table)

    def score(self, method: str, task: Column) -> Score:
        return self.scores.get((method, task.name), NOTHING)

    def values(self, method: str) -> dict[str, float]:
        """The method's scores by task, without the tasks it cannot do."""
        found = {t.name: self.score(method, t).value for t in self.tasks}
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def base(self) -> str | None:
        """The method that uses the bare base: the first whose name begins with ``base``."""
        return next((m for m in self.methods if re.match(r"(bare )?base\b", m.lower())), None)

    @cached_property
    def one_direction(self) -> bool:
        """Whether higher, or lower, is better on every task; only then does an average mean something."""
        return len({t.lower for t in self.tasks}) == 1

    def best(self, task: Column) -> set[str]:
        """The best methods on a task: more than one where they are equal to three digits."""
        found = {m: self.score(m, task).value for m in self.methods}
        shown = {m: round(value, 3) * task.sign for m, value in found.items() if value is not None}
        top = max(shown.values(), default=None)
        return {m for m, value in shown.items() if value == top}

    def average(self, method: str) -> float | None:
        """The unweighted mean over the tasks that the method can do, as the table says, else as its rows say."""
        given = _number(self.methods[method].get("average"), f"the average of {method!r}")
        values = self.values(method)
        if given is not None or not values or not self.one_direction:
            return given
        return sum(values.values()) / len(values)

    def worst(self, method: str) -> tuple[float, str] | None:
        """The method's worst score and its task; the task is empty where no row has that score."""
        values = self.values(method)
        given = _number(self.methods[method].get("worst"), f"the worst of {method!r}")
        if given is None:
            if not values or not self.one_direction:
                return None
            given = max(values.values()) if self.tasks[0].lower else min(values.values())
        return given, next((t for t, v in values.items() if abs(v - given) < 1e-6), "")

    @cached_property
    def ranking(self) -> list[str]:
        """Methods that can do the most tasks, best first: by average, or by tasks won where the metrics disagree."""
        most = max(len(self.values(m)) for m in self.methods)
        full = [m for m in self.methods if most and len(self.values(m)) == most]
        if not self.one_direction:
            return sorted(full, key=self.wins, reverse=True)
        return sorted((m for m in full if self.average(m) is not None), key=self._quality, reverse=True)

    def wins(self, method: str) -> int:
        return sum(method in self.best(task) for task in self.tasks)

    def _quality(self, method: str) -> float:
        return (self.average(method) or 0.0) * self.tasks[0].sign


def render(table: Mapping[str, Any]) -> str:
    """One HTML page with everything in it: no network, no JavaScript.

    Args:
        table: the JSON of `polytask compare`.

    Raises:
        DataError: see `Comparison.read`.
    """
    from markupsafe import Markup

    data = Comparison.read(table)
    template = page("compare.html")
    cross = data.table.get("cross")
    notes: list[str] = []
    return template.render(
        data=data,
        notes=notes,
        grid=_grid(data, notes),
        wide=len(data.tasks) > 7 and len(data.methods) < len(data.tasks),
        headline=headline(data),
        scores_picture=Markup(_draw.svg(_draw.scores(data), "scores", scores_words(data))),
        cross_picture=Markup(_draw.svg(_draw.cross(data), "cross", cross_words(data))) if cross else "",
        base=data.table.get("base") or {},
        cross=cross,
        forgetting=_forgetting(data),
        ranks=[
            (ranks_words(e), Markup(_draw.svg(_draw.ranks(e), f"ranks{i}", ranks_words(e))) if i < MOST_RANKS else "")
            for i, e in enumerate(data.table.get("ranks") or [])
        ],
        settings=data.table.get("settings") or {},
        paint=_draw.PAINT,
        probes=bool(cross) or any("probe" in m for m in data.methods),
        costs=[k for k in COSTS if any(m.get(k) is not None for m in data.methods.values())],
        cost_names=COSTS,
    )


def page(name: str) -> Template:
    """A page's template, with the filters for numbers; both pages include the same styles."""
    from jinja2 import Environment, FunctionLoader
    from markupsafe import Markup, escape

    loader = FunctionLoader(lambda file: files(__package__).joinpath(file).read_text(encoding="utf-8"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.filters |= {"number": number, "signed": signed, "count": count, "size": size, "duration": duration}
    environment.filters |= {"sentence": sentence, "memory": lambda mb: size(mb * 1e6)}
    # a long name may be broken after these, where a reader would break it
    environment.filters |= {"breaks": lambda text: Markup(re.sub(r"([_/.])", r"\1<wbr>", str(escape(text))))}
    return environment.get_template(name)


def pictures(table: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Writes the page's pictures as PNG on white, for a README: ``scores.png`` and, where measured, ``cross.png`` and
    ``ranks-1.png`` and so on, one for each adapter whose ranks a budget dealt out.

    Raises:
        DataError: see `Comparison.read`.
        StorageError: the folder cannot be written.
    """
    from ..core.storage import write, writing

    data, folder = Comparison.read(table), Path(folder)
    drawn = {"scores.png": _draw.scores(data)} | ({"cross.png": _draw.cross(data)} if data.table.get("cross") else {})
    drawn |= {f"ranks-{i + 1}.png": _draw.ranks(e) for i, e in enumerate((data.table.get("ranks") or [])[:MOST_RANKS])}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            write(folder / name, _draw.png(figure))
    return [folder / name for name in drawn]


MOST_RANKS = 6  # adapters whose ranks are drawn; of every one there is a sentence
COSTS = {
    "trained_parameters": "Trained parameters",
    "bytes": "On disk",
    "seconds": "Time",
    "peak_mb": "Peak memory",
    "forgot": "Base's own ability",
}


# Numbers as people read them


def number(value: float, digits: int = 3) -> str:
    """``0.842``, ``23.41``, ``1,204``: `digits` after the point below ten, fewer above."""
    fewer = sum(abs(value) >= step for step in (10, 100, 1000))
    text = f"{value:,.{max(0, digits - fewer)}f}" if abs(value) < 1e6 else f"{value:.2e}"
    return text.replace("-", "\u2212")


def signed(value: float, digits: int = 3) -> str:
    """``+0.151``, ``−0.020``, and ``0`` for what rounds to nothing."""
    text = number(value, digits)
    return "0" if not re.search("[1-9]", text) else text if value < 0 else f"+{text}"


def _scaled(value: float, units: Sequence[str], step: float = 1000.0) -> str:
    power = 0
    while abs(value) >= step * 0.9995 and power < len(units) - 1:
        value, power = value / step, power + 1
    digits = 0 if abs(value) >= 100 or power == 0 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}\u00a0{units[power]}".rstrip("\u00a0")


def count(value: float) -> str:
    """``7,688`` below ten thousand, then ``590 k``, ``22.7 M``."""
    return f"{value:,.0f}" if abs(value) < 10_000 else _scaled(value, ("", "k", "M", "G", "T"))


def size(value: float) -> str:
    """Bytes in decimal units: ``512 B``, ``2.36 MB``."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float) -> str:
    """``0.4 s``, ``2 min 23 s``, ``1 h 5 min``."""
    if 0 < seconds < 0.1:
        return "<\u00a00.1\u00a0s"
    if seconds < 59.5:
        return f"{seconds:.0f}\u00a0s" if seconds >= 9.95 else f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min\u00a0{rest}\u00a0s"
    return f"{minutes // 60}\u00a0h\u00a0{minutes % 60}\u00a0min"


def listed(names: Iterable[str], most: int = 6) -> str:
    """``a, b and c``; a long list ends ``and 9 more``, and a long name loses its middle."""
    names = [f"{n[:24]}\u2026{n[-15:]}" if len(n) > 40 else n for n in names]
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def sentence(text: str) -> str:
    """The text with a capital at its beginning and a full stop at its end."""
    text = text.strip()
    return text[:1].upper() + text[1:] + "." * (text[-1:].isalnum() or text.endswith(")"))


# What the numbers say, in words


def headline(data: Comparison) -> list[str]:
    """The first lines of the page, as plain sentences: who is best, by how much, and where that is not clear."""
    order = data.ranking
    if not order:
        return ["No method has a score on any task."]
    best, base = order[0], data.base
    lines = [_who(data, best)]
    if base and base != best and base in data.methods:
        lines.append(_against(data, best, base))
    second = next((m for m in order[1:] if m != base), None)
    if second:
        lines.append(_next(data, best, second))
    return lines


def _next(data: Comparison, best: str, second: str) -> str:
    """``Next comes “joint” with 0.744; ...``: whether the intervals say that the best is better than the second."""
    text = f"Next comes \u201c{second}\u201d"
    if data.one_direction:
        text += f" with {number(data.average(second) or 0.0)}"
    overlaps = [o for t in data.tasks if (o := data.score(best, t).overlaps(data.score(second, t))) is not None]
    if overlaps and all(overlaps):
        where = "intervals overlap on every task" if len(overlaps) > 1 else "two intervals overlap"
        text += f"; the {where}, so which of the two is better is not clear"
    elif overlaps and len(data.tasks) > 1:
        text += f"; the intervals of the two are apart on {overlaps.count(False)} of {_tasks(data)}"
    return f"{text}."


def _tasks(data: Comparison) -> str:
    return f"{len(data.tasks)} task{'s' * (len(data.tasks) != 1)}"


def _who(data: Comparison, best: str) -> str:
    """``“joint” is best on average over 6 tasks: 0.842, 0.151 above the bare base (0.691).``"""
    base, done = data.base, len(data.values(best))
    over = f"{done} task{'s' * (done != 1)}" if done == len(data.tasks) else f"the {done} of {_tasks(data)} it can do"
    if not data.one_direction:
        wins = f"{data.wins(best)} of {_tasks(data)}"
        return f"\u201c{best}\u201d is best on {wins}; their metrics have no common average."
    mine = data.average(best) or 0.0
    text = f"\u201c{best}\u201d is best on average over {over}: {number(mine)}"
    if len(data.tasks) == 1:
        text = f"\u201c{best}\u201d is best on {data.tasks[0].name}: {number(mine)}"
    theirs = data.average(base) if base else None
    if best == base:
        return f"{text}. Nothing that was learned beats the bare base."
    if theirs is None or not base:
        return f"{text}."
    if data.values(base).keys() != data.values(best).keys():
        return f"{text}. The bare base cannot do all of these tasks, so the averages are not compared."
    gap = mine - theirs
    side = "above" if gap > 0 else "below"
    return f"{text}, {number(abs(gap))} {side} the bare base ({number(theirs)})."


def _against(data: Comparison, best: str, base: str) -> str:
    """On which tasks `best` is clearly better or worse than the base, and on which the intervals overlap."""
    better: list[str] = []
    worse: list[str] = []
    unclear: list[str] = []
    for task in data.tasks:
        mine, theirs = data.score(best, task), data.score(base, task)
        overlap = mine.overlaps(theirs)
        if overlap:
            unclear.append(task.name)
        elif overlap is False and mine.value is not None and theirs.value is not None:
            (better if (mine.value - theirs.value) * task.sign > 0 else worse).append(task.name)
    if not (better or worse or unclear):
        return "Without intervals it cannot be said where the difference from the bare base is clear."

    def where(names: list[str]) -> str:
        return "every task" if len(names) == len(data.tasks) > 1 else listed(names)

    parts = [f"clearly {word} on {where(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    text = f"Against the bare base it is {' and '.join(parts)}" if parts else ""
    if unclear:
        what = "the two 95% intervals overlap, so the difference is not clear"
        first = f"{text}; on" if text else "Against the bare base it is neither clearly better nor worse: on"
        text = f"{first} {where(unclear)} {what}"
    return f"{text}."


def scores_words(data: Comparison) -> str:
    """The first picture, for those who do not see it."""
    parts = []
    for task in data.tasks:
        shown = [f"{m} {number(s.value)}" for m in data.methods if (s := data.score(m, task)).value is not None]
        parts.append(f"{task.name}: {', '.join(shown) or 'no score'}")
    return f"Scores of {len(data.methods)} methods on {_tasks(data)} with 95% intervals. {'; '.join(parts)}."


def cross_words(data: Comparison) -> str:
    """The cross matrix, for those who do not see it: its largest gain and loss, and where the numbers are."""
    cross = data.table["cross"]
    bases = cross.get("base") or [None] * len(cross["tasks"])
    found = [
        (value - base, adapter, task)
        for adapter, row in zip(cross["adapters"], cross["values"], strict=True)
        for task, value, base in zip(cross["tasks"], row, bases, strict=True)
        if value is not None and base is not None
    ]
    text = f"Heat map of {len(cross['adapters'])} adapters on {len(cross['tasks'])} tasks as change against the base."
    if not found:
        return f"{text} No change could be computed."
    (high, *top), (low, *bottom) = max(found), min(found)
    return (
        f"{text} The largest change is {signed(high)} for adapter {top[0]} on {top[1]}, the smallest {signed(low)} for "
        f"adapter {bottom[0]} on {bottom[1]}. The table below the picture has all values."
    )


def ranks_words(entry: Mapping[str, Any]) -> str:
    """``“sst2”: 288 ranks dealt out by adalora among 36 sites, from 0 to 12 at a site, most at ...; 3 sites have none.``"""
    found = entry["sites"]
    least, most = min(found.values()), max(found.values())
    text = (
        f"\u201c{entry['adapter']}\u201d: {sum(found.values())} ranks dealt out by {entry.get('budget') or 'a budget'}"
    )
    text += f" among {len(found)} site{'s' * (len(found) != 1)}"
    if least == most:
        return f"{text}, {most} at each."
    text += f", from {least} to {most} at a site, most at {listed([n for n, r in found.items() if r == most], 3)}"
    none = sum(rank == 0 for rank in found.values())
    return f"{text}; {none} ha{'ve' if none > 1 else 's'} none." if none else f"{text}."


# Checks and small tables


def _number(value: Any, where: str) -> float | None:
    """The number, or None for null."""
    from ..core.errors import DataError

    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where} is {value!r}; it must be a number or null")
    return float(value)


def _clean(value: Any) -> Any:
    """The table with None for NaN and infinity, since a score that overflowed is no score, and without the characters
    that no page may hold (controls and halves of a pair)."""
    if isinstance(value, str):
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", value)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _check_cross(cross: Mapping[str, Any]) -> None:
    from ..core.errors import DataError

    adapters, tasks, values = (list(cross.get(key) or []) for key in ("adapters", "tasks", "values"))
    if not adapters or not tasks or [len(row) for row in values] != [len(tasks)] * len(adapters):
        got = f"{len(values)} rows of {listed(sorted({str(len(row)) for row in values})) or 'no'} values"
        raise DataError(f"cross.values has {got}; {len(adapters)} adapters x {len(tasks)} tasks are needed")
    if cross.get("base") and len(cross["base"]) != len(tasks):
        raise DataError(f"cross.base has {len(cross['base'])} values; one per task is needed, {len(tasks)}")
    for adapter, row in zip(adapters, [*values, cross.get("base") or []], strict=False):
        for task, value in zip(tasks, row, strict=False):
            _number(value, f"cross.values of {adapter!r} on {task!r}")


def _check_ranks(entry: Any, where: str) -> None:
    from ..core.errors import DataError

    sites = entry.get("sites") if isinstance(entry, Mapping) else None
    if not entry or not isinstance(sites, Mapping) or not sites or not entry.get("adapter"):
        raise DataError(f"{where} must have an 'adapter' and 'sites' with a rank each; it is {entry!r}")
    rows = entry.get("history") or []
    if not rows or any(not isinstance(row, list) or len(row) != len(sites) + 1 for row in rows):
        raise DataError(f"{where}.history must have rows of a step and {len(sites)} ranks, one for each site")
    for value in [*sites.values(), *(value for row in rows for value in row)]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DataError(f"{where} has {value!r}; steps and ranks must be whole numbers of at least 0")


def _grid(data: Comparison, notes: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """What the table of scores prints in each cell; fills `notes` with the notes' texts, which cells name by number."""

    def mark(text: str) -> int:
        if text and text not in notes:
            notes.append(text)
        return notes.index(text) + 1 if text else 0

    best = {task.name: data.best(task) for task in data.tasks}
    cells = {}
    for method in data.methods:
        for task in data.tasks:
            score = data.score(method, task)
            bounds = score.interval
            join = "\u2013" if bounds and bounds[0] >= 0 else " to "
            cells[method, task.name] = {
                "value": None if score.value is None else number(score.value),
                "interval": join.join(number(b, 2) for b in bounds) if bounds else "",
                "best": method in best[task.name],
                "note": mark(score.note),
            }
        cells[method, ""] = {"note": mark(str(data.methods[method].get("note") or ""))}
    return cells


def _forgetting(data: Comparison) -> dict[str, Any] | None:
    """The rows of the forgetting table with the length of each bar, in per cent of half the bar's cell."""
    given = data.table.get("forgetting") or {}
    rows: list[dict[str, Any]] = []
    for place, row in enumerate(given.get("rows") or []):
        where = f"forgetting.rows[{place}]"
        before, after, change = (_number(row.get(key), f"{where}.{key}") for key in ("before", "after", "change"))
        if change is None and before is not None and after is not None:
            change = after - before
        rows.append({"adapter": str(row.get("adapter")), "before": before, "after": after, "change": change})
    if not rows:
        return None
    measure = str(given.get("measure") or "")
    scale = max((abs(row["change"]) for row in rows if row["change"] is not None), default=0.0) or 1.0
    sign = -1 if lower_is_better(measure) else 1
    for row in rows:
        row["bar"] = 0.0 if row["change"] is None else 100 * abs(row["change"]) / scale
        row["worse"] = row["change"] is not None and row["change"] < 0
        row["lost"] = row["change"] is not None and row["change"] * sign < 0
    return {"measure": measure, "rows": rows, "lower": sign < 0}
