"""Results as rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Row", "write_csv"]

Row = Mapping[str, str | int | float]


def write_csv(rows: Sequence[Row], path: str | Path) -> Path:
    """Write rows, with the first one's keys as the header; floats keep every digit.

    Raises
    ------
    ValueError
        If there is no row, or one has other keys than the first.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            if row.keys() != rows[0].keys():
                raise ValueError(f"rows must have the keys {list(rows[0])}, got {list(row)}.")
            writer.writerow(row)
    return path
