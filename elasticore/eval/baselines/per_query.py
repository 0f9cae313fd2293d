"""MoBA and InfLLM-V2 as published: every query chooses its own blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from elasticore.eval.baselines.attach import Call
from elasticore.layout import SequenceLayout
from elasticore.patterns.infllm import InfLLMV2
from elasticore.patterns.moba import MoBA

__all__ = ["PerQuery", "masked", "tiles"]

TILE = 128
"""Queries whose masks are held at a time: one byte per key and query head each."""


class PerQuery(nn.Module):
    """A selector's choice for each query alone, where the lane SELECTED has one per row block.

    No backend can do this; :func:`~elasticore.eval.baselines.attend_with` runs it in a model. It
    also holds while decoding.

    Parameters
    ----------
    selector
        What chooses.
    """

    def __init__(self, selector: MoBA | InfLLMV2) -> None:
        super().__init__()
        if not isinstance(selector, (MoBA, InfLLMV2)):
            raise TypeError(f"selector must be MoBA or InfLLMV2, got {selector!r}.")
        self.selector = selector

    def forward(self, call: Call) -> Tensor:
        """Attention ``[1, Hq, Tq, D]`` of a :class:`~elasticore.eval.baselines.Call`."""
        queries, keys = call.q.shape[2], call.k.shape[2]
        segments = SequenceLayout.dense().segments(1, queries, keys, call.q.device)
        with torch.no_grad():
            chosen = self.selector.choose(call.q, call.k, segments, 1, call.scale)
        return torch.cat(
            [
                masked(call, first, last, chosen[:, :, first:last], self.selector.block)
                for first, last in tiles(queries)
            ],
            2,
        )


def tiles(queries: int) -> Iterator[tuple[int, int]]:
    """Spans of queries to work on at a time."""
    for first in range(0, queries, TILE):
        yield first, min(first + TILE, queries)


def masked(call: Call, first: int, last: int, chosen: Tensor, block: int) -> Tensor:
    """Causal attention of the queries ``[first, last)`` to the chosen blocks of ``block`` tokens.

    ``chosen`` is bool ``[1, heads or fewer, last - first, blocks]``.
    """
    past = call.k.shape[2] - call.q.shape[2]
    key = torch.arange(past + last, device=call.q.device)
    position = torch.arange(past + first, past + last, device=call.q.device)[:, None]
    mask = chosen[..., key // block] & (key <= position)
    return scaled_dot_product_attention(
        call.q[:, :, first:last],
        call.k[:, :, : past + last],
        call.v[:, :, : past + last],
        attn_mask=mask.repeat_interleave(call.q.shape[1] // mask.shape[1], 1),
        scale=call.scale,
        enable_gqa=True,
    )
