"""What a library knows of an adapter without its weights, and how an adapter's folder in it is laid out.

lib/NAME/                       what `Adapter.save` writes, so that PEFT reads it
lib/NAME/library.json           the entry: what the index holds of it, so that a lost index can be made again
lib/NAME/signatures/*.safetensors
lib/.removed/NAME~xxxxxxxx/     removed, until `gc`
lib/.tmp-PID-xxxxxxxx/          on its way in or out
lib/index.sqlite                the index
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LibraryError, listing, nearest

if TYPE_CHECKING:
    from ..adapter import Adapter

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

INDEX, RECORD, SIGNATURES, REMOVED, TEMPORARY = "index.sqlite", "library.json", "signatures", ".removed", ".tmp-"
FORMAT = 1
_NAME = re.compile(r"\w[\w .+=@,()-]{0,99}")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a library knows of an adapter.

    Attributes:
        name: what it is called there.
        tags: given by people.
        tasks: what it learned from: name, kind, metric.
        form: the name of its form.
        ranks: the different ranks of its patches; empty for forms without.
        size: trained numbers of its patches.
        scores: numbers of its card's metrics, by name (``dev/mood``).
        parents: hashes of the adapters it was made from.
        hash: of its values.
        base: the base's name.
        fingerprint: of the base's weights; empty where it is not recorded.
        licence: of the adapter.
        added: when it was added, UTC.
        bytes: that its files take.
        signatures: the kinds that are stored beside it.
        state: ``there``, ``removed`` or ``damaged``.
        folder: where it lies in the library.
        problem: what is wrong with it, where it is damaged.
        settings: of the form; filled in by `Library.show` only.
        files: by path: ``sha256``, ``size`` in bytes and ``mtime`` in nanoseconds; filled in by `Library.show` only.
    """

    name: str
    tags: tuple[str, ...] = ()
    tasks: tuple[dict[str, Any], ...] = ()
    form: str = ""
    ranks: tuple[int, ...] = ()
    size: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    hash: str = ""
    base: str = ""
    fingerprint: str = ""
    licence: str = ""
    added: str = ""
    bytes: int = 0
    signatures: tuple[str, ...] = ()
    state: str = "there"
    folder: str = ""
    problem: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def with_files(self, files: dict[str, dict[str, Any]]) -> Entry:
        """The same with these files, and the signatures that are among them."""
        kinds = sorted(Path(name).stem for name in files if name.startswith(f"{SIGNATURES}/"))
        size = sum(file["size"] for file in files.values())
        return replace(self, files=files, bytes=size, signatures=tuple(kinds))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        """The reverse; keys of later versions are left out."""
        known: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items() if n in _FIELDS}
        return cls(**known)


_FIELDS = {f.name for f in fields(Entry)}
LIGHT = tuple(f.name for f in fields(Entry))[:-2]  # what the index has of all at hand


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        what: ``index``, ``unindexed``, ``missing``, ``unfinished``, ``changed``, ``damaged`` or ``leftover``.
        name: of the adapter, or of the folder.
        text: what it is, and what to do.
        repaired: whether it was put right.
    """

    what: str
    name: str
    text: str
    repaired: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" + ("; repaired" if self.repaired else "")


def checked_name(name: str) -> str:
    """A name as it is stored. Raises `LibraryError` where it cannot be a folder's on every system."""
    plain = unicodedata.normalize("NFC", str(name))
    if not _NAME.fullmatch(plain) or plain.endswith((" ", ".")) or plain.lower().startswith(INDEX) or plain == RECORD:
        raise LibraryError(
            f"{name!r} cannot be an adapter's name in a library; letters, digits, _ and inside also spaces . + = @ , ( ) - are "
            f"allowed, at most 100, no space or point at the end, and not {INDEX}"
        )
    return plain


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags as they are stored. Raises `LibraryError` for one that could not be asked for."""
    words = tuple(dict.fromkeys(str(tag).strip() for tag in ([tags] if isinstance(tags, str) else tags)))
    if any(not word or any(sign in word for sign in "\n,\"'") for word in words):
        raise LibraryError(
            f"{listing(map(repr, words))}: a tag is a word without commas, quotes and line ends, and not empty"
        )
    return words


def tags_without(old: tuple[str, ...], tags: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Those that are left. Raises `LibraryError` where one to be taken away is not there."""
    if lacking := [tag for tag in tags if tag not in old]:
        raise LibraryError(
            f"{name!r} has no tag {listing(lacking)}{nearest(lacking[0], old)}; it has: {listing(old) or 'none'}"
        )
    return tuple(tag for tag in old if tag not in tags)


def temporary(root: Path) -> Path:
    """A name for a folder that this process is writing."""
    return root / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"


def removed_place(root: Path, name: str) -> Path:
    """Where an adapter lies when it is removed."""
    return root / REMOVED / f"{name}~{secrets.token_hex(4)}"


def orphaned(path: Path) -> bool:
    """Whether the process that began a temporary folder is gone, so that nobody will finish it."""
    try:
        pid = int(path.name.removeprefix(TEMPORARY).split("-")[0])
    except ValueError:
        return True
    return not alive(pid) or started(pid) > path.stat().st_mtime + 60  # the number belongs to another process by now


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Only one process at a time replaces an index, where the system can tell processes to wait."""
    if fcntl is None:
        yield
        return
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def started(pid: int) -> float:
    """When a process began, in seconds since 1970; 0 where the system does not say."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration, AttributeError):
        return 0.0


def hashed(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def stamp(file: Path) -> dict[str, Any]:
    """What is remembered of a file."""
    known = file.stat()
    return {"sha256": hashed(file), "size": known.st_size, "mtime": known.st_mtime_ns}


def stamps(folder: Path) -> dict[str, dict[str, Any]]:
    """The same of all files of an adapter's folder but its record, by path."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.name != RECORD and not p.name.startswith(".")]
    return {p.relative_to(folder).as_posix(): stamp(p) for p in sorted(found)}


def describe(adapter: Adapter, name: str, tags: tuple[str, ...], added: str, hash: str) -> Entry:
    """The entry of an adapter, without what its folder says."""
    card = adapter.card
    forms = [patch.form for patch in adapter.patches.values()]
    ranks = {rank for form in forms if isinstance(rank := getattr(form, "rank", None), int)}
    tasks = [{k: task.get(k, "") for k in ("name", "kind", "metric")} for task in card.tasks]
    known = {task["name"] for task in tasks}
    tasks += [
        {"name": n, "kind": h.settings().get("task", ""), "metric": ""}
        for n, h in adapter.heads.items()
        if n not in known
    ]
    return Entry(
        name=name, tags=tags, tasks=tuple(tasks), form=adapter.form.name, settings=plain(adapter.form.settings()),
        ranks=tuple(sorted(ranks)), size=adapter.size, scores=dict(_numbers(card.metrics)), parents=tuple(card.parents),
        hash=hash, base=str(card.base.get("name") or ""), fingerprint=str(card.base.get("fingerprint") or ""),
        licence=card.licence, added=added,
    )  # fmt: skip


def plain(data: Any) -> Any:
    """Values as JSON gives them back."""
    return json.loads(json.dumps(data, default=str))


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{key}", float(value)))
    return found


def read_record(folder: Path) -> Entry | None:
    """The entry that a folder holds of itself; None where it has none that can be read."""
    try:
        data = json.loads((folder / RECORD).read_bytes())
        return Entry.from_dict(data["entry"]) if data.get("format", 0) <= FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def record(entry: Entry) -> bytes:
    """The file of an entry."""
    held = entry.as_dict()
    for key in ("state", "folder", "problem"):  # where it lies says that
        del held[key]
    return (json.dumps({"format": FORMAT, "entry": held}, indent=1, ensure_ascii=False) + "\n").encode()
