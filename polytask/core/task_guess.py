"""What was said about a task (task.yaml, keyword arguments), and what is guessed where nothing was said."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polytask.core.errors import ConfigError, DataError, listing, nearest
from polytask.core.task import KINDS, MODALITIES

SPLIT_NAMES = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "test": "test"}
UNDIVIDED = "all"

INPUT_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("first", "second"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence_a", "sentence_b"),
    ("text", "text_pair"),
    ("passage", "question"),
    ("context", "question"),
    ("question", "sentence"),
    ("query", "passage"),
)
INPUTS = (
    *("text", "sentence", "x", "input", "inputs", "prompt", "question", "utterance", "query", "review", "content"),
    *("document", "premise", "context", "article", "source", "message", "comment", "tweet", "body", "instruction"),
    *("title", "headline", "word"),
)
TARGETS = (
    *("label", "labels", "y", "target", "targets", "output", "outputs", "answer", "score", "class", "intent", "tags"),
    *("category", "sentiment", "rating", "emotion", "topic", "summary", "response", "completion", "similarity"),
)
LABEL_NAMES = ("label", "labels", "class", "intent", "category", "topic")
CHOICES = ("choices", "options", "endings")
IMAGES = ("image", "img", "image_path", "file_name", "path")
# Columns that tell rows apart and say nothing about the task.
BOOKKEEPING = ("", "id", "idx", "index", "uid", "guid", "split", "unnamed: 0", "__index_level_0__")
# A few bad values must not change what a column is taken for: they are reported as bad rows instead.
MOSTLY = 0.8


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, and is {value!r}; put it in quotes")
    return value


def _name(value: Any) -> str:
    name = _text(value)
    # A task's name becomes the name of a folder.
    if not name.strip() or name in (".", "..") or len(name) > 200 or re.search(r"[/\\\x00-\x1f]", name):
        raise ValueError(f"must be 1 to 200 characters without slashes or control characters, and is {name!r}")
    return name


def _one_of(allowed: Sequence[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {listing(allowed)}, and is {value!r}{nearest(str(value), allowed)}")
        return str(value)

    return check


def _metric(value: Any) -> str:
    from polytask.core.metrics import METRICS  # which takes numpy, and few tasks name a metric

    return _one_of(tuple(METRICS))(value)


def _columns(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names) or len(names) not in (1, 2):
        raise ValueError(f"must be one column name or a list of two, and is {value!r}")
    return tuple(names)


def _choices(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"must be the column with the lists of choices, or a list of columns, and is {value!r}")
    return tuple(names)


def _labels(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"must be a list of label names, and is {value!r}")
    for label in value:
        if isinstance(label, bool):
            # YAML 1.1 reads yes, no, on and off as truth values.
            raise ValueError(f"holds the truth value {label}; put the label in quotes, as in 'yes'")
        if not isinstance(label, (str, int)):
            raise ValueError(f"must be a list of names, and holds {label!r}")
    labels = tuple(str(label).strip() for label in value)
    if len(set(labels)) < len(labels):
        raise ValueError(f"names {next(x for x in labels if labels.count(x) > 1)!r} twice")
    return labels


def _files(value: Any) -> dict[str, str]:
    splits = (*SPLIT_NAMES, UNDIVIDED)
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"must map splits to file names, as in {{train: a.csv, test: b.csv}}, and is {value!r}")
    files: dict[str, str] = {}
    for split, path in value.items():
        if split not in splits:
            raise ValueError(
                f"names the split {split!r}{nearest(str(split), splits)}; the splits are {listing(splits)}"
            )
        files[SPLIT_NAMES.get(str(split), UNDIVIDED)] = _text(path)
    if UNDIVIDED in files and len(files) > 1:
        raise ValueError(f"names {UNDIVIDED!r} beside other splits; {UNDIVIDED!r} is a file to be divided, alone")
    return files


def _about(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not value or not all(isinstance(v, str) and v.strip() for v in value.values()):
        raise ValueError(f"must map labels to a text that describes each, and is {value!r}")
    return {str(label).strip(): text.strip() for label, text in value.items()}


def _where(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"must map columns to the value to keep, as in {{'task': 'sst2'}}, and is {value!r}")
    return dict(value)


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "name": _name,
    "kind": _one_of(KINDS),
    "inputs": _columns,
    "target": _text,
    "labels": _labels,
    "instruction": _text,
    "metric": _metric,
    "description": _text,
    "about": _about,
    "licence": _text,
    "group": _text,
    "direction": _text,
    "modality": _one_of(MODALITIES),
    "choices": _choices,
    "files": _files,
    "where": _where,
}


def check_settings(given: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """Validated settings; keys that are None count as not given. Raises ConfigError with all problems together."""
    checked: dict[str, Any] = {}
    problems = []
    for key, value in given.items():
        if key not in SETTINGS:
            problems.append(f"unknown key {key!r}{nearest(str(key), SETTINGS)}, the keys are {listing(SETTINGS)}")
        elif value is not None:
            try:
                checked[key] = SETTINGS[key](value)
            except ValueError as error:
                problems.append(f"{key} {error}")
    if problems:
        raise ConfigError(f"{origin}: " + "; ".join(problems) + ".")
    return checked


@dataclass
class Columns:
    """The columns of a task's parts, and a note for each that was guessed."""

    inputs: tuple[str, ...]
    target: str = ""
    choices: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def require(column: str, columns: Iterable[str], origin: str) -> None:
    """Raises DataError when there is no such column, listing those there are."""
    names = sorted(columns)
    if column not in names:
        raise DataError(f"{origin} has no column {column!r}{nearest(column, names)}; its columns are {listing(names)}.")


def guess_columns(columns: Sequence[str], candidates: Sequence[str], said: Mapping[str, Any], origin: str) -> Columns:
    """Which columns hold inputs, target and choices: what was said, else common names, else the only one left.

    `columns` are all there are, `candidates` those that a guess may take. Raises DataError when a column that was
    named is not there, or when several could be meant.
    """
    for column in (*said.get("inputs", ()), *said.get("choices", ()), *([said["target"]] if "target" in said else [])):
        require(column, columns, origin)
    kind, image = said.get("kind"), said.get("modality") == "image"
    free = [c for c in candidates if c not in said.get("inputs", ()) and c.lower() not in BOOKKEEPING]
    found = Columns(said.get("inputs", ()), said.get("target", ""), said.get("choices", ()))

    def take(names: Iterable[str]) -> str:
        lower = {c.lower(): c for c in reversed(free)}
        return next((lower[name] for name in names if name in lower), "")

    free = [c for c in free if c != found.target and c not in found.choices]
    if not found.choices and kind in (None, "choose") and (choices := take(CHOICES)):
        found.choices = (choices,)
        free.remove(choices)
    if not found.target and kind != "lm" and (target := take(TARGETS)):
        found.target = target
        free.remove(target)
    if not found.inputs:
        found.inputs = (take(IMAGES),) if image else _first_pair(free) or (take(INPUTS),)
        if found.inputs == ("",):
            found.inputs = tuple(free) if len(free) == 1 else ()
        free = [c for c in free if c not in found.inputs]
    if not found.target and kind != "lm" and len(free) == 1:
        found.target = free.pop()
    _settle(found, free, columns, kind, origin)
    for part, value in (("inputs", found.inputs), ("target", found.target), ("choices", found.choices)):
        if value and part not in said:
            found.notes.append(
                f"{part}: {value if isinstance(value, str) else ', '.join(value)}, guessed from the columns"
            )
    return found


def _first_pair(free: Sequence[str]) -> tuple[str, ...]:
    lower = {c.lower(): c for c in free}
    return next(((lower[a], lower[b]) for a, b in INPUT_PAIRS if a in lower and b in lower), ())


def _settle(found: Columns, free: Sequence[str], columns: Sequence[str], kind: str | None, origin: str) -> None:
    """Raises DataError where the guess came to nothing."""
    there = f"The columns are {listing(sorted(columns))}"
    if not found.inputs:
        raise DataError(
            f"{origin}: which column is the input cannot be told. {there}; pass inputs=, as in inputs='text'."
        )
    if not found.target and kind != "lm" and (free or kind):
        raise DataError(f"{origin}: which column is the target cannot be told. {there}; pass target=, or kind='lm'.")
    if kind == "choose" and not found.choices:
        raise DataError(f"{origin}: kind choose needs a column with the choices of each row. {there}; pass choices=.")


def guess_kind(values: Sequence[Any], columns: Columns, untyped: bool) -> tuple[str, str]:
    """The kind, and why, from the target's values without missing ones. `untyped`: all came as text (CSV)."""
    if columns.choices:
        return "choose", f"guessed from the column {columns.choices[0]!r}"
    if not columns.target:
        return "lm", "guessed, as there is a text column and no target"
    enough = MOSTLY * len(values)
    lists = sum(isinstance(v, (list, tuple)) or (untyped and v.lstrip().startswith("[")) for v in values)
    column = repr(columns.target)
    if values and lists >= enough:
        return "multilabel", f"guessed from the lists in column {column}"
    numbers = [n for n in (number(v, untyped) for v in values) if n is not None]
    distinct = len({str(v) for v in values})
    why = f"guessed from {distinct} distinct values in column {column}"
    if numbers and len(numbers) >= enough:
        if any(isinstance(n, float) for n in numbers):
            return "regress", f"guessed from the numbers in column {column}"
        named = columns.target.lower() in LABEL_NAMES and _few(distinct, len(values))
        return ("classify" if distinct <= 20 or named else "regress"), why
    return ("classify" if _few(distinct, len(values)) else "generate"), why


def _few(distinct: int, rows: int) -> bool:
    """Whether so few distinct texts are label names rather than free text."""
    if not 0 < distinct <= 200:
        return False
    return (distinct <= max(20, 0.05 * rows) and rows >= 2 * distinct) or rows >= 5 * distinct


def number(value: Any, untyped: bool) -> int | float | None:
    """The value as a number; text counts only where a format has no other type."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value
    if untyped and isinstance(value, str) and "_" not in value:
        try:
            return int(value) if re.fullmatch(r"\s*[+-]?\d+\s*", value) else float(value)
        except ValueError:
            return None
    return None
