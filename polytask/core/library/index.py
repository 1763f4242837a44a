"""The index of a library: an SQLite file with a row for each adapter, which only repeats what the folders say."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import LibraryError, StorageError
from .entry import INDEX, LIGHT, Entry, Finding, alive, alone

T = TypeVar("T")
VERSION = 1
PATIENCE = 60.0  # seconds that a writer waits for another
_TABLES = (
    "CREATE TABLE adapters (folder TEXT PRIMARY KEY, name TEXT, state TEXT, form TEXT, base TEXT, fingerprint TEXT, hash TEXT, "
    "added TEXT, facts TEXT, more TEXT)",
    "CREATE INDEX first ON adapters (added, name) WHERE fingerprint <> '' AND state = 'there'",  # for _FIRST
    "CREATE TABLE changing (folder TEXT, pid INTEGER, PRIMARY KEY (folder, pid)) WITHOUT ROWID",
    f"PRAGMA user_version = {VERSION}",
)
_TUPLES = [LIGHT.index(name) for name in ("tags", "tasks", "ranks", "parents", "signatures")]
_COLUMNS = ("folder", "name", "state", "form", "base", "fingerprint", "hash", "added")  # for those who ask SQLite
_FIRST = (
    "SELECT base, fingerprint FROM adapters WHERE fingerprint <> '' AND state = 'there' ORDER BY added, name LIMIT 1"
)


class Index:
    """The rows, and who may write them: one process at a time, the others wait.

    Args:
        root: the library's folder.
        repair: make a lost or damaged index anew; else what is read from the folders is only kept in memory.

    Attributes:
        findings: what was wrong with the file when it was opened.
        opened: how often it was opened: more than once where it was deleted in between, or another process goes on with it.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, root: Path, repair: bool = True) -> None:
        self.root, self.repair = root, repair
        self.findings: list[Finding] = []
        self._lock = threading.RLock()
        self._held: tuple[int, int, sqlite3.Connection] | None = None  # process, inode, connection
        self._own = 0  # commits of this connection
        self._entries: tuple[tuple[int, int], dict[str, Entry]] | None = None
        self.opened = 0
        self.touch()

    @property
    def file(self) -> Path:
        """The SQLite file."""
        return self.root / INDEX

    # Connections

    def _db(self) -> sqlite3.Connection:
        """The connection: a new one in another process, and where the file was deleted or replaced meanwhile."""
        inode = _inode(self.file)
        if self._held is not None:
            pid, known, db = self._held
            if pid == os.getpid() and (known in (0, inode)):
                return db
            if pid == os.getpid():
                db.close()
        self._entries = None
        db = self._opened()
        at = 0 if db.execute("PRAGMA database_list").fetchone()[2] == "" else _inode(self.file)
        self._held = (os.getpid(), at, db)
        self.opened += 1
        return db

    def touch(self) -> int:
        """Opens it where that is needed, and says how often it was."""
        with self._lock:
            self._db()
            return self.opened

    def _opened(self) -> sqlite3.Connection:
        missing = not self.file.exists()
        if not missing:
            with suppress(sqlite3.DatabaseError):
                db = _patient(lambda: _connect(self.file))
                if _sound(db):
                    return db
                db.close()
        problem = "the index is missing" if missing else "the index is damaged"
        if not self.repair:
            self.findings.append(Finding("index", INDEX, f"{problem}; it can be made again from the folders"))
            memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            _create(memory)
            return memory
        if not missing or _holds_adapters(self.root):
            self.findings.append(Finding("index", INDEX, f"{problem}; made again from the folders", repaired=True))
        with alone(self.root):
            return self._made()

    def _made(self) -> sqlite3.Connection:
        """A new index, unless another process has just made one."""
        try:
            with suppress(sqlite3.DatabaseError):
                db = _patient(lambda: _connect(self.file))
                _patient(lambda: _create_once(db))
                if _sound(db):
                    return db
                db.close()
            for end in ("", "-wal", "-shm"):
                self.file.with_name(INDEX + end).unlink(missing_ok=True)
            db = _patient(lambda: _connect(self.file))
            _patient(lambda: _create_once(db))
        except (sqlite3.OperationalError, OSError) as error:
            raise StorageError(f"cannot write {self.file}: {error}; choose a folder that you may write to") from error
        return db

    def close(self) -> None:
        """Closes the connection; the next use opens another."""
        with self._lock:
            if self._held is not None and self._held[0] == os.getpid():
                self._held[2].close()
            self._held = self._entries = None

    # Reading

    def entries(self) -> dict[str, Entry]:
        """Every entry by its folder, sorted, without files and settings; kept until somebody writes."""
        with self._lock:
            db = self._db()
            version = (self._own, db.execute("PRAGMA data_version").fetchone()[0])
            if self._entries is None or self._entries[0] != version:
                rows = db.execute("SELECT facts FROM adapters ORDER BY folder").fetchall()
                read = map(_light, json.loads(f"[{','.join(row[0] for row in rows)}]"))
                self._entries = (version, {entry.folder: entry for entry in read})
            return self._entries[1]

    def folders(self) -> dict[str, str]:
        """The state of each adapter by its folder, without anything else of it."""
        with self._lock:
            return dict(self._db().execute("SELECT folder, state FROM adapters").fetchall())

    def row(self, folder: str) -> Entry | None:
        """One whole entry as it is now."""
        with self._lock:
            db = self._db()
            found = db.execute("SELECT facts, more FROM adapters WHERE folder = ?", (folder,)).fetchone()
        return replace(_light(json.loads(found[0])), **json.loads(found[1])) if found else None

    def fingerprint(self) -> tuple[str, str]:
        """Name and fingerprint of the base of the first adapter that says it; empty where none does."""
        with self._lock:
            found = self._db().execute(_FIRST).fetchone()
        return (found[0], found[1]) if found else ("", "")

    def unfinished(self) -> list[str]:
        """The folders that a process began to change which is gone now."""
        with self._lock:
            marks = self._db().execute("SELECT folder, pid FROM changing").fetchall()
        return [folder for folder, pid in marks if not alive(pid)]

    # Writing

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction of the only writer; what fails inside leaves the index as it was.

        Raises:
            LibraryError: another process has been writing for too long.
        """
        with self._lock:
            db = self._db()
            try:
                _patient(lambda: db.execute("BEGIN IMMEDIATE"))
            except sqlite3.OperationalError as error:
                raise LibraryError(f"{self.file} cannot be written: {error}; see what else writes to it") from error
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
            self._own += 1

    @contextmanager
    def changing(self, folder: str) -> Iterator[sqlite3.Connection]:
        """As `writing`, for changes inside an adapter's folder: should the process end in between, the next that opens the
        library reads the folder again."""
        with self.writing() as db:
            db.execute("INSERT OR REPLACE INTO changing VALUES (?, ?)", (folder, os.getpid()))
        try:
            with self.writing() as db:
                yield db
                db.execute("DELETE FROM changing WHERE folder = ? AND pid = ?", (folder, os.getpid()))
        except LibraryError:  # refused before anything was changed
            with self.writing() as db:
                self.finished(db, folder)
            raise

    @staticmethod
    def put(db: sqlite3.Connection, entry: Entry) -> None:
        """Writes a row."""
        facts = json.dumps([getattr(entry, name) for name in LIGHT], ensure_ascii=False)
        more = json.dumps({"files": entry.files, "settings": entry.settings}, ensure_ascii=False)
        row = [getattr(entry, name) for name in _COLUMNS]
        marks = ", ".join("?" * (len(row) + 2))
        db.execute(f"INSERT OR REPLACE INTO adapters VALUES ({marks})", (*row, facts, more))

    @staticmethod
    def drop(db: sqlite3.Connection, folder: str) -> None:
        """Deletes a row."""
        db.execute("DELETE FROM adapters WHERE folder = ?", (folder,))

    @staticmethod
    def finished(db: sqlite3.Connection, folder: str) -> None:
        """Forgets that somebody began to change a folder."""
        db.execute("DELETE FROM changing WHERE folder = ?", (folder,))


def _light(values: list[Any]) -> Entry:
    for place in _TUPLES:
        values[place] = tuple(values[place])
    return Entry(*values)


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _sound(db: sqlite3.Connection) -> bool:
    """Whether the file is a whole index of this version."""
    try:
        good = bool(db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
        return good and db.execute("PRAGMA user_version").fetchone()[0] == VERSION
    except sqlite3.DatabaseError:
        return False


def _create(db: sqlite3.Connection) -> None:
    for statement in _TABLES:
        db.execute(statement)


def _create_once(db: sqlite3.Connection) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            _create(db)
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _patient(act: Callable[[], T]) -> T:
    """Does something again while SQLite says that the file is busy: it does not wait itself in every case."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return act()
        except sqlite3.OperationalError as error:
            if not any(word in str(error) for word in ("locked", "busy")) or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _inode(file: Path) -> int:
    try:
        return file.stat().st_ino
    except OSError:
        return -1


def _holds_adapters(root: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(root))
