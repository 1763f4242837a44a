"""Rows become a task: columns and kind settled, every row checked, missing splits made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polytask.core.errors import ConfigError, DataError, listing, nearest
from polytask.core.read import open_source
from polytask.core.task import SPLITS, Example, count_duplicates
from polytask.core.task_files import Bad, Raw, Row
from polytask.core.task_guess import (
    SPLIT_NAMES,
    UNDIVIDED,
    Columns,
    check_settings,
    guess_columns,
    guess_kind,
    require,
)
from polytask.core.task_rows import Maker, examples, missing

LONG = 10_000  # characters from which a text's length is worth a note
TOLD = 5  # bad rows named in one message


def build(source: Any, name: str | None, skip_bad_rows: bool, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the `Task` in a source. Raises what `Task.read` raises."""
    given = check_settings({**overrides, "name": name}, "Task.read")
    raw = open_source(source, given)
    said = {**raw.settings, **given}
    if "where" in said:
        _keep(raw, said["where"])
    _divide_by_column(raw)
    if not any(raw.splits.values()):
        _settle_bad(raw, raw.bad, skip=False)
        raise DataError(f"{raw.origin} has no rows. Give at least one.")
    columns = _find_columns(raw, said)
    kind = said.get("kind") or _guess(raw, columns)
    if kind == "lm":
        columns.target = ""
    make, labels = Maker.of(raw, said, columns, kind)
    bad = list(raw.bad)
    splits = {split: list(examples(rows, make, bad)) for split, rows in raw.splits.items()}
    labels = labels or _seen_labels(splits, kind, ordered=said.get("labels"))
    splits = {split: list(_known(split, e, kind, labels, make, bad)) for split, e in splits.items()}
    _settle_bad(raw, bad, skip_bad_rows)
    task_name = said.get("name") or _name(raw, said)
    _check_sizes(task_name, kind, splits, labels, skip_bad_rows)
    notes = raw.notes + columns.notes
    train, dev, test = _carve(splits, notes)
    _observe((train, dev, test), notes)
    texts = ("instruction", "metric", "description", "licence", "group", "direction")
    return {
        **{key: said.get(key, "") for key in texts},
        "about": _about(said.get("about", {}), labels, task_name),
        "name": task_name,
        "kind": kind,
        "train": train,
        "dev": dev,
        "test": test,
        "labels": labels,
        "inputs": columns.inputs,
        "target": columns.target,
        "modality": said.get("modality", "text"),
        "notes": notes,
    }


def _about(given: Mapping[str, str], labels: Sequence[str], name: str) -> dict[str, str]:
    """Descriptions of all labels, or of none. Raises ConfigError."""
    if given and (wrong := set(given) ^ set(labels)):
        raise ConfigError(
            f"{name}: about must describe each label once; it lacks or does not know {listing(sorted(wrong))}"
        )
    return dict(given)


def _name(raw: Raw, said: Mapping[str, Any]) -> str:
    """A file that holds several tasks is told apart by its column `task`."""
    picked = said.get("where", {}).get("task")
    name = picked if isinstance(picked, str) else raw.name
    return str(check_settings({"name": name}, raw.origin)["name"])


# --- which rows


def _keep(raw: Raw, where: Mapping[str, Any]) -> None:
    """Leave the rows whose columns have the values asked for. Raises DataError when none has."""
    rows = [row for part in raw.splits.values() for _, row in part]
    there = {column for row in rows for column in row}
    allowed: dict[str, set[str]] = {}
    for column, value in where.items():
        require(column, there, raw.origin)
        # Compared as text, since a CSV has no other type.
        allowed[column] = {str(v) for v in (value if isinstance(value, (list, tuple, set)) else [value])}
    for split, part in raw.splits.items():
        raw.splits[split] = [(w, r) for w, r in part if all(str(r.get(c)) in allowed[c] for c in allowed)]
    if not any(raw.splits.values()):
        column, value = next(iter(where.items()))
        values = sorted({str(row.get(column)) for row in rows})
        raise DataError(
            f"{raw.origin} has no row where {' and '.join(f'{c} is {v!r}' for c, v in where.items())}"
            f"{nearest(str(value), values)}; the values of {column!r} are {listing(values)}."
        )
    raw.splits = {split: part for split, part in raw.splits.items() if part}


def _divide_by_column(raw: Raw) -> None:
    """A single table may say in a column `split` where each row belongs."""
    if set(raw.splits) != {UNDIVIDED}:
        return
    rows = raw.splits[UNDIVIDED]
    column = next((c for _, row in rows for c in row if c.lower() == "split"), None)
    values = {str(row.get(column)).strip().lower() for _, row in rows} if column is not None else set()
    if not values & set(SPLIT_NAMES):
        return
    raw.splits = {}
    for where, row in rows:
        value = row.get(column or "")
        split = SPLIT_NAMES.get(str(value).strip().lower())
        if split:
            raw.splits.setdefault(split, []).append((where, row))
        else:
            detail = (
                f"{column!r} is {value!r}{nearest(str(value), SPLIT_NAMES)}, and must be one of {listing(SPLIT_NAMES)}"
            )
            raw.bad.append(Bad(where, "unknown split", detail))


# --- which columns, which kind


def _find_columns(raw: Raw, said: dict[str, Any]) -> Columns:
    rows = [row for part in raw.splits.values() for _, row in part]
    there = list(dict.fromkeys(column for row in rows for column in row))
    used = {c for c in there if any(not missing(row.get(c)) for row in rows)}
    images = [c for c in raw.image_columns if c in there]
    if images and "modality" not in said and not any(c not in images for c in said.get("inputs", ())):
        said["modality"] = "image"
        raw.notes.append("modality: image, guessed from the type of a column")
        said.setdefault("inputs", (images[0],))
    candidates = [c for c in there if c in used and c not in said.get("where", {})]
    if "task" in candidates and len(tasks := {str(row.get("task")) for row in rows}) > 1:
        raw.notes.append(f"column 'task' holds {len(tasks)} values; where={{'task': ...}} reads one of them")
    return guess_columns(there, [c for c in candidates if c != "task"], said, raw.origin)


def _guess(raw: Raw, columns: Columns) -> str:
    seen = _reference(raw.splits)
    values = [row.get(columns.target) for rows in seen for _, row in rows] if columns.target else []
    kind, why = guess_kind([v for v in values if not missing(v)], columns, raw.untyped)
    if columns.target in raw.class_names and kind == "generate":
        kind, why = "classify", f"guessed from the class names of column {columns.target!r}"
    if (
        kind in ("classify", "multilabel")
        and columns.target not in raw.class_names
        and _open_ended(raw, columns.target)
    ):
        kind, why = "generate", f"guessed, as many values of column {columns.target!r} outside train are not in train"
    columns.notes.append(f"kind: {kind}, {why}")
    return kind


def _open_ended(raw: Raw, column: str) -> bool:
    """Whether the other splits keep bringing new targets, as answers do and class names do not."""

    def held(rows: Sequence[Row]) -> list[str]:
        values = [row.get(column) for _, row in rows]
        return [str(v) for value in values for v in (value if isinstance(value, list) else [value])]

    seen = {value for rows in _reference(raw.splits) for value in held(rows)}
    held_out = [value for split in ("dev", "test") for value in held(raw.splits.get(split, []))]
    new = [value for value in held_out if value not in seen]
    return len(set(new)) >= 3 and len(new) > 0.05 * len(held_out)


def _reference(splits: Mapping[str, Any]) -> list[Any]:
    """The rows that say what a task is: those to learn from, or all when there are none."""
    learnt = [splits[s] for s in ("train", UNDIVIDED) if splits.get(s)]
    return learnt or list(splits.values())


# --- labels, sizes, bad rows


def _labels_of(example: Example) -> list[str]:
    return example.target if isinstance(example.target, list) else [example.target]


def _seen_labels(splits: Mapping[str, list[Example]], kind: str, ordered: Any) -> tuple[str, ...]:
    if kind not in ("classify", "multilabel"):
        return tuple(ordered or ())
    return tuple(sorted({label for part in _reference(splits) for e in part for label in _labels_of(e)}))


def _known(
    split: str, examples: list[Example], kind: str, labels: Sequence[str], make: Maker, bad: list[Bad]
) -> Iterable[Example]:
    """The examples whose labels are known; the others join the bad rows."""
    known = set(labels)
    for example in examples:
        strange = [x for x in _labels_of(example) if x not in known] if kind in ("classify", "multilabel") else []
        if not strange:
            yield example
        elif make.said_labels or make.columns.target in make.raw.class_names:
            detail = (
                f"label {strange[0]!r} is not one of the labels given{nearest(strange[0], labels)}: {listing(labels)}"
            )
            bad.append(Bad(example.where, "label not given", detail))
        else:
            detail = f"label {strange[0]!r} in {split} does not occur in train{nearest(strange[0], labels)}"
            bad.append(Bad(example.where, "label not in train", detail))


def _settle_bad(raw: Raw, bad: Sequence[Bad], skip: bool) -> None:
    """Raises DataError for bad rows, naming the first few, or counts them by reason in a note."""
    if not bad:
        return
    if skip:
        counts = Counter(b.reason for b in bad)
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        raw.notes.append(f"left out {len(bad)} bad row{'s' * (len(bad) > 1)}: {reasons}")
        return
    first = sorted(bad, key=lambda b: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", b.where)])
    told = "; ".join(f"{b.where}: {b.detail}" for b in first[:TOLD])
    what = "Fix the row, or pass skip_bad_rows=True / --skip-bad-rows to leave it out."
    if len(bad) > 1:
        more = f"; and {len(bad) - TOLD} more" if len(bad) > TOLD else ""
        told = f"{raw.origin} has {len(bad)} bad rows. {told}{more}"
        what = "Fix the rows, or pass skip_bad_rows=True / --skip-bad-rows to leave them out."
    raise DataError(f"{told}. {what}")


def _check_sizes(
    name: str, kind: str, splits: Mapping[str, list[Example]], labels: Sequence[str], skipped: bool
) -> None:
    """Raises DataError when nothing is left, or a classification has one class."""
    if not any(splits.values()):
        raise DataError(f"Task {name!r} has no usable row{' left: all of them are bad' * skipped}.")
    if kind == "classify" and len(labels) < 2:
        raise DataError(
            f"Task {name!r}: every row has the label {labels[0]!r}, and kind classify needs two labels or more. "
            f"Add rows of another label, give `labels`, or choose another target column or kind."
        )


# --- splits


def _carve(splits: Mapping[str, list[Example]], notes: list[str]) -> tuple[list[Example], ...]:
    """train, dev, test; those not given are taken by a hash of the inputs, so that an added row moves no other."""
    pool = splits.get("train", splits.get(UNDIVIDED))
    if pool is None:
        notes.append("there is no train split: the task can be evaluated, not learnt")
        return [], splits.get("dev", []), splits.get("test", [])
    parts: dict[str, list[Example]] = {"train": []}
    parts |= {split: splits.get(split, []) for split in ("dev", "test")}
    made = [split for split in ("dev", "test") if split not in splits]
    if not made:
        return pool, parts["dev"], parts["test"]
    for example in pool:
        tenth = int(example.key[:15], 16) * 10 >> 60  # 0..9, all equally likely
        split = {8: "dev", 9: "test"}.get(tenth, "train")
        parts[split if split in made else "train"].append(example)
    sizes = ", ".join(f"{split} {len(parts[split])}" for split in ("train", *made))
    notes.append(f"splits: {' and '.join(made)} taken by a hash of the inputs ({sizes})")
    return parts["train"], parts["dev"], parts["test"]


def _observe(parts: Sequence[list[Example]], notes: list[str]) -> None:
    """Notes on what may surprise: duplicates across splits, empty splits, a very long text."""
    if duplicates := count_duplicates(parts):
        notes.append(f"duplicates: {duplicates} examples of dev and test have the inputs of an earlier split")
    for split, part in zip(SPLITS, parts, strict=True):
        if not part:
            notes.append(f"{split} is empty")
    longest = max((len(text) for part in parts for e in part for text in e.inputs), default=0)
    if longest >= LONG:
        notes.append(
            f"the longest text has {longest:,} characters; what is more than a base can take (512 tokens, unless `longest` "
            "says otherwise) is cut off"
        )
