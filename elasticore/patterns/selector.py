"""What a SELECTED head reads: the contract between a block selector and the backends."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.patterns.pattern import HeadMode, Pattern

__all__ = ["BlockLists", "BlockSelector"]


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The key blocks that each row block of each query head reads.

    Attributes
    ----------
    indices
        int32 or int16 ``[sequences, Hq, row blocks, width]``: ascending key blocks; what follows
        the counted ones may be anything. Row ``r`` of sequence ``s`` is the absolute row block
        ``first_row_block[s] + r``, where
        ``first_row_block = (key_length - query_length) // block_size``.
    counts
        int32 ``[sequences, Hq, row blocks]``: how many of them count. Every row block that has a
        query lists at least its own (diagonal) block; the others count 0.
    """

    indices: Tensor
    counts: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> BlockLists:
        """The lists of a boolean ``[sequences, Hq, row blocks, key blocks]`` block mask."""
        counts = mask.sum(-1, dtype=torch.int32)
        block = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
        # A stable sort by "not chosen" keeps the chosen blocks first and ascending.
        order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
        indices = torch.where(block < counts[..., None], order.int(), -1)
        return cls(indices, counts)

    def to_mask(self, key_blocks: int) -> Tensor:
        """The boolean ``[sequences, Hq, row blocks, key_blocks]`` block mask of these lists."""
        # Padding goes to one extra column, which is cut off.
        place = torch.arange(self.indices.shape[-1], device=self.indices.device)
        listed = place < self.counts[..., None]
        target = torch.where(listed, self.indices, key_blocks).long()
        mask = torch.zeros(
            *self.indices.shape[:-1], key_blocks + 1, dtype=torch.bool, device=self.indices.device
        )
        return mask.scatter_(-1, target, True)[..., :key_blocks]


class BlockSelector(Pattern):
    """Chooses key blocks from q and k: a sparse method is one subclass in one file.

    :meth:`select` in plain PyTorch *is* the method's definition. A backend may bring a faster one
    for a selector's class; the conformance suite holds it to this definition.
    """

    lane: ClassVar[HeadMode] = HeadMode.SELECTED

    @abstractmethod
    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        """Choose the key blocks of every row block.

        Parameters
        ----------
        q
            Queries ``[B, Hq, Tq, D]``.
        k
            Keys ``[B, Hkv, Tk, D]``, after rotary embedding, as the attention sees them.
        segments
            Where the sequences lie (:meth:`elasticore.SequenceLayout.segments`).
        block_size
            Tokens per block.
        scale
            The attention's factor on q·k.

        Returns
        -------
        BlockLists
            Every list ascends and holds the row's diagonal block.
        """
