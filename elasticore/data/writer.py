"""Writing packed parquet in our layout (:mod:`elasticore.data.layouts`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from elasticore.data.layouts import COLUMNS, KEY, Header
from elasticore.data.reading import parquet_library
from elasticore.data.sequence import TokenSequence

__all__ = ["PackedWriter"]

GROUP_TOKENS = 1 << 18  # of a row group, which is what has to be read to get at one row
FILE_TOKENS = 1 << 26


class PackedWriter:
    """Writes packed rows into a folder, as files of about 64M tokens.

    Parameters
    ----------
    folder
        An existing folder.
    header
        What the files say of their rows.

    Raises
    ------
    OSError
        If the disk is full or cannot be written; the message names the file.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        import pyarrow as pa

        self.folder, self.header = folder, header
        self.files: list[dict[str, Any]] = []
        self._parquet = parquet_library()
        numbers = pa.list_(pa.int32())
        spans = pa.struct(
            {"sequence": pa.int32(), "kind": pa.string(), "start": pa.int32(), "stop": pa.int32()}
        )
        self._schema = pa.schema(
            [(name, pa.list_(spans) if name == "spans" else numbers) for name in COLUMNS],
            metadata={KEY: header.to_json().encode()},
        )
        self._rows: list[dict[str, Any]] = []
        self._tokens = 0  # of these rows
        self._writer: Any = None

    def add(self, row: Sequence[TokenSequence]) -> None:
        """Write a row, at once or with those that follow."""
        bounds = [0, *accumulate(len(one) for one in row)]
        self._rows.append(
            {
                "input_ids": np.concatenate([one.input_ids for one in row]),
                "labels": np.concatenate([one.labels for one in row]),
                "cu_seqlens": bounds,
                "task_ids": [self.header.tasks.index(one.task) for one in row],
                "source_ids": [self.header.sources.index(one.source) for one in row],
                "spans": [
                    {"sequence": index, **span._asdict()}
                    for index, one in enumerate(row)
                    for span in one.spans
                ],
            }
        )
        self._tokens += bounds[-1]
        if self._tokens >= GROUP_TOKENS:
            self._write_group()

    def close(self) -> None:
        """Write what is left and end the file."""
        if self._rows:
            self._write_group()
        if self._writer is not None:
            with self._telling():
                self._writer.close()
            self._writer = None

    def abandon(self) -> None:
        """Let go of the file, which is no parquet then, without another try to end it."""
        if self._writer is not None:
            self._writer.is_open = False
            self._writer = None

    def _write_group(self) -> None:
        import pyarrow as pa

        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        if self._writer is None:
            name = f"part-{len(self.files):05}.parquet"
            self.files.append({"name": name, "rows": 0, "tokens": 0})
        about = self.files[-1]
        with self._telling():
            if self._writer is None:
                self._writer = self._parquet.ParquetWriter(
                    self.folder / about["name"],
                    self._schema,
                    compression="zstd",
                    write_page_checksum=True,
                )
            self._writer.write_table(table, row_group_size=len(self._rows))
        about["rows"] += len(self._rows)
        about["tokens"] += self._tokens
        self._rows, self._tokens = [], 0
        if about["tokens"] >= FILE_TOKENS:
            self.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Say which file an error of the disk is about."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write {self.folder / self.files[-1]['name']}: {error}. Free space or "
                "choose another output, and build again; the unfinished data is removed."
            ) from error
