"""Packing: sequences of different lengths into rows of at most so many tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Generic, TypeVar

from elasticore.checks import check_int

__all__ = ["Packer"]

Item = TypeVar("Item", bound=Sized)


class Packer(Generic[Item]):
    """Greedy packing of a stream: each item goes into the fullest open row that still has room.

    No item is split. The rows depend on the order of the items only. At most ``rows`` are open at
    a time, so memory does not grow with the stream; what is lost to that is little, as a row
    that is nearly full is closed first.

    Parameters
    ----------
    capacity
        Tokens of a row.
    rows
        Rows kept open.

    Examples
    --------
    >>> packer = Packer(capacity=10)
    >>> items = ["aaaaaaa", "bbbbb", "ccc", "ddddd"]
    >>> [row for item in items for row in packer.add(item)]
    [['aaaaaaa', 'ccc'], ['bbbbb', 'ddddd']]
    >>> list(packer.flush())
    []
    """

    def __init__(self, capacity: int, rows: int = 32) -> None:
        check_int("capacity", capacity, 1)
        check_int("rows", rows, 1)
        self.capacity, self.rows = capacity, rows
        self._open: list[tuple[int, list[Item]]] = []  # room and items, oldest first

    def add(self, item: Item) -> Iterator[list[Item]]:
        """Take an item; give the rows that are full, or have to make way, for it."""
        length = len(item)
        if length > self.capacity:
            raise ValueError(
                f"an item of {length} tokens does not fit a row of {self.capacity}; "
                "filter by length before packing."
            )
        fitting = [at for at, (room, _) in enumerate(self._open) if room >= length]
        if fitting:
            room, items = self._open.pop(min(fitting, key=lambda at: self._open[at][0]))
        else:
            room, items = self.capacity, []
        row = (room - length, [*items, item])
        if row[0] == 0:
            yield row[1]
            return
        if len(self._open) == self.rows:
            fullest = min(range(self.rows), key=lambda at: self._open[at][0])
            yield self._open.pop(fullest)[1]
        self._open.append(row)

    def flush(self) -> Iterator[list[Item]]:
        """Give the rows that are still open, the oldest first."""
        while self._open:
            yield self._open.pop(0)[1]
