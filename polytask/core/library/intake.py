"""How an adapter comes into a library: written where nobody sees it yet, with what the index holds and its signatures."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LibraryError
from ..storage import write, writing
from .entry import RECORD, SIGNATURES, Entry, describe, record, stamps

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..callables import Embedder
    from ..model import Model
    from ..task import Task


def staged(
    adapter: Adapter, place: Path, name: str, tags: tuple[str, ...], tasks: Sequence[Task], model: Model | None,
    embed: Embedder | None, kinds: Collection[str] | None = None,
) -> Entry:  # fmt: skip
    """Writes everything of an adapter into a folder that nobody sees yet. Returns its entry.

    Args:
        adapter: stays as it is.
        place: the folder.
        name: what it will be called.
        tags: of it.
        tasks: what it learned from, where data is at hand.
        model: the base, where it is at hand.
        embed: makes vectors of texts.
        kinds: of signatures that are computed; all when None.

    Raises:
        StorageError: the folder cannot be written.
    """
    from ..files import CARD

    own = copy.copy(adapter)
    own.name = name
    own.save(place)
    said = json.loads((place / CARD).read_bytes())
    entry = describe(own, name, tags, datetime.now(UTC).isoformat(timespec="microseconds"), str(said["hash"]))
    return completed(own, place, replace(entry, folder=name), tasks, model, embed, kinds)


def completed(
    adapter: Adapter,
    place: Path,
    entry: Entry,
    tasks: Sequence[Task],
    model: Model | None,
    embed: Embedder | None,
    kinds: Collection[str] | None,
) -> Entry:
    """Adds every signature that can be computed and the hashes of the files, and writes the record."""
    from ..signature import Subject, encoded, signatures

    subject = Subject(adapter, model, tasks, embed)
    with writing(place):
        for kind in signatures if kinds is None else kinds:
            made = signatures.make(kind).sign(subject)
            if made is not None:
                (place / SIGNATURES).mkdir(exist_ok=True)
                write(place / SIGNATURES / f"{kind}.safetensors", encoded(made[0], {**made[1], "adapter": entry.hash}))
        entry = entry.with_files(stamps(place))
        write(place / RECORD, record(entry))
    return entry


def adopted(
    root: Path,
    folder: Path,
    before: Entry | None,
    write: bool,
    model: Model | None,
    embed: Embedder | None,
    kinds: Collection[str] | None = None,
) -> Entry:
    """The entry of an adapter that lies in the library already.

    Args:
        root: the library's folder.
        folder: of the adapter.
        before: what was known of it.
        write: also compute its signatures, and write its record.
        model: the base, where it is at hand.
        embed: makes vectors of texts.
        kinds: of signatures that are computed; all when None.

    Raises:
        AdapterError: it cannot be read.
        LibraryError: its values are not those that were saved.
    """
    from ..adapter import Adapter
    from ..files import CARD, MARK, WEIGHTS

    adapter = Adapter.load(folder)
    hash = adapter.hash
    if (folder / CARD).is_file() and (mark := _mark(folder / WEIGHTS, MARK)) and mark != hash:
        raise LibraryError(
            f"{folder / WEIGHTS} was changed or damaged: its values have the hash {hash[:8]}, not {mark[:8]}"
        )
    when = datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="microseconds")
    name = before.name if before else folder.name.rpartition("~")[0] or folder.name
    tags, added = (before.tags, before.added or when) if before else ((), when)
    entry = replace(describe(adapter, name, tags, added, hash), folder=folder.relative_to(root).as_posix())
    if write:
        return completed(adapter, folder, entry, (), model, embed, kinds)
    return entry.with_files(stamps(folder))


def _mark(file: Path, key: str) -> str:
    """The hash that a file of weights names; empty where it names none."""
    from safetensors import safe_open

    if not file.is_file():
        return ""
    with safe_open(file, framework="pt") as opened:
        return str((opened.metadata() or {}).get(key, ""))
