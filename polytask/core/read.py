"""Sources of tasks: files, folders, `datasets` objects, tables and lists, opened as rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytask.core.errors import DataError, StorageError, listing, nearest
from polytask.core.task_files import (
    FORMATS,
    SOURCES,
    Raw,
    file_format,
    format_or_none,
    read_file,
    read_instances,
    read_table,
)
from polytask.core.task_guess import SPLIT_NAMES, UNDIVIDED, check_settings

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def open_source(source: Any, said: Mapping[str, Any]) -> Raw:
    """The rows of any source that `Task.read` takes. Raises DataError when it is none or holds nothing."""
    if isinstance(source, (str, os.PathLike)):
        path = existing(Path(source))
        if path.is_dir():
            return _read_folder(path, said)
        raw = Raw(file_format(path)[0], path.name, folder=path.parent)
        read_file(path, path.name, UNDIVIDED, raw)
        return raw
    name = str(said.get("name") or getattr(getattr(source, "info", None), "dataset_name", None) or "task")
    raw = Raw(name, name)
    if isinstance(source, Mapping) and "Instances" in source:
        read_instances(source, UNDIVIDED, raw)
    elif isinstance(source, Mapping):
        if not source:
            raise DataError(f"The source is an empty dict. A task is read from {SOURCES}.")
        known = {split: SPLIT_NAMES[split] for split in source if split in SPLIT_NAMES}
        if not known and len(source) == 1:
            known = {next(iter(source)): UNDIVIDED}
        if not known:
            raise DataError(
                f"The source's splits are {listing(map(str, source))}; at least one must be named "
                f"{listing(SPLIT_NAMES)}. Rename them, or pass one of them alone."
            )
        for key, split in known.items():
            if split in raw.splits:
                raise DataError(
                    f"The source has two splits that mean {split!r}: {listing(map(str, known))}. Leave one."
                )
            read_table(source[key], f"{name} {key}", split, raw)
        if unused := [str(key) for key in source if key not in known]:
            raw.notes.append(f"splits not used: {', '.join(unused)}")
    else:
        read_table(source, name, UNDIVIDED, raw)
    return raw


def existing(path: Path) -> Path:
    """The path, which must exist. Raises DataError with the nearest sibling, StorageError when it may not be read."""
    path = path.expanduser()
    try:
        if path.exists():
            return path
        parent = path.parent
        if not parent.is_dir():
            raise DataError(f"There is no {str(path)!r}: the folder {str(parent)!r} does not exist.")
        siblings = sorted(p.name for p in parent.iterdir())
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise StorageError(f"{str(path)!r} cannot be looked up ({error}). Check its name and permissions.") from error
    hint = nearest(path.name, siblings)
    raise DataError(f"There is no {str(path)!r}{hint}. Give the path of a file or folder that exists.")


def task_sources(path: Path) -> list[Path]:
    """The task at a path, or the tasks of a folder of tasks. Raises DataError when there is none."""
    path = existing(path)
    if path.is_file() or _is_task(path):
        return [path]
    children = [p for p in _children(path) if (_is_task(p) if p.is_dir() else format_or_none(p))]
    if not children:
        raise _no_task(path)
    return children


def _no_task(path: Path) -> DataError:
    names = [p.name for p in _children(path)]
    return DataError(
        f"There is no readable task in the folder {str(path)!r}; it holds {listing(names) or 'nothing'}. A task is a "
        f"{listing(['.' + f for f in FORMATS])} file, a folder with train, dev and test files or a task.yaml, "
        f"or a folder of images for each class."
    )


def _children(path: Path) -> list[Path]:
    """What a folder shows, in one order everywhere."""
    try:
        return sorted((p for p in path.iterdir() if not p.name.startswith((".", "__"))), key=lambda p: p.name)
    except OSError as error:
        raise StorageError(f"The folder {str(path)!r} cannot be read ({error}). Check its permissions.") from error


def _is_task(path: Path) -> bool:
    return (path / "task.yaml").is_file() or bool(_split_files(path)) or bool(_image_splits(path))


# --- folders


def _read_folder(path: Path, said: Mapping[str, Any]) -> Raw:
    """A folder with task.yaml, split files, or a folder of images for each class."""
    name = path.resolve().name or "task"
    raw = Raw(name, name, folder=path)
    yaml = path / "task.yaml"
    if yaml.is_file():
        raw.settings = check_settings(_read_yaml(yaml), f"{name}/task.yaml")
    named = said.get("files") or raw.settings.get("files")
    if named:
        files = {split: existing(path / file) for split, file in named.items()}
    else:
        files = _split_files(path)
        alone = [p for p in _children(path) if p.is_file() and format_or_none(p)]
        if not files and yaml.is_file() and len(alone) == 1:
            files = {UNDIVIDED: alone[0]}
    for split, file in files.items():
        read_file(file, f"{name}/{file.name}", split, raw)
    if not files:
        if not (classes := _image_splits(path)):
            raise _no_task(path)
        _read_images(path, classes, raw)
    return raw


def _read_yaml(path: Path) -> dict[Any, Any]:
    from polytask.core.config import parse_yaml  # which takes pydantic, and few sources have a task.yaml

    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be read ({error}). Check its permissions.") from error
    return parse_yaml(data, f"{path.resolve().parent.name}/task.yaml")


def _split_files(path: Path) -> dict[str, Path]:
    """train, dev and test files. Raises DataError when two files are the same split."""
    files: dict[str, Path] = {}
    for file in _children(path):
        found = format_or_none(file) if file.is_file() else None
        if found and (split := SPLIT_NAMES.get(found[0].lower())):
            if split in files:
                raise DataError(
                    f"The folder {str(path)!r} has two files for {split!r}: {files[split].name} and {file.name}. "
                    f"Remove one, or name one in task.yaml under `files`."
                )
            files[split] = file
    return files


def _image_splits(path: Path) -> dict[str, Path]:
    """Split to the folder that holds its classes; `all` when the classes lie in the folder itself."""
    folders = [p for p in _children(path) if p.is_dir()]
    splits = {SPLIT_NAMES[p.name.lower()]: p for p in folders if p.name.lower() in SPLIT_NAMES}
    if splits and any(_pictures(c) for s in splits.values() for c in _children(s) if c.is_dir()):
        return splits
    return {UNDIVIDED: path} if any(_pictures(p) for p in folders) else {}


def _pictures(path: Path) -> list[Path]:
    return [p for p in _children(path) if p.suffix.lower() in PICTURES]


def _read_images(path: Path, splits: Mapping[str, Path], raw: Raw) -> None:
    raw.settings = {"kind": "classify", **raw.settings, "modality": "image", "inputs": ("image",), "target": "label"}
    others = 0
    for split, folder in splits.items():
        rows = raw.splits.setdefault(split, [])
        for label in (p for p in _children(folder) if p.is_dir()):
            pictures = _pictures(label)
            others += sum(p.is_file() for p in _children(label)) - len(pictures)
            rows += [
                (f"{raw.name}/{p.relative_to(path).as_posix()}", {"image": p.absolute(), "label": label.name})
                for p in pictures
            ]
    if others:
        raw.notes.append(f"{others} files that are not images were not used")
