"""The file that keeps what was counted: by day for months, and for quotas. An SQLite database.

It is root's own. Whatever happens to the process or to the disk, the file is as it was after one
of its writes, of which there is at most one a minute. Whoever has something to keep is a ``Book``::

    with Store.open(default_path()) as store:
        store.add(book)
        supervisor.add(store.chores)
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, Callable, Iterator, Protocol, Sequence
from urllib.parse import quote

from pybpfthrottle.errors import StoreError
from pybpfthrottle.supervisor import Chore, Periodic

log = logging.getLogger(__name__)

# Often enough for what a kill -9 loses, and seldom enough for a memory card.
PERIOD_S = 60.0
_DIRECTORY = "/var/lib/pybpfthrottle"
_NAME = "usage.db"
_APPLICATION = 0x62706675
_VERSION = 1
# Whoever reads the file holds up the loop for so long at most; then the next write has it all.
_PATIENCE_S = 1.0
# The file shrinks when rows are deleted; this has to be chosen before there is a table.
_BEFORE_TABLES = "PRAGMA auto_vacuum = FULL"
_SCHEMA = f"""
BEGIN;
-- What subjects of a kind (name, unit, ...) have moved on a day; the smallest together as rest.
CREATE TABLE usage (
    day TEXT NOT NULL, kind TEXT NOT NULL, rest INTEGER NOT NULL, subject TEXT NOT NULL,
    download INTEGER NOT NULL, upload INTEGER NOT NULL,
    PRIMARY KEY (day, kind, rest, subject)
) WITHOUT ROWID;
-- What a rule's throttles have passed on a day of the rule's time zone.
CREATE TABLE passed (
    rule TEXT NOT NULL, day TEXT NOT NULL, download INTEGER NOT NULL, upload INTEGER NOT NULL,
    PRIMARY KEY (rule, day)
) WITHOUT ROWID;
-- The counters of throttles as they were last read; the last ones written have the largest rowid.
CREATE TABLE counter (
    owner TEXT NOT NULL, key TEXT NOT NULL, download INTEGER NOT NULL, upload INTEGER NOT NULL,
    UNIQUE (owner, key)
);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class _DamagedError(Exception):
    """The file is no database any more."""


class Book(Protocol):
    """Something to keep."""

    def update(self) -> None:
        """Note what was counted until now. Errors of this package and OSError are logged."""

    def save(self, execute: Callable[..., Any]) -> None:
        """Write what is new by SQL; if that fails it is not written, and still new next time."""

    def saved(self) -> None:
        """Take notice that what was written has reached the disk."""


def default_path() -> str:
    """Return where the file is: in systemd's StateDirectory, or in what that would be."""
    directory = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return os.path.join(directory if os.path.isabs(directory) else _DIRECTORY, _NAME)


class Store:
    """The open file, and who writes to it. ``close`` or ``with`` writes what is left."""

    def __init__(self, path: str, lock: int) -> None:
        """Use ``open``."""
        self.path = path
        self._lock = lock
        self._books: list[Book] = []
        self._said = ""
        self._chore = Periodic(PERIOD_S, self.write)
        self._database: Any = None
        self._inode = (0, 0)

    @classmethod
    def open(cls, path: str) -> Store:
        """Open the file to write to it, and make it if it is missing.

        A damaged one is moved aside. Raises StoreError if the file or its directory is somebody
        else's, if another process writes to it, if it cannot be written, or without sqlite3.
        """
        _sqlite3()
        with ExitStack() as undo:
            store = cls(path, _lock(path, undo))
            store._connect()
            undo.pop_all()
        return store

    def add(self, book: Book) -> None:
        """Keep what a book has from now on."""
        self._books.append(book)

    def chores(self) -> Sequence[Chore]:
        """Return what a supervisor has to do."""
        return [self._chore]

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return what a query finds. Raises StoreError."""
        try:
            with _translated(self.path):
                return list(self._database.execute(sql, values))
        except _DamagedError as error:
            raise StoreError(f"{self.path} is damaged: {error}") from error

    def write(self) -> bool:
        """Write what the books have. If that fails it is said, and done again next time."""
        # Where the machine is may have changed, and with it when a day begins.
        time.tzset()
        for book in self._books:
            book.update()
        try:
            with suppress(_DamagedError):
                self._save()
                return self._say("")
            self._connect()
            self._save()
        except (StoreError, OSError, _DamagedError) as error:
            return self._say(str(error))
        return self._say("")

    def close(self) -> None:
        """Write what is left, and close the file. Doing so twice is no error."""
        if self._lock >= 0:
            self.write()
            self._disconnect()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, problem: str) -> bool:
        """Log what keeps it from writing, once; return whether there is nothing."""
        if problem and problem != self._said:
            log.warning("%s; what is counted is kept in memory until it can be written", problem)
        elif self._said and not problem:
            log.warning("%s is written again", self.path)
        self._said = problem
        return not problem

    def _connect(self) -> None:
        """Open the file, or a new one in place of a damaged one. Raises StoreError."""
        self._disconnect()
        try:
            self._database = _connected(self.path, writes=True)
        except _DamagedError as error:
            aside = _move_aside(self.path)
            log.warning("%s is damaged (%s): moved to %s", self.path, error, aside)
            self._database = _connected(self.path, writes=True)
        self._inode = _inode(self.path)

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _save(self) -> None:
        """Write all in one transaction. Raises StoreError or _DamagedError."""
        # Somebody may have deleted the file, or put another one in its place.
        if self._database is None or _inode(self.path) != self._inode:
            self._connect()
        with _translated(self.path):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                for book in self._books:
                    book.save(self._database.execute)
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
        for book in self._books:
            book.saved()


@contextmanager
def reading(path: str) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
    """Open the file to read it, also while another process writes to it; gives a ``query``.

    Raises StoreError, which says what to do where there is no such file.
    """
    try:
        os.lstat(path)
    except FileNotFoundError as error:
        raise StoreError(
            f"nothing was recorded yet: there is no {path}. pybpfthrottle usage --record, or"
            " daemon --usage, records from now on"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; only root may") from error
    _refuse_directory(path, os.stat(os.path.dirname(os.path.abspath(path))))
    try:
        with closing(_connected(path, writes=False)) as database, _translated(path):
            yield lambda sql, *values: list(database.execute(sql, values))
    except _DamagedError as error:
        raise StoreError(
            f"{path} is damaged ({error}); whatever records next moves it aside"
        ) from error


def _sqlite3() -> Any:
    try:
        import sqlite3
    except ImportError as error:
        raise StoreError(
            "this Python has no sqlite3, which keeps the usage: install a Python with it, such as"
            " your distribution's"
        ) from error
    return sqlite3


@contextmanager
def _translated(path: str) -> Iterator[None]:
    sqlite3 = _sqlite3()
    try:
        yield
    except sqlite3.DatabaseError as error:
        # The others, such as of a full disk, have classes of their own.
        if type(error) is sqlite3.DatabaseError:
            raise _DamagedError(str(error)) from error
        raise StoreError(f"cannot use {path}: {error}") from error


def _lock(path: str, undo: ExitStack) -> int:
    """Return a descriptor of the directory, locked: two that write would count everything twice.

    SQLite loses its own locks if a file of its is opened here and closed again.
    """
    directory = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"cannot use {directory}: {error.strerror}") from error
    undo.callback(os.close, fd)
    _refuse_directory(path, os.fstat(fd))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"another process records to {path} already, perhaps the daemon"
        ) from error
    return fd


def _refuse_directory(path: str, status: os.stat_result) -> None:
    directory = os.path.dirname(os.path.abspath(path))
    if status.st_uid not in (0, os.geteuid()):
        raise StoreError(f"{directory} belongs to another user (uid {status.st_uid})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(f"{directory} is writable by other users: chmod go-w {directory}")


def _refuse_file(path: str) -> None:
    """Raise StoreError if somebody else may have made the file."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise StoreError(f"{path} is not a regular file of its own; remove it")
    if status.st_uid not in (0, os.geteuid()):
        raise StoreError(f"{path} belongs to another user (uid {status.st_uid})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(f"{path} is writable by other users: chmod go-w {path}")


def _connected(path: str, *, writes: bool) -> Any:
    """Return a connection to a sound file of this version. Raises StoreError or _DamagedError."""
    try:
        if writes and not os.path.lexists(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        _refuse_file(path)
    except OSError as error:
        raise StoreError(f"cannot use {path}: {error.strerror}") from error
    with _translated(path), ExitStack() as undo:
        # To read, too: after a kill -9 the first one that comes finishes or undoes the last write.
        database = _sqlite3().connect(
            f"file:{quote(os.path.abspath(path))}?mode=rw",
            uri=True,
            isolation_level=None,
            timeout=_PATIENCE_S,
            check_same_thread=False,
        )
        undo.callback(database.close)
        _examine(path, database, writes=writes)
        undo.pop_all()
    return database


def _examine(path: str, database: Any, *, writes: bool) -> None:
    """Give an empty file its tables. Raises _DamagedError, or StoreError if it is none of ours."""

    def value(sql: str) -> Any:
        return database.execute(sql).fetchone()[0]

    is_empty = value("SELECT count(*) FROM sqlite_master") == 0
    if is_empty and writes:
        database.execute(_BEFORE_TABLES)
        database.executescript(_SCHEMA)
    elif is_empty:
        raise StoreError(f"nothing was recorded to {path} yet")
    if value("PRAGMA application_id") != _APPLICATION:
        raise StoreError(f"{path} is a database of another program")
    if value("PRAGMA user_version") != _VERSION:
        raise StoreError(f"{path} was written by a newer version of pybpfthrottle")
    if value("PRAGMA quick_check(1)") != "ok":
        raise _DamagedError("quick_check has found a fault")


def _move_aside(path: str) -> str:
    """Rename a damaged file, and the journal that would be applied to its successor.

    Raises StoreError.
    """
    aside = f"{path}.damaged"
    try:
        with suppress(FileNotFoundError):
            os.rename(f"{path}-journal", f"{aside}-journal")
        os.rename(path, aside)
    except OSError as error:
        raise StoreError(f"cannot move the damaged {path} aside: {error.strerror}") from error
    return aside


def _inode(path: str) -> tuple[int, int]:
    with suppress(OSError):
        status = os.lstat(path)
        return status.st_dev, status.st_ino
    return 0, 0
