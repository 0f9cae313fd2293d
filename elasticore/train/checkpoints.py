"""Checkpoint folders: under their name only when they are whole, and checked before they are used.

A checkpoint is written into ``.partial`` beside it, listed in ``checkpoint.json`` with the size and
CRC-32 of every file, flushed to the disk, and renamed. What is killed on the way leaves no folder
that could be taken for a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "MANIFEST",
    "PARTIAL",
    "checkpoints",
    "clear_partial",
    "commit",
    "damage",
    "find_checkpoint",
    "name_of",
    "newest",
    "saved_settings",
]

MANIFEST = "checkpoint.json"
PARTIAL = ".partial"
"""Folder in a run's, in which a checkpoint is made."""
FORMAT = 1

_NAME = re.compile(r"checkpoint-(\d+)")


def name_of(step: int) -> str:
    """The name of the checkpoint of an optimizer step, as the Trainer's."""
    return f"checkpoint-{step}"


def clear_partial(run: Path) -> None:
    """Remove what a save that was cut short has left in a run's folder."""
    shutil.rmtree(run / PARTIAL, ignore_errors=True)


def commit(partial: Path, final: Path, settings: Mapping[str, Any]) -> None:
    """List the files of a checkpoint, flush them, and give it its name.

    Parameters
    ----------
    partial
        The folder with everything in it.
    final
        Its new place, on the same file system. A checkpoint that is there is replaced.
    settings
        What a run has to have in common with this one to be resumed from it; JSON.
    """
    about = {"format": FORMAT, "settings": dict(settings), "files": _list(partial)}
    text = json.dumps(about, indent=1) + "\n"
    (partial / MANIFEST).write_text(text, encoding="utf-8")
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    if final.exists():  # this step of an earlier run; a folder is only renamed onto an empty one
        os.replace(final, partial.parent / "replaced")
    os.replace(partial, final)
    _flush(final.parent)
    shutil.rmtree(partial.parent, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole. Reads all of it."""
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            return f"its format is {about['format']!r}, and this elasticore reads {FORMAT}"
        listed = {str(name): list(mark) for name, mark in about["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end, or by another program"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error!r})"
    for name, (size, checksum) in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _checksum(file) != checksum:
            return f"{name} has changed since it was written"
    return None


def checkpoints(run: Path) -> list[Path]:
    """The folders in a run's that have a checkpoint's name, newest step first; not checked."""
    found = [
        (int(match[1]), path)
        for path in run.glob("checkpoint-*")
        if path.is_dir() and (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; warns of each newer one that is damaged."""
    for path in checkpoints(run):
        wrong = damage(path)
        if wrong is None:
            return path
        warnings.warn(f"{path} is passed over: {wrong}.", stacklevel=2)
    return None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint to resume from.

    Parameters
    ----------
    path
        A checkpoint, or the folder of a run, which stands for its newest whole checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no whole checkpoint in it.
    ValueError
        If the checkpoint is damaged or not whole; the message says what is wrong, and which to take
        instead.
    """
    path = Path(path)
    if not path.is_dir():
        beside = newest(path.parent)
        instead = f" The newest whole checkpoint there is {beside}." if beside else ""
        raise FileNotFoundError(
            f"resume {path} is no folder; pass a checkpoint, or the folder of a run.{instead}"
        )
    if _NAME.fullmatch(path.name) or (path / MANIFEST).is_file():
        wrong = damage(path)
        if wrong is None:
            return path
        others = (other for other in checkpoints(path.parent) if other != path)
        whole = next((other for other in others if damage(other) is None), None)
        raise ValueError(
            f"resume {path} is damaged or not whole: {wrong}. "
            + (
                f"Resume from {whole}, the newest whole checkpoint beside it."
                if whole
                else "There is no whole checkpoint beside it; start a new run."
            )
        )
    found = newest(path)
    if found is None:
        raise FileNotFoundError(
            f"resume {path} holds no whole checkpoint (checkpoint-STEP); start a new run."
        )
    return found


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings that :func:`commit` was given."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["settings"]


def _list(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: (file.stat().st_size, _checksum(file)) for name, file in _files(folder)}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file


def _checksum(file: Path) -> int:
    """CRC-32: damage is by accident here, and this keeps up with a disk."""
    crc = 0
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
