"""Many adapters at once into a library."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LibraryError, PolytaskError, listing

if TYPE_CHECKING:
    from .library import Library

MARKS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass
class Imported:
    """What came of an import.

    Attributes:
        added: names by folder.
        kept: folders whose very adapter is there already, with its name.
        skipped: why others could not be added, by folder.
    """

    added: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{len(self.added)} added: {listing(self.added.values())}" if self.added else "none added"]
        lines += [f"{len(self.kept)} there already: {listing(self.kept.values())}"] if self.kept else []
        lines += [f"skipped {folder}: {reason}" for folder, reason in self.skipped.items()]
        return "\n".join(lines)


def import_all(library: Library, folder: Path, tags: tuple[str, ...], options: Mapping[str, Any]) -> Imported:
    """Adds every adapter below a folder, ours or PEFT's. What cannot be read is named and left out.

    Args:
        library: where to.
        folder: searched with all its sub-folders, hidden ones left out. An adapter is called as its folder; where two are called
            the same, as their paths.
        tags: for all.
        options: of `Library.add`: data, replace, check_base.

    Raises:
        LibraryError: there is no such folder, or no adapter in it.
    """
    from ..adapter import Adapter

    if not folder.is_dir():
        raise LibraryError(f"{folder} is no folder; give one that holds adapters")
    found = _folders(folder)
    if not found:
        raise LibraryError(f"no folder below {folder} has one of {listing(MARKS)}, so there is no adapter")
    ends = Counter(path.name for path in found)
    made = Imported()
    for path in found:
        whole = path == folder or ends[path.name] == 1
        name = _plain(path.resolve().name if whole else "-".join(path.relative_to(folder).parts))
        try:
            adapter = Adapter.load(path)
            known = library.hashes.get(name)
            if known is not None and known == adapter.hash:
                made.kept[str(path)] = name
                continue
            made.added[str(path)] = library.add(adapter, name, tags, **options)
        except PolytaskError as error:
            made.skipped[str(path)] = str(error)
    return made


def _folders(folder: Path) -> list[Path]:
    found = []
    for place, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if any(mark in files for mark in MARKS):
            found.append(Path(place))
    return found


def _plain(name: str) -> str:
    """A folder's name as an adapter's."""
    return re.sub(r"[^\w .+=@,()-]", "-", name).strip(" .")[:100] or "adapter"
