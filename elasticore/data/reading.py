"""Records of a source, one after the other: from files in its own schema, or from a hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from elasticore.data.sources import Source

__all__ = ["parquet_library", "records"]

SUFFIXES = (".json", ".jsonl", ".parquet")
ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json")  # of Hugging Face's datasets
HUB = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(:(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
BLOCK = 1 << 20  # characters read at a time


def parquet_library() -> Any:
    """``pyarrow.parquet``, or an error that says how to get it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "training data needs pyarrow and datasets; pip install 'elasticore[train]'."
        ) from error
    return pyarrow.parquet


def records(source: Source, origin: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of a source, without ever holding all of them.

    Parameters
    ----------
    source
        Which source.
    origin
        A file or folder (json, jsonl, parquet), or ``ID[:SUBSET][@REVISION]`` on the hub; None
        for the source's own place there.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        If there is nothing to read, if it is damaged, if a record lacks fields that the source
        needs, or if the hub cannot be reached.
    """
    place = source.hub if origin is None else origin
    if place is None:
        raise ValueError(
            f"source {source.name} is on no hub: {source.get}, then pass --source "
            f"{source.name}=FOLDER."
        )
    path = Path(place).expanduser()
    if origin is not None and path.exists():
        found = _local(source, path)
    elif (match := HUB.fullmatch(place)) and path.suffix.lower() not in SUFFIXES:
        found = _complete(source, place, _hub(source, **match.groupdict()))
    else:
        raise FileNotFoundError(
            f"source {source.name}: {place} is no file, no folder, and no hub id such as "
            "owner/name, owner/name:subset or owner/name@revision."
        )
    first = next(found, None)
    if first is None:
        raise ValueError(f"source {source.name}: {place} holds no record.")
    yield first
    yield from found


def _local(source: Source, path: Path) -> Iterator[dict[str, Any]]:
    files = sorted(_data_in(path)) if path.is_dir() else [path]
    if not files or files[0].suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"source {source.name}: {path} holds no file that ends in {', '.join(SUFFIXES)}."
        )
    for file in files:
        found = _parquet(file) if file.suffix.lower() == ".parquet" else _json(file)
        yield from _complete(source, str(file), found)


def _data_in(folder: Path) -> Iterator[Path]:
    """The files with records: not what downloads leave hidden, nor what describes a data set."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.name not in ABOUT:
            yield path


def _complete(
    source: Source, place: str, found: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Records that have the fields that the source needs."""
    for number, record in enumerate(found):
        missing = [name for name in source.columns if name not in record]
        if missing:
            raise ValueError(
                f"source {source.name}, record {number} of {place}: no field "
                f"{', '.join(missing)} among {', '.join(sorted(record)) or 'none'}; is this "
                f"{source.name} in its own schema? See docs, Data."
            )
        yield record


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    library = parquet_library()
    try:
        with library.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are these two
        raise ValueError(f"{path} is damaged, or no parquet: {error}. Download it again.") from None


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file: one a line, or all in one array, of any size.

    An array is decoded one object at a time, as that of ChatQA2 is larger than most memories.
    """
    decode = json.JSONDecoder().raw_decode
    text, at, number, inside, block = "", 0, 0, False, BLOCK

    def damaged(why: str) -> ValueError:
        return ValueError(f"{path}, record {number}: {why}. Download or write it again.")

    with path.open(encoding="utf-8-sig") as file:
        while True:
            while at < len(text) and text[at] in " \t\r\n,[]":
                inside = text[at] == "[" or (inside and text[at] != "]")
                at += 1
            error: json.JSONDecodeError | None = None
            if at < len(text):
                try:
                    record, at = decode(text, at)
                except json.JSONDecodeError as found:
                    error = found
                    unfinished = found.msg.startswith("Unterminated") or found.pos > len(text) - 16
                    if not unfinished:
                        raise damaged(str(found)) from None
                else:
                    if not isinstance(record, dict):
                        raise damaged(f"expected a JSON object, got {str(record)[:60]!r}")
                    yield record
                    number, block = number + 1, BLOCK
                    continue
            try:
                more = file.read(block)
            except UnicodeDecodeError as wrong:
                raise damaged(f"no UTF-8 text: {wrong}") from None
            if not more:
                if error is not None or inside:
                    raise damaged("the file ends in the middle; it is cut off")
                return
            text, at, block = text[at:] + more, 0, 2 * block


def _hub(
    source: Source, id: str, subset: str | None, revision: str | None
) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("the hub needs datasets; pip install 'elasticore[train]'.") from error
    own = id == source.hub
    subsets = source.subsets if own and subset is None else (subset,)
    revision = source.revision if own and revision is None else revision
    try:
        for name in subsets:
            yield from datasets.load_dataset(
                id, name, split=source.split, revision=revision, streaming=True
            )
    except Exception as error:  # the hub's own errors, the network's, and those of its files
        raise OSError(
            f"source {source.name}: cannot read {id} from the Hugging Face hub: {error}. Where "
            f"there is no network, pass its files: --source {source.name}=FOLDER."
        ) from error
