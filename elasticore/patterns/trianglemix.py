"""TriangleMix: sinks and a window, but the last rows read everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore.checks import check_int
from elasticore.layout import Segments
from elasticore.patterns.rows import Rows, lists_of
from elasticore.patterns.selector import BlockLists, BlockSelector
from elasticore.patterns.streaming import Streaming

__all__ = ["TriangleMix"]


@dataclass(frozen=True)
class TriangleMix(BlockSelector):
    """Leave out the middle of the score matrix, which the last rows alone may read.

    A row block reads what a STREAMING head reads, ``sink`` and ``local``; a row block that holds
    one of the sequence's ``last`` tokens reads everything. No score is computed: q and k give the
    sizes only. The method has this in its deeper layers only; a head table says in which
    (:class:`elasticore.HeadTable`).

    Parameters
    ----------
    sink
        Tokens at the start that every query reads: a multiple of the block size, 0 for none.
    local
        Tokens of the window, which ends at the query's own block: a multiple of the block size.
    last
        Tokens at the end whose row blocks read everything.

    Notes
    -----
    He et al. 2025 (TriangleMix, arXiv 2507.21526), which has 8, 512 and 128 tokens. Here sink and
    window are whole blocks, and the last rows are whole row blocks, so each is at least as large.
    Which rows are last depends on where the call ends: of a prefill in chunks, the last rows of
    *every* chunk read everything. Memory: the lists and, while they are made, 13 bytes per
    sequence, row block and key block.
    """

    sink: int = 128
    local: int = 512
    last: int = 128

    def __post_init__(self) -> None:
        Streaming(self.sink, self.local)
        check_int("last", self.last, 1)

    def check(self, block_size: int) -> None:
        """Raise ``ValueError`` unless ``sink`` and ``local`` are multiples of ``block_size``."""
        Streaming(self.sink, self.local).blocks(block_size)

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        """Choose the key blocks of every row block; see :class:`BlockSelector`."""
        streaming = Streaming(self.sink, self.local)
        rows = Rows.of(segments, q.shape[2], block_size)
        block = torch.arange(-(-k.shape[2] // block_size), device=q.device)
        row = rows.block[..., None]
        is_last = (row + 1) * block_size > (segments.key_length - self.last)[:, None, None]
        chosen = streaming.reads(row, block, block_size) | is_last
        return lists_of(
            chosen[:, None],
            rows,
            heads=q.shape[1],
            keys=k.shape[2],
            block=block_size,
            block_size=block_size,
        )
