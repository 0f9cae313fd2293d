"""XAttention: key blocks chosen by the mass on the antidiagonals of the score matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.patterns.selector import BlockLists, BlockSelector

__all__ = ["XAttention"]


@dataclass(frozen=True)
class XAttention(BlockSelector):
    """Score blocks by their antidiagonals, keep the sink, the diagonal and the heaviest others.

    With stride ``S``, the cell ``A[i, j] = Σ_s q[iS + S-1-s] · k[jS + s]`` sums one antidiagonal
    of an S×S tile. Each row of ``scale / S · A`` goes through a softmax over the cells ``j <= i``;
    the cells of a block add up to its mass. A row block keeps block 0 and its diagonal block, then
    the others from the heaviest down (the earlier one on a tie), until the mass kept reaches
    ``threshold`` of the row's total.

    Row blocks are scored one by one, each from its own queries and the keys up to it, so a prefill
    in chunks that start on block boundaries chooses the very same blocks as one in one go. Where a
    call starts inside a row block, that block is scored by the queries at hand.

    Parameters
    ----------
    stride
        ``S``, in tokens: a power of two that divides the block size.
    threshold
        Share of a row's mass to keep, in (0, 1]. The paper uses 0.9; the released evaluation 0.8.
    official_quirk
        Choose as the released code does. In its first chunk an index slip overwrites the forced
        sink: block 0 is kept but its mass is not counted, and one block more is added.
    chunk
        Tokens of the released code's chunk; read only with ``official_quirk``.

    Notes
    -----
    Xu et al. 2025 (XAttention); Section 4.1 and Table 6 of the Elastic Attention paper. The cost is
    ``1 / (2 S)`` of dense causal attention's FLOPs. Memory: scores of one row block at a time.
    """

    stride: int = 16
    threshold: float = 0.9
    official_quirk: bool = False
    chunk: int = 16384

    def __post_init__(self) -> None:
        for name, value in (("stride", self.stride), ("chunk", self.chunk)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int (tokens), got {value!r}.")
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two tokens, got {value}.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"threshold must be a float in (0, 1], got {self.threshold!r}.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}.")
        if not isinstance(self.official_quirk, bool):
            raise TypeError(f"official_quirk must be a bool, got {self.official_quirk!r}.")

    def check(self, block_size: int) -> None:
        """Raise ``ValueError`` unless ``stride`` divides ``block_size``."""
        if block_size % self.stride:
            raise ValueError(
                f"selector stride={self.stride} must divide block_size={block_size}; use a stride "
                "of at most the block size."
            )

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        """Choose the key blocks of every row block; see :class:`BlockSelector`."""
        self.check(block_size)
        query_heads, kv_heads = q.shape[1], k.shape[1]
        chosen = []  # per sequence, per row block: bool [Hq, key blocks]
        for row, q_start, q_length, k_start, k_length in torch.stack(segments, 1).tolist():
            queries = q[row, :, q_start : q_start + q_length].unflatten(0, (kv_heads, -1))
            keys = k[row, :, k_start : k_start + k_length]
            past = k_length - q_length
            blocks = range(past // block_size, -(-k_length // block_size)) if q_length else range(0)
            chosen.append(
                [
                    self._choose(
                        self._mass(queries, keys, past, block, block_size, scale), block_size
                    )
                    for block in blocks
                ]
            )
        rows = max((len(masks) for masks in chosen), default=0)
        width = max((mask.shape[-1] for masks in chosen for mask in masks), default=0)
        mask = torch.zeros(len(chosen), query_heads, rows, width, dtype=torch.bool, device=q.device)
        for sequence, masks in enumerate(chosen):
            for index, one in enumerate(masks):
                mask[sequence, :, index, : one.shape[-1]] = one
        return BlockLists.from_mask(mask)

    def _mass(
        self, q: Tensor, k: Tensor, past: int, block: int, block_size: int, scale: float
    ) -> Tensor:
        """The mass of key blocks 0..block for row block ``block``: float ``[Hq, block + 1]``.

        ``q`` is ``[Hkv, group, Tq, D]`` and starts at position ``past``; ``k`` is ``[Hkv, Tk, D]``.
        """
        kv_heads, group, _, dim = q.shape
        cells = block_size // self.stride
        begin, end = block * block_size, (block + 1) * block_size
        first, last = max(begin, past), min(end, k.shape[1])
        exact = torch.promote_types(q.dtype, torch.float32)

        # Positions without a query or key are zero; a cell without any query does not vote.
        tile = q.new_zeros(kv_heads, group, block_size, dim, dtype=exact)
        tile[:, :, first - begin : last - begin] = q[:, :, first - past : last - past]
        columns = k.new_zeros(kv_heads, end, dim, dtype=exact)
        columns[:, :last] = k[:, :last]
        voting = torch.arange(cells, device=q.device)
        voting = (voting >= (first - begin) // self.stride) & (voting * self.stride < last - begin)

        # An antidiagonal's sum is a dot product of S·D terms, once q is reversed inside each cell.
        tile = tile.unflatten(2, (cells, self.stride)).flip(3).flatten(3)
        columns = columns.unflatten(1, (-1, self.stride)).flatten(2)
        scores = tile.flatten(1, 2) @ columns.transpose(1, 2) * (scale / self.stride)
        scores = scores.unflatten(1, (group, cells))
        cell = torch.arange(columns.shape[1], device=q.device)
        own = block * cells + torch.arange(cells, device=q.device)
        scores = scores.masked_fill(cell > own[:, None], -torch.inf)
        weights = scores.softmax(-1) * voting[:, None]
        mass = weights.sum(2).unflatten(-1, (block + 1, cells)).sum(-1)
        return mass.flatten(0, 1)

    def _choose(self, mass: Tensor, block_size: int) -> Tensor:
        """The blocks to keep out of ``mass`` ``[Hq, n]``, the last one being the diagonal."""
        mass = mass.double()
        diagonal = mass.shape[-1] - 1
        slip = self.official_quirk and diagonal < self.chunk // block_size
        forced = torch.zeros_like(mass, dtype=torch.bool)
        forced[:, diagonal] = True
        if not slip:
            forced[:, 0] = True
        required = mass.sum(-1, keepdim=True) * self.threshold
        kept = mass.where(forced, 0).sum(-1, keepdim=True)
        # -1 sends the forced blocks to the end of the order, behind every real mass.
        others, order = mass.masked_fill(forced, -1).sort(dim=-1, descending=True, stable=True)
        others = others.clamp(min=0)
        before = kept + others.cumsum(-1) - others
        if slip:
            # The slip in the released code: each block is weighed against the mass kept one block
            # earlier, and the first one always enters.
            before = torch.cat([torch.zeros_like(kept), before[:, :-1]], -1)
        add = before < required
        chosen = forced | torch.zeros_like(forced).scatter(-1, order, add)
        chosen[:, 0] = True
        return chosen
