"""A pattern: the first block, every n-th one, and the latest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore import BlockLists, BlockSelector, Segments


@dataclass(frozen=True)
class Strided(BlockSelector):
    """Key blocks ``0, n, 2n, ...`` and the ``recent`` latest ones, the diagonal among them.

    Parameters
    ----------
    every
        ``n``, in blocks.
    recent
        Blocks before and including the query's own, at least 1.
    """

    every: int = 4
    recent: int = 2

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("recent", self.recent)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1 block, got {value!r}.")

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        """The same blocks for every head; q and k give the sizes only."""
        past = (segments.key_length - segments.query_length)[:, None]
        # As many rows as any sequence may have: nothing is read from the device.
        rows = torch.arange(-(-q.shape[2] // block_size) + 1, device=q.device)
        row_block = past // block_size + rows  # [sequences, rows]
        exists = (row_block * block_size < segments.key_length[:, None]) & (
            segments.query_length > 0
        )[:, None]
        block = torch.arange(-(-k.shape[2] // block_size), device=q.device)
        row_block = row_block[..., None]
        chosen = (block % self.every == 0) | (block > row_block - self.recent)
        mask = chosen & (block <= row_block) & exists[..., None]
        return BlockLists.from_mask(mask[:, None].expand(-1, q.shape[1], -1, -1))
