"""One process at a time in a folder: a lock that the system lets go of when its owner dies."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from evolora.errors import StorageError
from evolora.storage.files import make_folder

LOCK = ".lock"
"""File in a folder that is in use."""


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; the folder is made if need be.

    The lock is the operating system's, on an open file: a process that was killed has none any
    more, whatever its file still says.

    Args:
        folder: to lock.
        what: it holds, for the message ("run").

    Raises:
        StorageError: another process has it (which one), or the folder cannot be written.
    """
    make_folder(folder)
    path = folder / LOCK
    file = _acquire(path, what)
    try:
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be removed there
            file.close()
        with suppress(OSError):
            path.unlink()
        file.close()


def _acquire(path: Path, what: str) -> IO[str]:
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        if not _try_lock(file):
            owner = _owner(file)
            file.close()
            raise StorageError(f"{path.parent} is in use: this {what} is running in {owner}")
        try:
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
        except FileNotFoundError:
            pass
        file.close()  # its owner removed it between our opening and locking: that file is gone
    file.seek(0)
    file.truncate()
    json.dump({"process": os.getpid(), "host": socket.gethostname()}, file)
    file.flush()
    return file


def _owner(file: IO[str]) -> str:
    """Return who holds a lock, in words."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"process {owner['process']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has locked but not written yet
        return "another process"


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[str]) -> bool:
        try:
            file.seek(1 << 20)  # beyond the text, which stays readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: nothing can be kept out there
            return True
        return True
