"""What is right: dense masks in float64, with no code in common with any backend."""

from __future__ import annotations

import torch
from torch import Tensor

from elasticore.patterns import HeadMode
from elasticore.testing.problems import Problem

__all__ = ["attended", "dense_attention"]


def attended(problem: Problem, sequence: int, mode: HeadMode) -> Tensor:
    """The dense mask of one lane, token by token: bool ``[Hq, q_length, k_length]``.

    Written from the definition of the lanes, with nothing in common with any backend.
    """
    *_, query_length, _, key_length = (int(x[sequence]) for x in problem.segments())
    plan, heads = problem.plan, problem.q.shape[1]
    device = problem.q.device
    position = torch.arange(key_length, device=device)
    row = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    causal = (position <= row).expand(heads, -1, -1)
    block, row_block = position // plan.block_size, row // plan.block_size
    if mode is HeadMode.FULL:
        return causal
    if mode is HeadMode.STREAMING:
        sinks, window = plan.streaming.blocks(plan.block_size)
        return causal & ((block < sinks) | (block > row_block - window))
    assert plan.selector is not None
    lists = plan.selector.select(
        problem.q,
        problem.k,
        problem.segments(),
        block_size=plan.block_size,
        scale=problem.scale,
    )
    chosen = lists.to_mask(-(-problem.k.shape[2] // plan.block_size))[sequence]
    first = (key_length - query_length) // plan.block_size
    return causal & chosen[:, row_block[:, 0] - first][:, :, block]


def dense_attention(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """The call computed from dense masks in ``dtype``: ``[B, Hq, Tq, D]``, differentiable.

    Holds a mask and scores of every query against every key: for tests only.
    """
    q, k, v = (x.to(dtype) for x in (problem.q, problem.k, problem.v))
    plan = problem.plan
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for index, (row, q_start, q_length, k_start, k_length) in enumerate(
        torch.stack(problem.segments(), 1).tolist()
    ):
        if q_length == 0:
            continue
        queries = q[row, :, q_start : q_start + q_length].unflatten(0, (kv_heads, group))
        keys, values = (x[row, :, None, k_start : k_start + k_length] for x in (k, v))
        scores = queries @ keys.transpose(-1, -2) * problem.scale

        masks = {mode: attended(problem, index, mode) for mode in plan.lanes}

        def lane(mode: int, h: int) -> Tensor:
            mask = masks[HeadMode(mode)].unflatten(0, (kv_heads, group))[h]  # noqa: B023
            return scores[h].masked_fill(~mask, -torch.inf).softmax(-1) @ values[h]  # noqa: B023

        heads = range(kv_heads)
        if plan.gate is not None:
            gate = plan.gate[index].to(dtype)
            lanes = plan.retrieval.lane, plan.sparse.lane
            part = torch.stack(
                [(1 - gate[h]) * lane(lanes[0], h) + gate[h] * lane(lanes[1], h) for h in heads]
            )
        else:
            part = torch.stack([lane(int(plan.modes[index, h]), h) for h in heads])
        out[row, :, q_start : q_start + q_length] = part.flatten(0, 1)
    return out
