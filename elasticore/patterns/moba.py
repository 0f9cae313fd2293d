"""MoBA: each row block reads its own block and those whose mean key suits it best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore.checks import check_int
from elasticore.layout import Segments
from elasticore.patterns.rows import Rows, heaviest, key_means, lists_of, query_tiles
from elasticore.patterns.selector import BlockLists, BlockSelector

__all__ = ["MoBA"]


@dataclass(frozen=True)
class MoBA(BlockSelector):
    """Keep the ``top_k`` blocks of the best mean key, for a row block's mean query.

    Blocks of ``block`` tokens are scored by ``mean(q) · mean(k)``: the mean of a row block's
    queries with the mean of a key block's keys. The own block is always read and is one of the
    ``top_k``; the others are complete blocks before it. Every query head chooses for itself.

    Parameters
    ----------
    block
        Tokens of a key block: a multiple of the plan's block size.
    top_k
        Blocks that a row reads, its own among them.

    Notes
    -----
    Lu et al. 2025 (MoBA, arXiv 2502.13189), with the sizes of the Elastic Attention paper's
    Table 6. There every *query* chooses; here the queries of a row block choose together, by the
    mean of their scores. A smaller plan block size makes the rows finer.
    Memory: a few times the lists, and 8 bytes per query head, row block and block.
    """

    block: int = 1024
    top_k: int = 8

    def __post_init__(self) -> None:
        check_int("block", self.block, 1)
        check_int("top_k", self.top_k, 1)

    def check(self, block_size: int) -> None:
        """Raise ``ValueError`` unless ``block`` is a multiple of ``block_size``."""
        if self.block % block_size:
            raise ValueError(
                f"selector block={self.block} must be a multiple of block_size={block_size}; use "
                "another block, or a smaller block_size."
            )

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        """Choose the key blocks of every row block; see :class:`BlockSelector`."""
        self.check(block_size)
        return lists_of(
            self.choose(q, k, segments, block_size),
            Rows.of(segments, q.shape[2], block_size),
            heads=q.shape[1],
            keys=k.shape[2],
            block=self.block,
            block_size=block_size,
        )

    def choose(
        self, q: Tensor, k: Tensor, segments: Segments, rows: int, scale: float = 1.0
    ) -> Tensor:
        """The choice in blocks of ``block`` tokens, for rows of any number of queries.

        Parameters
        ----------
        q, k, segments
            See :meth:`BlockSelector.select <elasticore.BlockSelector.select>`.
        rows
            Queries that choose together, counted from each sequence's start; 1: each for itself.
        scale
            Changes nothing: it is the same for all blocks.

        Returns
        -------
        Tensor
            bool ``[sequences, Hq, rows of queries, blocks]``.
        """
        keys = key_means(k, segments, self.block, self.block)
        block = torch.arange(keys.shape[2], device=q.device)
        places = Rows.of(segments, q.shape[2], rows)
        chosen = []
        for tile in query_tiles(q, k.shape[1], segments, places, rows, q.shape[3]):
            queries = tile.values.sum(4, dtype=torch.float64)  # [sequences, Hkv, group, rows, D]
            queries = queries / tile.present.sum(-1)[:, None, None, :, None].clamp(min=1)
            own = tile.position[:, None, None, :, :1] // self.block
            scores = queries @ keys.transpose(2, 3)[:, :, None]
            chosen.append(heaviest(scores, block == own, block <= own, self.top_k))
        return torch.cat(chosen, 3).flatten(1, 2)
