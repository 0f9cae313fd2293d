"""Sequences as rows of whole blocks.

FlexAttention's block mask knows blocks of the tensors that it is given: the first one starts at
query 0 and at key 0 of the batch row. Ours are anchored at each sequence's own first key, so with
padding, packing or queries that start inside a block the two do not coincide. An arrangement moves
the tokens so that they do: every sequence starts on a block boundary, and its queries keep their
places inside their blocks. Only diagonal blocks then need a mask inside, and it is the same one
everywhere. Slots without a token hold zeros, so that nothing in padding can leak.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elasticore.layout import SequenceLayout

__all__ = ["Arrangement", "Axis", "arrange"]


class Axis(NamedTuple):
    """Where the tokens of the query or the key axis go.

    Attributes
    ----------
    blocks
        Blocks of each row, from sizes alone: some may hold no token.
    sequence
        int64 ``[rows, blocks]``: the sequence that owns a block; anything where none does.
    start
        int64 ``[sequences]``: the first block of each sequence.
    number
        int64 ``[sequences]``: how many blocks it has.
    slots
        int64 ``[rows, blocks * size]``: the token in each slot, or -1. None with ``tokens``, where
        tokens stay in their places.
    tokens
        int64 ``[batch, length]``: the slot of each token, or -1.
    """

    blocks: int
    sequence: Tensor
    start: Tensor
    number: Tensor
    slots: Tensor | None
    tokens: Tensor | None

    def put(self, x: Tensor, size: int) -> Tensor:
        """``[batch, H, length, D]`` in blocks: ``[rows, H, blocks, size, D]``."""
        if self.slots is not None and self.tokens is not None:
            x = _Move.apply(x, self.slots, self.tokens)
        return x.unflatten(2, (self.blocks, size))

    def take(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`put`, of blocks that are one axis again; no token: zero."""
        if self.slots is None or self.tokens is None:
            return x
        moved: Tensor = _Move.apply(x, self.tokens, self.slots)
        return moved


class Arrangement(NamedTuple):
    """Both axes of a call, and the number of each sequence's first row block."""

    queries: Axis
    keys: Axis
    first_row: Tensor


class _Move(torch.autograd.Function):
    """Rows to other places, zero where none goes; the gradient takes the way back.

    Indexing would do, but its gradient adds up with atomics, as it cannot know that no row goes to
    two places.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(source, back)
        return _moved(x, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, back = ctx.saved_tensors
        return _moved(grads[0], back), None, None


def _moved(x: Tensor, source: Tensor) -> Tensor:
    index = source[:, None, :, None]
    shape = (*x.shape[:2], source.shape[1], x.shape[3])
    # where, not a product: what lies in padding may be NaN.
    return torch.where(index >= 0, x.gather(2, index.clamp(min=0).expand(shape)), 0)


def arrange(
    layout: SequenceLayout, batch: int, queries: int, keys: int, size: int, device: torch.device
) -> Arrangement:
    """Plan the moves of a layout, on the device and without waiting for it.

    Parameters
    ----------
    layout, batch, queries, keys, device
        As :meth:`elasticore.SequenceLayout.segments` takes them.
    size
        Tokens of a block.
    """
    segments = layout.segments(batch, queries, keys, device)
    packed, dense = layout.kind == "packed", layout.kind == "dense"
    past = segments.key_length - segments.query_length
    first_row = past // size
    key_number = -(-segments.key_length // size)
    row_number = (key_number - first_row) * (segments.query_length > 0)

    # The most blocks that so many tokens can touch: the host knows no lengths.
    count = segments.row.numel() if packed else 1
    key_blocks = max(1, (keys + count * (size - 1)) // size)
    row_blocks = min(key_blocks, (queries + count * (size - 2)) // size + count)
    if dense:
        row_blocks = key_blocks - (keys - queries) // size
    keys_stay = dense and keys % size == 0
    queries_stay = keys_stay and queries % size == 0

    def axis(
        total: int, begin: Tensor, length: Tensor, skipped: Tensor, blocks: int, number: Tensor
    ) -> Axis:
        """Lay out ``total`` tokens, ``length`` from ``begin`` on for each sequence.

        The first ``skipped`` slots of a sequence stay empty.
        """
        ends = number.cumsum(0)
        start = ends - number if packed else torch.zeros_like(number)
        block = torch.arange(blocks, device=device).expand(batch, -1)
        owner = _owner(block, ends, packed)
        if queries_stay or (keys_stay and total == keys):
            return Axis(blocks, owner, start, number, None, None)
        slot = torch.arange(blocks * size, device=device)
        who = owner.repeat_interleave(size, 1)
        token = slot - start[who] * size - skipped[who]
        slots = torch.where((token >= 0) & (token < length[who]), begin[who] + token, -1)
        place = torch.arange(total, device=device).expand(batch, -1)
        who = _owner(place, begin + length, packed)
        token = place - begin[who]
        inside = (token >= 0) & (token < length[who])
        tokens = torch.where(inside, start[who] * size + skipped[who] + token, -1)
        return Axis(blocks, owner, start, number, slots, tokens)

    query_start, query_length = segments.query_start, segments.query_length
    return Arrangement(
        axis(queries, query_start, query_length, past % size, row_blocks, row_number),
        axis(keys, segments.key_start, segments.key_length, 0 * past, key_blocks, key_number),
        first_row,
    )


def _owner(place: Tensor, ends: Tensor, packed: bool) -> Tensor:
    """The sequence that a place ``[rows, n]`` falls to, where each one ends at ``ends``."""
    if not packed:
        return torch.arange(place.shape[0], device=place.device)[:, None].expand_as(place)
    return torch.searchsorted(ends, place.contiguous(), right=True).clamp(max=ends.numel() - 1)
