"""The pages that a head reads, as a table of its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["near_pages"]


def near_pages(
    table: Tensor, seen: Tensor, streaming: Tensor, sink: int, local: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """Tables and lengths with which a kernel that reads everything reads what each head may.

    For one query per sequence, the last one: a streaming head's sink and window are whole pages,
    the last of which ends with the query itself.

    Parameters
    ----------
    table
        ``[n, blocks]``: each sequence's pages.
    seen
        int64 ``[n]``: its tokens.
    streaming
        bool ``[n, Hkv]``: which heads read their sink and window alone.
    sink, local
        Pages of these; the window counts the query's own page.
    page_size
        Tokens of a page.

    Returns
    -------
    tuple of Tensor
        ``[n, Hkv, blocks used]``, and int64 ``[n, Hkv]`` of what is left of ``seen``.
    """
    blocks = (seen + page_size - 1) // page_size
    skipped = (blocks - sink - local).clamp(min=0)[:, None] * streaming
    block = torch.arange(int(blocks.max()), device=table.device)
    place = block + torch.where(block < sink, 0, skipped[:, :, None])
    place = place.clamp(max=table.shape[1] - 1)
    found = table[:, None].long().expand(-1, streaming.shape[1], -1).gather(2, place)
    return found, seen[:, None] - skipped * page_size
