"""Files and folders that are there whole or not at all, and that one process at a time writes to.

What is not whole yet lies beside its place, hidden, under a name that nothing else gives.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import shlex
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["append", "check_writable", "free_bytes", "held", "whole_folder", "write_text"]

LOCK = ".elasticore-lock"


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text; who reads it finds the old text or the new one, whole.

    Raises
    ------
    OSError
        If the disk is full or cannot be written; the message names the file.
    """
    beside = path.with_name(f".{path.name}.elasticore-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise _unwritable(path, error) from error


def append(path: Path, text: str) -> None:
    """Add UTF-8 text to a file, all of it or nothing; it is on disk when this returns.

    Raises
    ------
    OSError
        If the disk is full or cannot be written; the message names the file.
    """
    try:
        with path.open("ab") as file:
            end = file.tell()
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, end)
                raise
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``final`` if the block ends well.

    Whoever uses it holds the place (:func:`held`): what an earlier process has left is removed.
    """
    final = Path(os.path.realpath(final))
    new, old = (final.with_name(f".{final.name}.elasticore-{which}") for which in ("new", "old"))

    def settle() -> None:
        if old.exists() and not final.exists():  # stopped between the two renames
            os.replace(old, final)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)

    try:
        settle()
        new.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(final, error) from error
    try:
        yield new
        if final.exists():
            os.replace(final, old)
        os.replace(new, final)
    finally:
        settle()


@contextmanager
def held(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """Hold a folder, so that no other process does the same to it.

    The system lets go of it when the process ends, however it ends.

    Parameters
    ----------
    folder
        Made if missing, and removed afterwards if it was and is empty.
    beside
        Whether to leave it alone, as one that is replaced as a whole: the lock lies beside it.

    Raises
    ------
    BlockingIOError
        If another process holds it; the message says which.
    OSError
        If it cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    lock = folder.with_name(f".{folder.name}{LOCK}") if beside else folder / LOCK
    made = [place for place in (lock.parent, *lock.parent.parents) if not place.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(lock, folder)
    except BlockingIOError:
        raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
            for place in made:
                place.rmdir()
        os.close(descriptor)


def check_writable(file: Path) -> None:
    """Raise ``OSError`` unless a file could be written here; the folders above it are made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
        if file.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        raise _unwritable(file, error) from error


def free_bytes(place: Path) -> str:
    """How much room there is, in words."""
    try:
        return f"{shutil.disk_usage(place).free / 1e6:,.1f} MB are free there"
    except OSError:
        return "what is free there cannot be read"


def _lock(lock: Path, folder: Path) -> int:
    """The open file of a lock that is now ours."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, folder)
            # Who held it before removes the file; one that is gone locks nothing.
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, _who().encode())
                return descriptor
        except BlockingIOError as error:
            who = os.read(descriptor, 4096).decode("utf-8", "replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"{folder} is being written by {who}; wait until that has ended, or choose another "
                "folder."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        warnings.warn(
            f"{folder} is on a file system without locks: let one process at a time write there.",
            stacklevel=2,
        )


def _who() -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"process {os.getpid()} on {socket.gethostname()} since {now} ({command})"


def _unwritable(place: Path, error: OSError) -> OSError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    todo = f"{free_bytes(_above(place))}. Free space, or choose" if full else "choose"
    return OSError(f"{place} cannot be written: {error.strerror or error}; {todo} another place.")


def _above(place: Path) -> Path:
    """The nearest folder above a place that exists."""
    return next(folder for folder in place.absolute().parents if folder.exists())
