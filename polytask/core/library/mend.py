"""What a library does about what is not as it should be: folders and index that differ, changed files, leftovers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..errors import PolytaskError
from ..storage import write
from .entry import (
    RECORD,
    REMOVED,
    SIGNATURES,
    TEMPORARY,
    Entry,
    Finding,
    hashed,
    orphaned,
    read_record,
    record,
    stamp,
)  # fmt: skip
from .index import Index

# reads an adapter whose folder says nothing, or no longer the truth, and writes down what it is where it may
Adopt = Callable[[Path, Entry | None, bool], Entry]


def listing_of(root: Path) -> tuple[set[str], set[str]]:
    """The folders of the adapters that are there, and of those that are removed. Two directories are read, and no file."""
    there = {e.name for e in os.scandir(root) if not e.name.startswith(".") and e.is_dir()}
    gone: set[str] = set()
    with suppress(FileNotFoundError):
        gone = {f"{REMOVED}/{e.name}" for e in os.scandir(root / REMOVED) if e.is_dir()}
    return there, gone


def mend(root: Path, index: Index, adopt: Adopt, repair: bool = True) -> list[Finding]:
    """Makes the index say what the folders say, and ends what a process has left half done.

    Args:
        root: the library's folder.
        index: of the library.
        adopt: reads an adapter that its folder does not describe, or raises `PolytaskError`.
        repair: whether to; else differences are only told.
    """
    there, gone = listing_of(root)
    known, marks = index.folders(), index.unfinished()
    if there | gone == known.keys() and not marks:
        return []
    if not repair:
        return _differences(there | gone, set(known), marks)
    # what takes long comes before the others have to wait
    read = {folder: _entry(root, folder, adopt) for folder in sorted((there | gone) - known.keys())}
    found: list[Finding] = []
    with index.writing() as db:
        there, gone = listing_of(root)
        known = index.folders()
        for folder in sorted(gone - known.keys()):
            name = _name(folder)
            if name in known and name not in there:  # its process ended between two renames: as if it had not begun
                os.rename(root / folder, root / name)
                gone.discard(folder)
                there.add(name)
                found.append(Finding("unfinished", name, "it was being removed or replaced, and is back", True))
            elif name in known:
                marks.append(name)  # it was replaced, and the index has the row of the old one
        for folder in sorted((there | gone) - known.keys()):
            entry = read.get(folder) or _entry(root, folder, adopt)
            index.put(db, entry)
            text = entry.problem or "a folder that the index did not have"
            found.append(Finding("damaged" if entry.problem else "unindexed", _name(folder), text, not entry.problem))
        for folder in sorted(known.keys() - there - gone):
            index.drop(db, folder)
            found.append(Finding("missing", _name(folder), "its folder is gone, and so it left the index", True))
        for folder in sorted(set(marks)):
            if folder in there | gone:
                index.put(db, refreshed(root, folder, _entry(root, folder, adopt)))
            index.finished(db, folder)
            found.append(Finding("unfinished", _name(folder), "a change of it was interrupted; read again", True))
    return found


def _differences(folders: set[str], known: set[str], marks: list[str]) -> list[Finding]:
    new = [Finding("unindexed", _name(f), "a folder that the index does not have") for f in sorted(folders - known)]
    lost = [Finding("missing", _name(f), "the index has it, and its folder is gone") for f in sorted(known - folders)]
    return [*new, *lost, *[Finding("unfinished", _name(f), "a change of it was interrupted") for f in marks]]


def _name(folder: str) -> str:
    return folder.removeprefix(f"{REMOVED}/").rpartition("~")[0] if folder.startswith(REMOVED) else folder


def _entry(root: Path, folder: str, adopt: Adopt) -> Entry:
    """The entry of a folder, from what it says of itself or by reading the adapter; a damaged one where neither can be."""
    entry = read_record(root / folder)
    if entry is None:
        try:
            entry = adopt(root / folder, None, True)
        except (PolytaskError, OSError) as error:
            return Entry(_name(folder), state="damaged", folder=folder, problem=str(error))
    return replace(entry, name=_name(folder), folder=folder, state="removed" if folder.startswith(REMOVED) else "there")


def refreshed(root: Path, folder: str, entry: Entry) -> Entry:
    """The entry with the signatures that lie beside the adapter now; the record is written where that differs."""
    kept = {name: known for name, known in entry.files.items() if not name.startswith(f"{SIGNATURES}/")}
    files = {f"{SIGNATURES}/{p.name}": stamp(p) for p in sorted((root / folder / SIGNATURES).glob("*.safetensors"))}
    made = entry.with_files(kept | files)
    if made != entry:
        write(root / folder / RECORD, record(made))
    return made


def leftovers(root: Path, repair: bool) -> list[Finding]:
    """Temporary folders of processes that are gone; with ``repair`` they are deleted."""
    found = []
    for path in sorted(root.glob(f"{TEMPORARY}*")):
        with suppress(FileNotFoundError):  # its process has just finished
            if orphaned(path):
                if repair:
                    shutil.rmtree(path)
                found.append(Finding("leftover", path.name, "left by a process that was ended", repair))
    return found


def inspected(root: Path, index: Index, adopt: Adopt, repair: bool, deep: bool) -> list[Finding]:
    """What is wrong inside the adapters' folders.

    Args:
        root: the library's folder.
        index: of the library.
        adopt: reads an adapter anew.
        repair: take up files that were changed and can be read; mark adapters that cannot be read, so that nobody gets them.
        deep: read every file; else those whose size or time differs.
    """
    found = []
    for folder in index.folders():
        entry = index.row(folder)
        if entry is None:  # another process took it away
            continue
        differing = [name for name, known in entry.files.items() if _differs(root / folder / name, known, deep)]
        if not (root / folder).is_dir() or (not differing and entry.state != "damaged"):
            continue
        try:
            made = adopt(root / folder, entry, repair)
            made = replace(
                made, name=entry.name, folder=folder, state="removed" if folder.startswith(REMOVED) else "there"
            )
            finding = Finding(
                "changed", _name(folder), f"{', '.join(differing) or 'it'} can be read, and is not what it was", repair
            )
        except (PolytaskError, OSError) as error:
            made = replace(entry, state="damaged", problem=str(error))
            finding = Finding("damaged", _name(folder), f"{error}; take it from a copy, or remove it")
        if repair and made != entry:
            with index.writing() as db:
                index.put(db, made)
        found.append(finding)
    return found


def _differs(file: Path, known: dict[str, object], deep: bool) -> bool:
    try:
        now = file.stat()
        if now.st_size != known["size"]:
            return True
        return (deep or now.st_mtime_ns != known["mtime"]) and hashed(file) != known["sha256"]
    except OSError:
        return True
