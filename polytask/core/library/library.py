"""A library: many adapters over one base in a folder, with an index, opened without reading a weight."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, LibraryError, listing, nearest
from ..storage import write, writing
from . import mend as _mend
from .entry import (
    RECORD,
    REMOVED,
    SIGNATURES,
    Entry,
    Finding,
    checked_name,
    checked_tags,
    hashed,
    record,
    removed_place,
    stamp,
    tags_without,
    temporary,
)  # fmt: skip
from .imported import Imported, import_all
from .intake import staged
from .shelf import Shelf

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapter import Adapter
    from ..task import Task


class Library(Shelf):
    """Adapters by name in a folder: ``lib["mood"]`` reads one when it is asked for, everything else asks the index.

    A sub-folder is an adapter as `Adapter.save` writes it, which PEFT reads too. The index (SQLite) repeats what the folders say:
    it is made again where it is lost or damaged, and put right where a process ended in between. Several processes may write.

    Args:
        path: the folder; made when something is added.
        model: the base, or what `Model.load` takes; loaded when it is needed.
        embed: makes vectors of texts for the signature ``text``.
        signatures: the kinds that are computed when an adapter is added, as far as what they need is at hand; all when None.
        repair: put right what is found when it is opened; else it is only told (`findings`).

    Attributes:
        root: the folder.
        findings: what was found, and mostly repaired, when it was opened.

    Raises:
        LibraryError: the path is a file.
        ConfigError: there is no such kind of signature.
        StorageError: the index cannot be written.
    """

    # Coming and going

    def add(
        self,
        adapter: Adapter | str | Path,
        name: str | None = None,
        tags: Iterable[str] = (),
        data: Task | Sequence[Task] | None = None,
        replace: bool = False,
        check_base: bool = True,
    ) -> str:
        """Writes an adapter into the library, with its signatures.

        Args:
            adapter: an adapter, a folder, or a hub name.
            name: what it is called here; its own name (or its folder's) when None.
            tags: words to find it by.
            data: the tasks it learned from, for signatures that look at examples.
            replace: put it in the place of one that has the name; that one is removed, and kept until `gc`.
            check_base: refuse an adapter that was made for another base than the others.

        Returns:
            The name.

        Raises:
            LibraryError: the name is taken, or none.
            AdapterError: it cannot be read, is for another base, or does not fit the model.
            StorageError: the library cannot be written.
        """
        from ..adapter import Adapter

        found, folder = (adapter, "") if isinstance(adapter, Adapter) else (Adapter.load(adapter), Path(adapter).name)
        chosen = checked_name(name or found.name or folder)
        words = checked_tags(tags)
        if not replace:
            self._free(chosen)
        if check_base:
            self._check_base(found)
        place = temporary(self.root)
        try:
            tasks = [] if data is None else list(data) if isinstance(data, Sequence) else [data]
            entry = staged(found, place, chosen, words, tasks, self._base(bool(tasks)), self._embed, self._kinds)
            with self._ready().writing() as db, writing(self.root):
                if check_base:
                    self._check_base(found)  # another may have been the first
                target = self.root / chosen
                if not replace:
                    self._free(chosen)
                elif target.exists():
                    old, gone = self._index.row(chosen), removed_place(self.root, chosen)
                    gone.parent.mkdir(exist_ok=True)
                    os.rename(target, gone)
                    if old is not None:
                        self._moved(db, old, gone)
                os.rename(place, target)
                self._index.put(db, entry)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return chosen

    def _free(self, name: str) -> None:
        if self._ready().row(name) is not None or (self.root / name).exists():
            raise LibraryError(
                f"{self.root} has an adapter called {name!r}; choose another name (name=, --name), or replace it (replace=True)"
            )

    def _check_base(self, adapter: Adapter) -> None:
        mine = str(adapter.card.base.get("fingerprint") or "")
        known, print_ = self._ready().fingerprint()
        if not print_ and self._model is not None and (model := self.model) is not None:
            known, print_ = model.name, model.fingerprint
        if mine and print_ and mine != print_:
            raise AdapterError(
                f"the adapter {adapter.name!r} was made for the base {adapter.card.base.get('name')!r} (weights {mine[:8]}), and "
                f"this library is for {known!r} (weights {print_[:8]}); use another library, or pass check_base=False"
            )
        if not mine and self._model is not None and not isinstance(self._model, str):
            for patch in adapter.patches.values():  # its file names no weights; at least its shapes must fit
                adapter.fit(patch, self._model)

    def _moved(self, db: Any, entry: Entry, gone: Path) -> None:
        """The row of an adapter whose folder has just been put aside."""
        self._index.drop(db, entry.folder)
        self._index.put(db, replace(entry, folder=f"{REMOVED}/{gone.name}", state="removed"))

    def remove(self, name: str) -> None:
        """Takes an adapter away. Its folder is kept until `gc`, and `restore` brings it back."""
        plain = checked_name(name)
        with self._ready().writing() as db, writing(self.root):
            entry = self._index.row(plain)
            if entry is None:
                raise self._unknown(name, None)
            gone = removed_place(self.root, plain)
            gone.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                os.rename(self.root / plain, gone)
            self._moved(db, entry, gone)

    def restore(self, name: str) -> str:
        """Brings back the adapter of a name that was added last of those removed. Raises `LibraryError` where there is none, or
        another has the name."""
        plain = checked_name(name)
        with self._ready().writing() as db, writing(self.root):
            found = [entry for entry in self._index.entries().values() if entry.name == plain and entry.folder != plain]
            if not found:
                gone = sorted({entry.name for entry in self.removed})
                raise LibraryError(
                    f"no removed adapter is called {name!r}{nearest(name, gone)}; there is: {listing(gone) or 'nothing'}"
                )
            self._free(plain)
            entry = self._index.row(max(found, key=lambda e: e.added).folder)
            assert entry is not None  # nobody else writes now
            os.rename(self.root / entry.folder, self.root / plain)
            self._index.drop(db, entry.folder)
            self._index.put(db, replace(entry, folder=plain, state="there"))
        return plain

    def gc(self) -> list[str]:
        """Deletes what is removed, and what processes that were ended have left. Returns the names."""
        names, places = [], []
        with self._ready().writing() as db, writing(self.root):
            for entry in self.removed:
                place = temporary(self.root)
                with suppress(FileNotFoundError):
                    os.rename(self.root / entry.folder, place)
                self._index.drop(db, entry.folder)
                names.append(entry.name)
                places.append(place)
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        return [*names, *[finding.name for finding in _mend.leftovers(self.root, repair=True)]]

    def tag(self, name: str, *tags: str) -> tuple[str, ...]:
        """Adds tags to an adapter. Returns all it has."""
        added = checked_tags(tags)
        return self._retagged(name, lambda old: tuple(dict.fromkeys((*old, *added))))

    def untag(self, name: str, *tags: str) -> tuple[str, ...]:
        """Takes tags from an adapter. Returns those that are left; `LibraryError` where it has none of them."""
        return self._retagged(name, lambda old: tags_without(old, tags, name))

    def _retagged(self, name: str, change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> tuple[str, ...]:
        with self._ready().changing(checked_name(name)) as db, writing(self.root):
            entry = self.show(name)
            made = replace(entry, tags=change(entry.tags))
            write(self.root / entry.folder / RECORD, record(made))
            self._index.put(db, made)
        return made.tags

    # Signatures

    def sign(self, name: str, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
        """Keeps a signature beside an adapter, in place of one of the same kind.

        Args:
            name: of the adapter.
            kind: what it is called: letters, digits, ``_`` and ``-``.
            tensors: by site; under the empty name what is of the whole adapter.
            about: what it was computed from, as plain values.
        """
        from ..signature import encoded

        if not kind.replace("-", "").replace("_", "").isalnum():
            raise LibraryError(f"{kind!r} cannot be a kind of signature; use letters, digits, _ and -")
        with self._ready().changing(checked_name(name)) as db, writing(self.root):
            entry = self.show(name)
            place = self.root / entry.folder / SIGNATURES
            place.mkdir(exist_ok=True)
            file = place / f"{kind}.safetensors"
            write(file, encoded(tensors, {**(about or {}), "adapter": entry.hash}))
            files = {**entry.files, f"{SIGNATURES}/{file.name}": stamp(file)}
            made = entry.with_files(files)
            write(self.root / entry.folder / RECORD, record(made))
            self._index.put(db, made)

    # Looking after all

    def import_(self, folder: str | Path, tags: Iterable[str] = (), **options: Any) -> Imported:
        """Adds every adapter below a folder, ours or PEFT's; see `polytask.core.library.imported.import_all`."""
        return import_all(self, Path(folder).expanduser(), tuple(tags), options)

    def export(self, name: str, folder: str | Path) -> Path:
        """Copies an adapter's files, without what only the library needs, into a new or empty folder.

        Raises:
            LibraryError: there is no such adapter, one of its files is not what it was, or the folder holds something.
            StorageError: the folder cannot be written.
        """
        entry, target = self.show(name), Path(folder).expanduser()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise LibraryError(f"{target} is there and not empty; choose another folder")
        part = target.absolute().with_name(temporary(target.parent).name)
        try:
            with writing(target):
                for file, known in entry.files.items():
                    if not file.startswith(f"{SIGNATURES}/"):
                        (part / file).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(self.root / entry.folder / file, part / file)
                        if hashed(part / file) != known["sha256"]:
                            raise LibraryError(f"{self.root / entry.folder / file} is not what was added; see check")
                if target.exists():
                    target.rmdir()
                os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target

    def check(self, repair: bool = False, deep: bool = True) -> list[Finding]:
        """What is not as it should be: folders and index that differ, changed and damaged files, leftovers of ended processes;
        and, once, what was found when the library was opened.

        Args:
            repair: put it right. Nothing is deleted but leftovers; adapters that cannot be read are marked and not given out.
            deep: read every file; else only those whose size or time differs.

        Raises:
            LibraryError: ``repair`` in a folder that may not be written, or opened with ``repair=False``.
        """
        if repair and not self._repair:
            raise LibraryError(
                f"{self.root} was opened without repair, or may not be written; open it with repair=True"
            )
        found, self.findings = self.findings, []
        found += _mend.mend(self.root, self._ready(), self._adopt, repair)
        found += _mend.inspected(self.root, self._index, self._adopt, repair, deep)
        found += _mend.leftovers(self.root, repair)
        return list(dict.fromkeys(found))
