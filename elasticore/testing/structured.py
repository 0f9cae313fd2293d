"""Attention that is sparse by construction, as that of real models is and that of noise is not."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PlantedBlocks", "planted_blocks"]

SCORE = 20.0
"""Mean score of a query and the keys that it points to: e^20 outweighs any number of others."""
NOISE = 0.25
"""Standard deviation of what is added to q and k, whose entries are of unit size."""


class PlantedBlocks(NamedTuple):
    """The inputs of one attention call, and which of their blocks matter.

    Attributes
    ----------
    q, k, v
        ``[1, heads, length, head_dim]`` and twice ``[1, kv_heads, length, head_dim]``, with the
        strides that models hand over.
    mask
        bool ``[heads, row blocks, key blocks]``: the blocks that hold nearly all of a row block's
        attention, and the diagonal.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor


def planted_blocks(
    length: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    keep: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PlantedBlocks:
    """Draw q, k and v of one sequence in which every row block attends to ``keep`` key blocks.

    Key blocks come in passages of ``keep / 4`` blocks, and the keys of a passage share a random
    code. Each quarter of a row block's queries points to the code of a passage, one drawn from each
    quarter of the passages before the row block's own; the first passage points to itself. With the
    scale ``1 / sqrt(head_dim)`` the blocks that are pointed to hold nearly all of the row block's
    attention, in about equal shares. Any estimate that looks at no more than a quarter of a block
    at a time, as XAttention with a stride of up to ``block_size / 4`` does, can see them.

    Parameters
    ----------
    length
        Tokens, any number.
    heads, kv_heads
        Query heads, each with its own choice of passages, and KV heads, which divide them.
    head_dim
        At 32 and below, chance resemblances of codes begin to count.
    block_size
        Tokens of a block, a multiple of 4.
    keep
        Blocks, a multiple of 4; rows near the beginning have fewer to choose from.
    device, dtype
        Where and in what the tensors are made. The mask does not depend on them, the noise does.
    seed
        What decides everything that is random.

    Returns
    -------
    PlantedBlocks
        q, k, v and the mask of planted blocks.

    Raises
    ------
    ValueError
        If ``kv_heads`` does not divide ``heads``, or 4 does not divide ``keep`` or ``block_size``.
    """
    if heads % kv_heads:
        raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}.")
    for name, value in (("keep", keep), ("block_size", block_size)):
        if value < 1 or value % 4:
            raise ValueError(f"{name} must be a positive multiple of 4 blocks, got {value}.")
    device = torch.device(device)
    blocks, passage_size = math.ceil(length / block_size), keep // 4
    block = torch.arange(blocks)
    passage = block // passage_size
    generator = torch.Generator().manual_seed(seed)

    # Entries of unit size: codes of length sqrt(D).
    codes = torch.randn(kv_heads, blocks, head_dim, generator=generator)
    codes *= math.sqrt(head_dim) / codes.norm(dim=-1, keepdim=True)
    quarter = torch.arange(4) + torch.rand(heads, blocks, 4, generator=generator)
    target = (quarter / 4 * passage[:, None]).long()  # [heads, row blocks, 4], 0 in passage 0
    # The last row block may lack some of its quarters.
    exists = block[:, None] * block_size + torch.arange(4) * (block_size // 4) < length
    target = torch.where(exists, target, target[..., :1])

    chosen = torch.zeros(heads, blocks, blocks, dtype=torch.bool).scatter_(-1, target, True)
    mask = chosen[:, :, passage] & (block <= block[:, None])
    mask |= torch.eye(blocks, dtype=torch.bool)

    noise = torch.Generator(device).manual_seed(seed)

    def draw(count: int, codes: Tensor | None, scale: float = 1.0) -> Tensor:
        """``[1, count, length, D]`` around ``codes``, ``[count, equal spans, D]``, if given."""
        shape = (1, length, count, head_dim)
        x = torch.randn(shape, generator=noise, device=device, dtype=dtype)
        if codes is not None:
            span = blocks * block_size // codes.shape[1]
            spread = (codes * scale).to(device, dtype).transpose(0, 1).repeat_interleave(span, 0)
            x = x.mul_(NOISE).add_(spread[None, :length])
        return x.transpose(1, 2)

    # q points to the codes of its KV head's passages.
    own = torch.arange(heads)[:, None, None] // (heads // kv_heads)
    pointers = codes[own, target].flatten(1, 2)
    return PlantedBlocks(
        draw(heads, pointers, SCORE / math.sqrt(head_dim)),
        draw(kv_heads, codes[:, passage]),
        draw(kv_heads, None),
        mask.to(device),
    )
