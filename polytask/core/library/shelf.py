"""Reading a library: what is there, found and compared, without changing it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from weakref import WeakValueDictionary

from ..errors import AdapterError, LibraryError, listing, nearest
from ..storage import writing
from . import mend as _mend
from .entry import REMOVED, SIGNATURES, Entry, Finding, checked_name
from .graph import Graph, graph
from .index import Index
from .intake import adopted
from .query import parse

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapter import Adapter
    from ..callables import Embedder
    from ..model import Model
    from .diff import Diff

D = TypeVar("D")


class Shelf(Mapping[str, "Adapter"]):
    """What `Library` reads of a folder; see there for the arguments."""

    def __init__(
        self,
        path: str | Path,
        model: Model | str | None = None,
        *,
        embed: Embedder | None = None,
        signatures: Collection[str] | None = None,
        repair: bool = True,
    ) -> None:
        self.root = Path(path).expanduser()
        if self.root.exists() and not self.root.is_dir():
            raise LibraryError(f"{self.root} is a file; a library is a folder")
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        self._model, self._embed = model, embed
        self._kinds: tuple[str, ...] | None = None
        if signatures is not None:
            from ..signature import signatures as known

            self._kinds = tuple(known[kind].name for kind in signatures)  # which says what there is
        self._repair = repair and os.access(self.root, os.W_OK)
        self._kept: WeakValueDictionary[tuple[str, str], Adapter] = WeakValueDictionary()
        self._index = Index(self.root, self._repair)
        self._seen = -1
        self.findings: list[Finding] = []
        self._ready()

    def _ready(self) -> Index:
        """The index; compared with the folders where it was opened anew."""
        opened = self._index.touch()
        if opened != self._seen:
            self._seen = opened
            changes = self._repair or bool(self._index.findings)  # one that is in memory is filled
            found = _mend.mend(self.root, self._index, self._adopt, changes)
            if self._index.findings:  # a new index has nothing, and that was said
                found = [finding for finding in found if finding.what != "unindexed"]
            self.findings = [*self._index.findings, *found]
        return self._index

    def _adopt(self, folder: Path, before: Entry | None, write: bool) -> Entry:
        """Reads an adapter that the index does not know, or not as it is now."""
        return adopted(self.root, folder, before, write and self._repair, self._base(), self._embed, self._kinds)

    def _base(self, needed: bool = False) -> Model | None:
        """The base for signatures: one that is given by name is not loaded for what does not need it."""
        return self.model if needed or not isinstance(self._model, str) else None

    @property
    def model(self) -> Model | None:
        """The base, loaded now. Raises `AdapterError` when the adapters are for another one."""
        if self._model is None:
            return None
        if isinstance(self._model, str):
            from ..model import Model

            self._model = Model.load(self._model)
        name, print_ = self._ready().fingerprint()
        if print_ and print_ != self._model.fingerprint:
            raise AdapterError(
                f"the adapters of {self.root} are for the base {name!r} (weights {print_[:8]}), and this is "
                f"{self._model.name!r} (weights {self._model.fingerprint[:8]}); open the library with that base"
            )
        return self._model

    # Looking up

    @property
    def entries(self) -> dict[str, Entry]:
        """What is known of each adapter that is there, by name, sorted."""
        return {e.name: e for e in self._ready().entries().values() if e.state == "there"}

    @property
    def removed(self) -> list[Entry]:
        """The adapters that are removed, and kept until `gc`."""
        return [e for e in self._ready().entries().values() if e.folder.startswith(REMOVED)]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that are there, sorted."""
        return tuple(self.entries)

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of each adapter by its name."""
        return {name: entry.hash for name, entry in self.entries.items()}

    def show(self, name: str) -> Entry:
        """What is known of an adapter. Raises `LibraryError` where there is none of that name."""
        entry = self._ready().row(checked_name(name))
        if entry is None or entry.state != "there":
            raise self._unknown(name, entry)
        return entry

    def _unknown(self, name: str, entry: Entry | None) -> LibraryError:
        if entry is not None:
            return LibraryError(
                f"the adapter {name!r} is damaged: {entry.problem}; take it from a copy, or remove it with remove({name!r})"
            )
        there = listing(self.names) or "nothing"
        gone = " (it was removed; restore brings it back)" if any(e.name == name for e in self.removed) else ""
        return LibraryError(
            f"{self.root} has no adapter {name!r}{gone or nearest(name, self.names)}; there is: {there}"
        )

    def __getitem__(self, name: str) -> Adapter:
        """The adapter, its weights mapped from the file; the same object as long as somebody holds it."""
        from ..adapter import Adapter

        entry = self.show(name)
        key = (entry.name, entry.hash)
        found = self._kept.get(key)
        if found is None:
            try:
                found = Adapter.load(self.root / entry.folder)
            except AdapterError:
                with self._ready().writing():  # somebody may be replacing it: after them it is there or not
                    again = self._index.row(entry.folder)
                if again is None or again == entry:
                    raise
                found = Adapter.load(self.root / entry.folder)
            found.name = entry.name
            self._kept[key] = found
        return found

    def get(self, name: str, default: D | None = None) -> Adapter | D | None:  # type: ignore[override]
        return self[name] if name in self else default  # noqa: SIM401  it is that method

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.entries)

    __eq__ = object.__eq__  # two libraries are not read to be compared
    __hash__ = object.__hash__

    def find(self, query: str = "") -> list[Entry]:
        """The entries that a query picks, by name; see `polytask.core.library.query`.

        Raises:
            ConfigError: the query cannot be read.
        """
        entries = self.entries
        known = {e.hash: e.name for e in entries.values()} if "parent" in query.lower() else None
        test = parse(query, known)
        return [entry for entry in entries.values() if test(entry)]

    # Signatures

    def signature(self, name: str, kind: str) -> dict[str, Tensor] | None:
        """The tensors of an adapter's signature by site; None where it has none of that kind."""
        return self.signatures(kind, [name]).get(checked_name(name))

    def signatures(self, kind: str, names: Iterable[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """The signatures of a kind by the names of the adapters that have one.

        Args:
            kind: of signature.
            names: of adapters; all when None.
        """
        return {name: tensors for name, (tensors, _) in self._signed(kind, names).items()}

    def about(self, name: str, kind: str) -> dict[str, Any] | None:
        """What an adapter's signature was computed from; None where it has none of that kind."""
        found = self._signed(kind, [name])
        return next(iter(found.values()))[1] if found else None

    def _signed(self, kind: str, names: Iterable[str] | None) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        from ..signature import decoded

        entries = self.entries.values() if names is None else [self.show(name) for name in names]
        return {
            e.name: decoded(self.root / e.folder / SIGNATURES / f"{kind}.safetensors")
            for e in entries
            if kind in e.signatures
        }

    # Looking at all

    def diff(self, first: str, second: str) -> Diff:
        """Compares what two adapters change, layer by layer; see `polytask.core.library.diff.diff`."""
        from .diff import diff

        return diff(self[first], self[second], self.model)

    def graph(self) -> Graph:
        """Who came from whom, of all adapters that are there or removed."""
        return graph(self._ready().entries().values())

    def close(self) -> None:
        """Closes the index; the next use opens it again."""
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Library({str(self.root)!r}, {len(self)} adapters)"
