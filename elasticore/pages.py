"""Keys and values in pages of a pool, each found by a table: a cache that gives memory back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore.layout import Segments, SequenceLayout

__all__ = ["Pages"]


@dataclass(frozen=True, eq=False)
class Pages:
    """Where the keys and values of each (sequence, KV head) lie in a pool.

    Token ``t`` of a sequence is at ``[table[sequence, head, t // page_size], head, t % page_size]``
    of ``keys`` and ``values``. Sequences and heads may share pages, and the pages of one may be
    anywhere. What a head does not read need not be there: its entries may be any number, and pages
    that no entry names may hold anything.

    Parameters
    ----------
    keys, values
        ``[pages, Hkv, page_size, D]``, any strides with a unit last one: halves of one pool with
        keys beside values, a pool of each, or one without heads, whose axis has a stride of 0.
    table
        int32 ``[sequences, Hkv, blocks]``, a page for every ``page_size`` tokens.
    lengths
        int64 ``[sequences]``: keys of each sequence, those of the call's own queries included.

    Raises
    ------
    TypeError, ValueError
        If these do not fit together. What the table and the lengths hold is not read.

    Notes
    -----
    With one pool ``[pages, page_size, 2 * D]`` for all heads::

        keys, values = pool[:, None].expand(-1, kv_heads, -1, -1).chunk(2, -1)

    vLLM's pages are such views of its cache, with one table row for all heads:
    ``table[:, None].expand(-1, kv_heads, -1)``.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("keys", self.keys), ("values", self.values)):
            if not isinstance(tensor, Tensor) or tensor.ndim != 4:
                got = list(tensor.shape) if isinstance(tensor, Tensor) else tensor
                raise ValueError(
                    f"{name} must be a tensor [pages, kv_heads, page_size, head_dim], got {got!r}."
                )
            if tensor.stride(3) != 1:
                raise ValueError(
                    f"{name} must be contiguous along head_dim, got strides {tensor.stride()}."
                )
        if self.keys.shape != self.values.shape or self.keys.dtype != self.values.dtype:
            raise ValueError(
                f"values must be like keys {list(self.keys.shape)} {self.keys.dtype}, got "
                f"{list(self.values.shape)} {self.values.dtype}."
            )
        size = self.page_size
        if size < 16 or size & (size - 1):
            raise ValueError(f"pages must hold a power of two of at least 16 tokens, got {size}.")
        table, lengths = self.table, self.lengths
        if not isinstance(table, Tensor) or table.dtype != torch.int32 or table.ndim != 3:
            raise TypeError(
                f"table must be an int32 tensor [sequences, kv_heads, blocks], got {_told(table)}."
            )
        if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64 or lengths.ndim != 1:
            raise TypeError(f"lengths must be an int64 tensor [sequences], got {_told(lengths)}.")
        if table.shape[:2] != (len(lengths), self.keys.shape[1]):
            raise ValueError(
                f"table must have {len(lengths)} sequences (lengths) and {self.keys.shape[1]} KV "
                f"heads (keys), got {list(table.shape)}."
            )
        if len({x.device for x in (self.keys, self.values, table, lengths)}) > 1:
            raise ValueError("keys, values, table and lengths must be on one device.")

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have, which is all that the host knows of its length."""
        return self.table.shape[2] * self.page_size

    def check(self, batch: int, layout: SequenceLayout) -> None:
        """Raise ``ValueError`` unless queries ``[batch, ...]`` lie so that they fit the sequences.

        Dense: a row for each sequence. Packed, with ``cu_queries``: one row holds all.
        """
        if layout.kind == "padded" or layout.sequences(batch) != len(self.lengths):
            raise ValueError(
                f"layout must be dense or packed with the {len(self.lengths)} sequences of pages, "
                f"got a {layout.kind} one of {layout.sequences(batch)}."
            )

    def segments(self, q: Tensor, layout: SequenceLayout) -> Segments:
        """Where the queries ``[B, Hq, Tq, D]`` lie, and how many keys each sequence has.

        Of a sequence with more queries than keys, only the last ones are its own.
        """
        batch, _, queries, _ = q.shape
        found = layout.segments(batch, queries, queries, q.device)
        own = torch.minimum(found.query_length, self.lengths)
        return Segments(
            found.row,
            found.query_start + found.query_length - own,
            own,
            torch.zeros_like(self.lengths),
            self.lengths,
        )


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
