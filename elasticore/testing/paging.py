"""The keys and values of a problem in pages, wherever they may lie."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from elasticore.call import paged_attention
from elasticore.layout import SequenceLayout
from elasticore.pages import Pages
from elasticore.patterns import HeadMode
from elasticore.testing.problems import Problem

__all__ = ["paged", "run_paged"]

NOWHERE = -7
"""Entry of a page that nobody reads."""


def paged(problem: Problem, page_size: int, *, seed: int = 0, by_head: bool = True) -> Pages:
    """The keys and values of a problem in pages, in a random order.

    What no head reads has no page. Whatever is no key or value is NaN, as are the pages that no
    entry names.

    Parameters
    ----------
    problem
        Dense or packed.
    page_size
        Tokens of a page.
    seed
        Of the order.
    by_head
        Whether each head has pages of its own in one pool without heads; else a page has room for
        all heads, as in vLLM, and streaming heads keep what they do not read.
    """
    segments = torch.stack(problem.segments(), 1).tolist()
    kv_heads, dim = problem.k.shape[1], problem.k.shape[3]
    device, plan = problem.k.device, problem.plan
    blocks = 1 + max(-(-keys // page_size) for *_, keys in segments)
    heads = kv_heads if by_head else 1
    room = 2 * len(segments) * heads * blocks + 3
    pool = torch.full((room, kv_heads // heads, page_size, 2 * dim), torch.nan,
                      dtype=problem.k.dtype, device=device)  # fmt: skip
    table = torch.full((len(segments), kv_heads, blocks), NOWHERE, dtype=torch.int32)
    free = torch.randperm(room, generator=torch.Generator().manual_seed(seed)).tolist()
    sink, local = (x * plan.block_size for x in plan.streaming.blocks(plan.block_size))
    modes = plan.modes.tolist()
    for index, (row, _, queries, start, keys) in enumerate(segments):
        window = ((keys - queries) // plan.block_size + 1) * plan.block_size - local
        both = torch.cat((problem.k, problem.v), -1).detach()[row, :, start : start + keys]
        for block in range(-(-keys // page_size)):
            first, last = block * page_size, min((block + 1) * page_size, keys)
            for head in range(heads):
                gone = modes[index][head] == HeadMode.STREAMING and sink <= first and last <= window
                if by_head and gone:
                    continue
                page = free.pop()
                own = slice(head, head + 1) if by_head else slice(None)
                table[index, own, block] = page
                pool[page, :, : last - first] = both[own, first:last]
    keys, values = pool.expand(-1, kv_heads, -1, -1).chunk(2, -1)
    lengths = problem.segments().key_length
    return Pages(keys, values, table.to(device), lengths)


def run_paged(problem: Problem, pages: Pages, backend: str) -> Tensor:
    """Run a problem on ``backend`` over pages."""
    layout = problem.layout
    if layout.kind == "packed":
        layout = dataclasses.replace(layout, cu_keys=layout.cu_queries)
    else:
        layout = SequenceLayout.dense()
    return paged_attention(
        problem.q, pages, problem.plan, layout=layout, scale=problem.scale, backend=backend
    )
