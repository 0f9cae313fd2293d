"""Reading packed parquet: rows when they are asked for, or all of them, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elasticore.data.layouts import COLUMNS, OFFICIAL_COLUMNS, layout_of, row
from elasticore.data.reading import parquet_library
from elasticore.data.sequence import TokenSequence

__all__ = ["CARD", "PackedParquet", "read_card"]

CARD = "card.json"


class PackedParquet:
    """Packed rows on disk, as a sequence of lists of :class:`TokenSequence`.

    Getting a row reads its row group, of about 256K tokens, and keeps the last one. Iterating
    reads each row group once. No more than one row group is in memory.

    Parameters
    ----------
    path
        What ``elasticore data build`` wrote; or a file, or a folder of files, in our layout or
        the official code's.
    loss
        ``"stored"``: labels as they are in the file. ``"answer"``: on the answers only, whatever
        the file says.

    Raises
    ------
    FileNotFoundError, ValueError
        If files are missing, cut off, damaged, or in another layout; the message names the file.
    """

    def __init__(self, path: str | Path, loss: Literal["stored", "answer"] = "stored") -> None:
        if loss not in ("stored", "answer"):
            raise ValueError(f"loss must be 'stored' or 'answer', got {loss!r}.")
        self.path, self.loss = Path(path).expanduser(), loss
        self.card = read_card(self.path)
        self.files = self._find()
        self._metadata = [self._open(file).metadata for file in self.files]
        kinds = [self._describe(*both) for both in zip(self.files, self._metadata, strict=True)]
        self.layout, self.header = kinds[0]
        for file, kind in zip(self.files, kinds, strict=True):
            if kind != kinds[0]:
                raise ValueError(
                    f"{file} is of another build than {self.files[0].name}: its layout, "
                    "tokenizer, tasks or sources differ. Read them one by one."
                )
        self._groups = [
            (number, group)
            for number, metadata in enumerate(self._metadata)
            for group in range(metadata.num_row_groups)
        ]
        self._ends = list(
            accumulate(self._metadata[n].row_group(group).num_rows for n, group in self._groups)
        )
        if not self._ends or self._ends[-1] == 0:
            raise ValueError(f"{self.path} holds no row; build it again.")
        self._kept: tuple[int, list[list[TokenSequence]]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> list[TokenSequence]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(np.searchsorted(self._ends, index, "right"))
        if self._kept[0] != place:
            self._kept = (place, list(self._rows(place)))
        return self._kept[1][index - self._ends[place]]

    def __iter__(self) -> Iterator[list[TokenSequence]]:
        for place in range(len(self._groups)):
            yield from self._rows(place)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": (-1, [])}  # for loader processes that are spawned

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that occur; found in the small column of task ids, without the tokens."""
        names, seen = self.header.tasks, set[int]()
        for place, (number, group) in enumerate(self._groups):
            column = self._read(place, ["task_ids"])["task_ids"].to_pylist()
            here = {task for tasks in column for task in tasks}
            wrong = sorted(task for task in here if not 0 <= task < len(names))
            if wrong:
                raise ValueError(
                    f"{self.files[number]}, row group {group}: task ids {wrong} are out of range: "
                    f"there are {len(names)}, {', '.join(names)}. Build it again."
                )
            seen |= here
        return tuple(name for number, name in enumerate(names) if number in seen)

    def where(self, index: int) -> str:
        """The file, row group and row of a row, for messages."""
        place = int(np.searchsorted(self._ends, index, "right"))
        number, group = self._groups[place]
        first = self._ends[place - 1] if place else 0
        return f"{self.files[number].name}, row group {group}, row {index - first}"

    def _find(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if self.card is not None:
            files = [self.path / about["name"] for about in self.card["files"]]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(
                        f"{file} is missing, though {CARD} lists it; copy it again, or build again."
                    )
            return files
        files = sorted(self.path.glob("*.parquet"))
        if not files:
            raise FileNotFoundError(
                f"{self.path} is no parquet file and no folder that holds one; `elasticore data "
                "build` makes one."
            )
        return files

    def _open(self, file: Path, metadata: Any = None) -> Any:
        try:
            return parquet_library().ParquetFile(
                file, metadata=metadata, page_checksum_verification=True
            )
        except (OSError, ValueError) as error:  # what pyarrow raises are these two
            raise ValueError(
                f"{file} is cut off, or no parquet: {error}. Copy it again, or make it again with "
                "`elasticore data build`."
            ) from None

    def _describe(self, file: Path, metadata: Any) -> Any:
        try:
            found = layout_of(metadata.schema.to_arrow_schema().names, metadata.metadata or {})
        except ValueError as error:
            raise ValueError(
                f"{file} is no packed data that can be read: {error}. `elasticore data build` "
                "makes packed data of a source's own files."
            ) from None
        for about in (self.card or {}).get("files", ()):
            if about["name"] == file.name and about["rows"] != metadata.num_rows:
                raise ValueError(
                    f"{file} has {metadata.num_rows} rows, but {CARD} says {about['rows']}: it is "
                    "of another build. Copy the whole folder again, or build again."
                )
        return found

    def _read(self, place: int, columns: Sequence[str]) -> Any:
        number, group = self._groups[place]
        with self._open(self.files[number], self._metadata[number]) as opened:
            try:
                # No threads: they do not survive in a loader process that is forked.
                return opened.read_row_group(group, columns=list(columns), use_threads=False)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self.files[number]}, row group {group}, is damaged: {error}. Copy the file "
                    "again, or make it again with `elasticore data build`."
                ) from None

    def _rows(self, place: int) -> Iterator[list[TokenSequence]]:
        columns = COLUMNS if self.layout == "elasticore" else OFFICIAL_COLUMNS
        table = self._read(place, tuple(columns))
        for at in range(table.num_rows):
            try:
                found = row(table, at, self.layout, self.header)
            except (ValueError, TypeError, IndexError, AttributeError) as error:
                number, group = self._groups[place]
                raise ValueError(
                    f"{self.files[number]}, row group {group}, row {at}: {error}. Build it again."
                ) from None
            yield found if self.loss == "stored" else [one.on_answers() for one in found]


def read_card(path: Path) -> dict[str, Any] | None:
    """The data card of a folder that ``elasticore data build`` wrote; None if it has none."""
    file = path / CARD
    if not file.is_file():
        return None
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if all({"name", "rows"} <= set(about) for about in card["files"]):
            return card
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} is damaged; copy it again, or build again.")
