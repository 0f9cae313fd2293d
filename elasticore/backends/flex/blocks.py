"""The block mask of a routing, written down block by block.

Row block i of a head reads its diagonal block, causally inside, and whole blocks before that: the
n-th is n for a FULL head; a STREAMING head skips from its sink to its window; a SELECTED head has a
list, whose last entry is the diagonal. So nothing of the size of the scores is ever evaluated. A
table takes 4 bytes per row block, key block and query head: 134 MB for 32 heads at 128K tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from elasticore.backends.flex.arrangement import Arrangement
from elasticore.patterns import BlockLists, HeadMode
from elasticore.plan import HeadPlan

__all__ = ["Blocks", "blocks_read"]


class Blocks(NamedTuple):
    """Which blocks meet, from one side: for every row block its key blocks, or the other way round.

    Attributes
    ----------
    diagonal, diagonals
        int32 ``[rows, Hq, n, 1]`` and ``[rows, Hq, n]``: the one that is masked inside, and whether
        there is one, 0 or 1.
    whole, wholes
        int32 ``[rows, Hq, n, m]`` and ``[rows, Hq, n]``: those that are read whole, and how many.
    """

    diagonal: Tensor
    diagonals: Tensor
    whole: Tensor
    wholes: Tensor

    @classmethod
    def of(cls, diagonal: Tensor, diagonals: Tensor, whole: Tensor, wholes: Tensor) -> Blocks:
        """Both indices as parts of one table.

        So they have the same strides: up to PyTorch 2.11, FlexAttention's kernels find the rows of
        both with those of the diagonal. Each starts at a multiple of 16 bytes, or PyTorch would
        copy it in every call.
        """
        *rows, number = whole.shape
        ahead = -(-number // 4) * 4
        table = whole.new_zeros(*rows, ahead + 4, dtype=torch.int32)
        table[..., :number] = whole
        table[..., ahead : ahead + 1] = diagonal
        return cls(
            table[..., ahead : ahead + 1],
            diagonals.int().contiguous(),
            table[..., :number],
            wholes.int().contiguous(),
        )

    def transposed(self, others: int) -> Blocks:
        """The same from the other side, which has ``others`` blocks; a backward pass needs it."""
        mask = BlockLists(self.whole, self.wholes).to_mask(others)
        whole = BlockLists.from_mask(mask.transpose(2, 3))
        mask = BlockLists(self.diagonal, self.diagonals).to_mask(others).transpose(2, 3)
        return Blocks.of(
            mask.byte().argmax(3, keepdim=True),
            mask.sum(3),
            whole.indices.clamp(min=0),
            whole.counts,
        )


def blocks_read(
    plan: HeadPlan, arrangement: Arrangement, lists: BlockLists | None, query_heads: int
) -> Blocks:
    """The key blocks that every row block of every query head reads.

    Parameters
    ----------
    plan
        The modes and what they mean.
    arrangement
        Where the blocks lie.
    lists
        The blocks of SELECTED heads, if the plan can have any.
    query_heads
        ``Hq``.
    """
    rows, keys, first_row = arrangement
    device = plan.modes.device
    owner = rows.sequence
    local = torch.arange(rows.blocks, device=device) - rows.start[owner]
    exists = (local < rows.number[owner])[:, None]
    row = (first_row[owner] + local)[:, None]  # [rows, 1, n], its number in its sequence

    every = plan.modes.repeat_interleave(query_heads // plan.modes.shape[1], 1)
    mode = every[owner].transpose(1, 2)  # [rows, Hq, n]
    sink, local_blocks = plan.streaming.blocks(plan.block_size)
    near = sink + local_blocks - 1  # whole blocks of a STREAMING head's row
    streaming = mode == int(HeadMode.STREAMING)
    count = torch.where(streaming, row.clamp(max=near), row)
    n = torch.arange(keys.blocks, dtype=torch.int32, device=device)
    gap = ((row - near).clamp(min=0) * streaming).int()[..., None]
    whole = n + torch.where(n < sink, 0, gap)
    if lists is not None and lists.counts.shape[2]:
        selected = mode == int(HeadMode.SELECTED)
        place = local.clamp(0, lists.counts.shape[2] - 1)
        count = torch.where(selected, lists.counts[owner, :, place].transpose(1, 2) - 1, count)
        listed = lists.indices[owner, :, place].transpose(1, 2)[..., : keys.blocks]
        listed = pad(listed, (0, keys.blocks - listed.shape[3]))
        whole = torch.where(selected[..., None], listed.int(), whole)
    base = keys.start[owner][:, None].int()
    # What is beyond the count is not read, but must be a block.
    whole = (whole + base[..., None]).clamp_(0, keys.blocks - 1)
    diagonal = (row.int() + base).clamp(0, keys.blocks - 1).expand_as(mode)
    return Blocks.of(
        diagonal[..., None], exists.expand_as(mode), whole, (count * exists).clamp(min=0)
    )
