"""A backend that masks a full score matrix: slow, quadratic in memory, and complete."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elasticore import (
    AttentionRequest,
    BlockLists,
    HeadMode,
    HeadPlan,
    HybridHeadAttention,
    SequenceLayout,
    Verdict,
    straight_through,
)

LONGEST = 4096
"""Keys up to which the scores of all heads are held."""


class ExampleAttention(HybridHeadAttention):
    """Every lane as a mask over all scores, one sequence after the other."""

    name = "example"

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(True)  # it needs PyTorch only

    def supports(self, request: AttentionRequest) -> Verdict:
        if request.keys > LONGEST:
            return Verdict(
                False, f"it holds all scores, for up to {LONGEST} keys; there are {request.keys}."
            )
        return Verdict(True)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: HeadPlan,
        *,
        layout: SequenceLayout,
        scale: float,
    ) -> Tensor:
        out = masked_attention(q, k, v, plan, layout, scale)
        if plan.gate is None or not (plan.gate.requires_grad and torch.is_grad_enabled()):
            return out
        with torch.no_grad():
            other = masked_attention(q, k, v, plan.swapped(), layout, scale)
        return straight_through(plan.gate, out, other, layout, k.shape[2])


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HeadPlan,
    layout: SequenceLayout,
    scale: float,
) -> Tensor:
    """Each sequence on its own slice of the batch; queries of padding stay zero."""
    segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)
    lists = None
    if plan.selector is not None:
        with torch.no_grad():
            lists = plan.selector.select(q, k, segments, block_size=plan.block_size, scale=scale)
    out = torch.zeros_like(q)
    slices = torch.stack(segments, 1).tolist()  # on a GPU this waits for the device
    for sequence, (row, q_start, queries, k_start, keys) in enumerate(slices):
        if queries == 0:
            continue
        at = row, slice(None), slice(q_start, q_start + queries)
        keys_at = row, slice(None), slice(k_start, k_start + keys)
        mask = visible(plan, lists, sequence, q.shape[1], queries, keys)
        with sdpa_kernel(SDPBackend.MATH):  # of its kernels, the one with the same bits every time
            out[at] = scaled_dot_product_attention(
                q[at][None],
                k[keys_at][None],
                v[keys_at][None],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )[0]
    return out


def visible(
    plan: HeadPlan, lists: BlockLists | None, sequence: int, heads: int, queries: int, keys: int
) -> Tensor:
    """What each query of one sequence reads: bool ``[query heads, queries, keys]``."""
    modes, size = plan.modes[sequence], plan.block_size
    past = keys - queries
    column = torch.arange(keys, device=modes.device)
    row = torch.arange(past, keys, device=modes.device)[:, None]
    sink, local = plan.streaming.blocks(size)
    near = (column // size < sink) | (column // size > row // size - local)
    lanes = {HeadMode.FULL: column >= 0, HeadMode.STREAMING: near}
    if lists is not None:
        own = BlockLists(lists.indices[sequence], lists.counts[sequence])
        blocks = own.to_mask(-(-keys // size))  # [query heads, row blocks, key blocks]
        lanes[HeadMode.SELECTED] = blocks[:, row[:, 0] // size - past // size][..., column // size]
    # A KV head's mode is that of all its query heads.
    modes = modes.repeat_interleave(heads // len(modes))[:, None, None]
    seen = torch.zeros((), dtype=torch.bool, device=modes.device)
    for mode, mask in lanes.items():
        seen = seen | ((modes == int(mode)) & mask)
    return seen & (column <= row)
