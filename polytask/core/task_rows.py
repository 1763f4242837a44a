"""One row becomes one example, or is refused with a reason."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytask.core.errors import DataError, listing
from polytask.core.task import Example, image_digest, open_image
from polytask.core.task_files import Bad, Raw, Row
from polytask.core.task_guess import MOSTLY, Columns, number


class _BadRow(Exception):
    """A row that cannot be used: the reason in two words, and the whole clause."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def missing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


@dataclass
class Maker:
    """Makes an example of a row, or raises _BadRow."""

    raw: Raw
    columns: Columns
    kind: str
    image: bool
    names: Mapping[str, str]  # what the column holds -> label name, where they differ
    said_labels: bool
    numeric: frozenset[str] = frozenset()  # input columns of an untyped format that hold numbers

    @classmethod
    def of(cls, raw: Raw, said: Mapping[str, Any], columns: Columns, kind: str) -> tuple[Maker, tuple[str, ...]]:
        """With the labels that are known before any row is read, which may be none."""
        labels: tuple[str, ...] = ()
        names: dict[str, str] = {}
        if kind in ("classify", "multilabel"):
            labels = said.get("labels") or tuple(sorted(raw.class_names.get(columns.target, ())))
            held = {str(row.get(columns.target)).strip() for part in raw.splits.values() for _, row in part}
            numbers = {str(index): label for index, label in enumerate(labels)}
            if labels and not held & set(labels) and held <= set(numbers):
                names = numbers
                columns.notes.append(f"labels: the numbers in column {columns.target!r} stand for {listing(labels)}")
        numeric = frozenset(column for column in columns.inputs if raw.untyped and _mostly_numbers(raw, column))
        return cls(raw, columns, kind, said.get("modality") == "image", names, "labels" in said, numeric), labels

    def __call__(self, where: str, row: Mapping[str, Any]) -> Example:
        inputs: tuple[str, ...] = ()
        image, digest = None, ""
        if self.image:
            image, digest = self._image(row)
        else:
            inputs = tuple(_text(row, column) for column in self.columns.inputs)
            for column in self.numeric:
                _finite_text(row[column], column)
        choices = self._choices(row) if self.kind == "choose" else ()
        return Example(inputs, self._target(row, choices), choices, image, where, digest)

    def _image(self, row: Mapping[str, Any]) -> tuple[Any, str]:
        column = self.columns.inputs[0]
        image = row.get(column)
        if isinstance(image, dict):  # how `datasets` keeps an image that is not decoded
            image = image.get("bytes") or image.get("path")
        if missing(image):
            raise _BadRow(f"{column!r} missing", f"{column!r} is missing")
        if isinstance(image, (str, os.PathLike)):
            image = str((self.raw.folder or Path()) / image)
        try:
            return image, image_digest(open_image(image))
        except DataError as error:
            raise _BadRow("image not readable", str(error).rstrip(".")) from error

    def _choices(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        columns = self.columns.choices
        value = _items(row, columns[0], self.raw.untyped) if len(columns) == 1 else [_text(row, c) for c in columns]
        if not isinstance(value, (list, tuple)) or len(value) < 2:
            raise _BadRow(
                "choices not a list", f"{columns[0]!r} is {_show(value)}, and must be a list of two texts or more"
            )
        return tuple(_text({columns[0]: item}, columns[0]) for item in value)

    def _target(self, row: Mapping[str, Any], choices: Sequence[str]) -> Any:
        column = self.columns.target
        if not column:
            return None
        value = row.get(column)
        if self.kind == "regress":
            return _finite(value, column, self.raw.untyped)
        if missing(value):
            raise _BadRow(f"{column!r} missing", f"{column!r} is missing")
        if self.kind == "multilabel":
            items = _items(row, column, self.raw.untyped)
            if not isinstance(items, (list, tuple)):
                raise _BadRow("wrong type", f"{column!r} is {_show(items)}, and must be a list of labels")
            return list(dict.fromkeys(self._label(item, column) for item in items))
        if self.kind == "classify":
            return self._label(value, column)
        if self.kind == "choose":
            return _chosen(value, column, choices)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]  # several references: the first is learnt from
        return _text({column: str(value) if isinstance(value, (int, float)) else value}, column)

    def _label(self, value: Any, column: str) -> str:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        label = _text({column: str(value) if isinstance(value, (int, float)) else value}, column).strip()
        return self.names.get(label, label)


def _mostly_numbers(raw: Raw, column: str) -> bool:
    values = [row.get(column) for part in raw.splits.values() for _, row in part]
    return sum(number(value, untyped=True) is not None for value in values) > MOSTLY * len(values)


def _finite_text(value: str, column: str) -> None:
    """Refuses the "nan" that programs write for a value they do not have; any other word may be meant."""
    found = number(value, untyped=True)
    if isinstance(found, float) and math.isnan(found):
        raise _BadRow("not finite", f"{column!r} is {_show(value)} in a column of numbers")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if missing(value):
        raise _BadRow(f"{column!r} missing", f"{column!r} is {'empty' if isinstance(value, str) else 'missing'}")
    if not isinstance(value, str):
        raise _BadRow("wrong type", f"{column!r} is {type(value).__name__} ({_show(value)}), and must be text")
    if "\x00" in value:
        raise _BadRow("NUL character", f"{column!r} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRow("not UTF-8", f"{column!r} is not valid UTF-8 (character {error.start + 1})") from error
    return value


def _items(row: Mapping[str, Any], column: str, untyped: bool) -> Any:
    """A list; a CSV writes it as JSON, or with | or ; between the items."""
    value = row.get(column)
    if not untyped or not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _BadRow("invalid list", f"{column!r} is {_show(value)}, which is not a JSON list") from error
    return [item.strip() for item in value.split("|" if "|" in value else ";")]


def _finite(value: Any, column: str, untyped: bool) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _BadRow(f"{column!r} missing", f"{column!r} is missing")
    found = number(value, untyped or isinstance(value, str))
    if found is None:
        raise _BadRow("not a number", f"{column!r} is {_show(value)}, and must be a number")
    try:
        finite = float(found)
    except OverflowError as error:
        raise _BadRow("not finite", f"{column!r} is too large a number") from error
    if not math.isfinite(finite):
        raise _BadRow("not finite", f"{column!r} is {finite}, and must be a finite number")
    return finite


def _chosen(value: Any, column: str, choices: Sequence[str]) -> int:
    """The index of the right choice, from its text or its index."""
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    index = number(value, untyped=True)
    if not isinstance(index, int):
        raise _BadRow(
            "not a choice", f"{column!r} is {_show(value)}, which is none of the choices ({listing(choices, 5)})"
        )
    if not 0 <= index < len(choices):
        raise _BadRow("not a choice", f"{column!r} is {index}, and must be an index from 0 to {len(choices) - 1}")
    return index


def examples(
    rows: Sequence[Row], make: Callable[[str, Mapping[str, Any]], Example], bad: list[Bad]
) -> Iterable[Example]:
    for where, row in rows:
        try:
            yield make(where, row)
        except _BadRow as error:
            bad.append(Bad(where, error.reason, error.detail))
