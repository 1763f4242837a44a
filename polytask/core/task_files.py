"""Files and tables become rows that still know their file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from polytask.core.errors import DataError, StorageError, listing, nearest

Row = tuple[str, dict[str, Any]]

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
PACKED: dict[str, Callable[[bytes], bytes]] = {"xz": lzma.decompress, "gz": gzip.decompress}
SOURCES = (
    "a .jsonl, .json, .csv, .tsv or .parquet file (also .xz or .gz), a folder, a datasets.Dataset or DatasetDict, "
    "a pandas.DataFrame, a list of dicts, or a dict of split to one of these"
)


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used: where it is, the reason in two words for counting, and the whole clause."""

    where: str
    reason: str
    detail: str


@dataclass
class Raw:
    """What a source holds, before anything is made of it."""

    name: str
    origin: str
    splits: dict[str, list[Row]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    class_names: dict[str, list[str]] = field(default_factory=dict)  # by column, for integer labels with names
    image_columns: list[str] = field(default_factory=list)
    untyped: bool = False  # every value came as text
    folder: Path | None = None  # what image paths are relative to


def format_or_none(path: Path) -> tuple[str, str, str] | None:
    """Stem, format and packing by the file's name."""
    parts = path.name.split(".")
    packed = parts.pop().lower() if len(parts) > 2 and parts[-1].lower() in PACKED else ""
    if len(parts) < 2 or parts[-1].lower() not in FORMATS or (packed and parts[-1].lower() == "parquet"):
        return None
    return ".".join(parts[:-1]), parts[-1].lower(), packed


def file_format(path: Path) -> tuple[str, str, str]:
    """Stem, format and packing by the file's name. Raises DataError for another format."""
    found = format_or_none(path)
    if not found:
        hint = nearest(path.suffix.lstrip("."), FORMATS)
        raise DataError(f"{path.name} is not of a format that can be read{hint}. A task is read from {SOURCES}.")
    return found


def read_file(path: Path, origin: str, split: str, raw: Raw) -> None:
    """Add a file's rows. Raises DataError when it is empty or damaged, StorageError when it may not be read."""
    if path.is_dir():
        raise DataError(f"{origin} is a folder where a file is needed. Name the file in it.")
    _, form, packed = file_format(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be read ({error}). Check its permissions.") from error
    if packed:
        try:
            data = PACKED[packed](data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{origin} is damaged or not .{packed} ({error}). Pack or download it again.") from error
    if not data.strip():
        raise DataError(f"{origin} is empty. Write at least one row, or remove the file.")
    if form == "parquet":
        _read_parquet(data, origin, split, raw)
        return
    text = _decode(data, origin)
    if form in ("csv", "tsv"):
        _read_csv(text, form, origin, split, raw)
    elif form == "jsonl":
        _read_jsonl(text, origin, split, raw)
    else:
        _read_json(text, origin, split, raw)


def _decode(data: bytes, origin: str) -> str:
    """Text, with a surrogate for each byte that is not UTF-8, so that the row it is in can be named."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{origin} is UTF-16, and must be UTF-8. Save it again as UTF-8.")
    return data.decode("utf-8-sig", errors="surrogateescape")


def _read_jsonl(text: str, origin: str, split: str, raw: Raw) -> None:
    rows = raw.splits.setdefault(split, [])
    # Split on "\n" alone: texts hold \x85, \u2028 and the like, at which splitlines() would cut a row in two.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{origin}:{line_number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raw.bad.append(Bad(where, "invalid JSON", f"invalid JSON ({error.msg}, column {error.colno})"))
        except (ValueError, RecursionError) as error:
            raw.bad.append(Bad(where, "invalid JSON", f"JSON that cannot be read ({error})"))
        else:
            _add(value, where, rows, raw)


def _add(value: Any, where: str, rows: list[Row], raw: Raw) -> None:
    if isinstance(value, Mapping):
        rows.append((where, {str(key): _plain(item) for key, item in value.items()}))
    else:
        detail = f"is {type(value).__name__}, and a row must be an object with named fields"
        raw.bad.append(Bad(where, "not an object", detail))


def _plain(value: Any) -> Any:
    """A numpy scalar as Python's own type."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _read_json(text: str, origin: str, split: str, raw: Raw) -> None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        first = text.strip().split("\n", 1)[0]
        if first.startswith("{") and first.rstrip().endswith("}"):
            _read_jsonl(text, origin, split, raw)  # many publish JSON lines as .json
            return
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{origin}{line}: invalid JSON ({error}). Correct it, or write one row a line as .jsonl."
        ) from error
    if isinstance(content, dict) and "Instances" in content:
        read_instances(content, split, raw)
    elif isinstance(content, list):
        read_table(content, origin, split, raw)
    else:
        raise DataError(
            f"{origin} must hold a list of rows, or a Natural-Instructions task with Definition and Instances."
        )


def read_instances(content: Mapping[str, Any], split: str, raw: Raw) -> None:
    """A Natural-Instructions task. Raises DataError when its definition or instances are of another shape."""
    definition, instances = content.get("Definition", ""), content["Instances"]
    lines = [definition] if isinstance(definition, str) else definition
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise DataError(f"{raw.origin}: Definition must be a text or a list of texts.")
    if not isinstance(instances, Sequence) or isinstance(instances, str) or not instances:
        raise DataError(f"{raw.origin}: Instances must be a list with at least one row.")
    said = {"kind": "generate", "inputs": ("input",), "target": "output", "instruction": "\n".join(lines).strip()}
    raw.settings = {**said, **raw.settings}
    rows = raw.splits.setdefault(split, [])
    for item, instance in enumerate(instances, start=1):
        _add(instance, f"{raw.origin}, instance {item}", rows, raw)
    for _, row in rows:
        if isinstance(row.get("output"), list):
            row["output"] = row["output"][0] if row["output"] else None  # the first of several references


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the csv module's limit of 131,072 characters a field, which is global, and puts it back."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _records(text: str, delimiter: str, quoted: bool, origin: str) -> list[tuple[int, list[str]]]:
    """Each record with the line it starts at. Raises DataError where quotes are broken."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    records, start = [], 1
    with _long_fields():
        try:
            for fields in reader:
                if fields:
                    records.append((start, fields))
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{origin}:{start}: not valid CSV ({error}). Correct the quotes, or write .jsonl."
            ) from error
    return records


def _read_csv(text: str, form: str, origin: str, split: str, raw: Raw) -> None:
    head = text.lstrip("\n").split("\n", 1)[0]
    delimiter = "\t" if form == "tsv" else ";" if ";" in head and "," not in head else ","
    records = _records(text, delimiter, True, origin)
    lines = [line for line in text.split("\n") if line.strip()]
    plain = len({line.count("\t") for line in lines}) == 1
    if form == "tsv" and plain and "\t" in head and len(records) < len(lines):
        # Many TSV files never quote, and a stray quote would swallow the lines up to the next one.
        records = _records(text, delimiter, False, origin)
        raw.notes.append(f"{origin}: quotes were read as ordinary characters")
    header = [column.strip() for column in records[0][1]]
    if any("\x00" in column or not _is_utf8(column) for column in header):
        raise DataError(f"{origin} is not text: its first line holds bytes that are not UTF-8. Save it again as UTF-8.")
    if twice := [column for column in header if header.count(column) > 1]:
        raise DataError(f"{origin}:1: the header names the column {twice[0]!r} twice. Rename one.")
    if len(records) == 1:
        raise DataError(f"{origin} has a header ({listing(header)}) and no rows. Write at least one row below it.")
    raw.untyped = True
    rows = raw.splits.setdefault(split, [])
    for line_number, fields in records[1:]:
        where = f"{origin}:{line_number}"
        if len(fields) == len(header):
            rows.append((where, dict(zip(header, fields, strict=True))))
        else:
            detail = (
                f"has {len(fields)} fields where the header has {len(header)} (a text with {delimiter!r} needs quotes)"
            )
            raw.bad.append(Bad(where, "wrong number of fields", detail))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(data: bytes, origin: str, split: str, raw: Raw) -> None:
    pa = import_module("pyarrow")  # heavy, and only this format needs it
    pq = import_module("pyarrow.parquet")
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{origin} is damaged or not Parquet ({error}). Write or download it again.") from error
    meta = (table.schema.metadata or {}).get(b"huggingface")
    _features(json.loads(meta).get("info", {}).get("features", {}) if meta else {}, raw)
    _add_rows(table.to_pylist(), origin, split, raw)


def read_table(table: Any, origin: str, split: str, raw: Raw) -> None:
    """Rows of a datasets.Dataset, a DataFrame or a list of dicts. Raises DataError for anything else."""
    if hasattr(table, "features") and hasattr(table, "to_list"):
        _features(table.features.to_dict(), raw)
        _add_rows(table.to_list(), origin, split, raw)
    elif hasattr(table, "columns") and hasattr(table, "to_dict"):
        _add_rows(table.to_dict("records"), origin, split, raw)
    elif isinstance(table, Sequence) and not isinstance(table, (str, bytes)):
        _add_rows(table, origin, split, raw)
    else:
        raise DataError(f"A task cannot be read from {type(table).__name__}. It is read from {SOURCES}.")


def _add_rows(items: Sequence[Any], origin: str, split: str, raw: Raw) -> None:
    if not items:
        raise DataError(f"{origin} has no rows. Give at least one.")
    rows = raw.splits.setdefault(split, [])
    for number, item in enumerate(items, start=1):
        _add(item, f"{origin}, row {number}", rows, raw)
    for _, row in rows:
        for column, names in raw.class_names.items():
            row[column] = _class_name(row.get(column), names)


def _features(features: Mapping[str, Any], raw: Raw) -> None:
    """Note which columns are ClassLabel (alone or in lists) and which are images."""
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            raw.class_names[column] = list(inner["names"])
        elif isinstance(inner, dict) and inner.get("_type") == "Image":
            raw.image_columns.append(column)


def _class_name(value: Any, names: Sequence[str]) -> Any:
    """The name of an integer label. -1 stands for "unlabelled" in `datasets`, so it counts as missing."""
    if isinstance(value, list):
        return [_class_name(item, names) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return names[value] if 0 <= value < len(names) else None
    return value
