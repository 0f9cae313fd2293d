"""The keys at both ends of sequences that grow: all that a router needs of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore.layout import Segments

__all__ = ["Ends", "EndColumns"]


@dataclass(frozen=True, eq=False)
class EndColumns:
    """Where the ends of a pass's sequences are: the same for all layers, so made once.

    Attributes
    ----------
    boundary
        That of :class:`Ends`.
    column
        int64 ``[S, n]``: columns of the first tokens of each sequence, then of its last ones.
    heads
        How many of these are first tokens.
    row
        int64 ``[S, 1]``: each sequence's row.
    length, held
        Those of :class:`Ends`.
    window
        int64 ``[S, m]``: which of the columns a policy is shown; None: all.
    segments
        Where each sequence lies in what a policy is shown.
    """

    boundary: int | None
    column: Tensor
    heads: int
    row: Tensor
    length: Tensor
    held: Tensor
    window: Tensor | None
    segments: Segments

    @classmethod
    def of(
        cls,
        boundary: int | None,
        width: int,
        columns: Callable[[Tensor], Tensor],
        row: Tensor,
        length: Tensor,
        *,
        spare: bool = True,
    ) -> EndColumns:
        """The places in rows of ``width`` tokens.

        Parameters
        ----------
        boundary
            See :class:`Ends`.
        columns
            Where in a row the tokens at the positions ``[S, n]`` of the sequences are.
        row, length
            int64 ``[S]``: each sequence's row, and its number of tokens.
        spare
            Whether tokens may be taken off the end later; else ``last`` holds no more than a
            router pools.
        """
        device = length.device
        slot = torch.arange(width if boundary is None else min(boundary, width), device=device)
        head = columns(slot.expand(length.numel(), -1)).clamp(max=width - 1)
        if boundary is None:
            segments = _segments(length)
            return cls(None, head, width, row[:, None], length, length * 0, None, segments)
        from_end = torch.arange(min((1 + spare) * boundary, width), 0, -1, device=device)
        tail = columns((length[:, None] - from_end).clamp(min=0)).clamp(max=width - 1)
        held = length.clamp(max=tail.shape[1])
        first, last, count = _window(boundary, length, held, head.shape[1], tail.shape[1])
        window = torch.where(first >= 0, first, head.shape[1] + last)
        column = torch.cat((head, tail), 1)
        segments = _segments(count)
        return cls(boundary, column, head.shape[1], row[:, None], length, held, window, segments)


@dataclass(eq=False)
class Ends:
    """The first ``boundary`` keys of every sequence, and its last ``2 * boundary``.

    Two follow each other by ``+``. A router pools the last ``boundary`` keys; as many more are kept
    so that tokens can be taken off the end again.

    Attributes
    ----------
    boundary
        None keeps all keys.
    first
        ``[S, n, Hkv, D]``: position ``j`` is the ``j``-th token; what lies beyond the sequence may
        be anything. All tokens without a ``boundary``.
    last
        ``[S, m, Hkv, D]``, ended by the last token. Empty without a ``boundary``.
    length
        int64 ``[S]``: tokens of the sequence.
    held
        int64 ``[S]``: how many of the last tokens ``last`` holds.
    shown
        What a policy is shown, where that is known.
    """

    boundary: int | None
    first: Tensor
    last: Tensor
    length: Tensor
    held: Tensor
    shown: tuple[Tensor, Segments] | None = None

    @classmethod
    def of(cls, where: EndColumns, tokens: Tensor, project: Callable[[Tensor], Tensor]) -> Ends:
        """The ends of the sequences in ``tokens``.

        Parameters
        ----------
        where
            Where they are.
        tokens
            ``[B, T, ...]``: what ``project`` turns into keys, such as hidden states.
        project
            From ``[rows, n, ...]`` to keys ``[rows, n, Hkv, D]``; called once, with no more tokens
            than are needed.
        """
        row, column = where.row, where.column
        if where.boundary is not None and column.numel() < tokens.shape[0] * tokens.shape[1]:
            keys = project(tokens[row, column])
        else:
            keys = project(tokens)[row, column]
        first, last = keys[:, : where.heads], keys[:, where.heads :]
        if where.window is not None:
            keys = keys[where.segments.row[:, None], where.window]
        shown = keys, where.segments
        return cls(where.boundary, first, last, where.length, where.held, shown)

    def __add__(self, other: Ends) -> Ends:
        """These sequences, each followed by that of ``other``."""
        if self.boundary is None:
            wide = self.first.shape[1] + other.first.shape[1]
            first = _join(self.first, other.first, self.length, wide)
            return Ends(None, first, self.last, self.length + other.length, self.held)
        first = _join(self.first, other.first, self.length, self.boundary)
        length = self.length + other.length
        wide = min(2 * self.boundary, self.last.shape[1] + other.last.shape[1])
        from_end = torch.arange(wide, 0, -1, device=length.device).expand(length.numel(), -1)
        n = other.length[:, None]
        mine = self.last.shape[1] - (from_end - n)
        theirs = other.last.shape[1] - from_end
        last = torch.where(
            (from_end <= n)[..., None, None], _at(other.last, theirs), _at(self.last, mine)
        )
        # What was lost of the other's end, it has lost for both.
        whole = other.held >= other.length
        held = torch.where(whole, other.length + self.held, other.held).clamp(max=wide)
        return Ends(self.boundary, first, last, length, held)

    def without(self, tokens: Tensor) -> Ends:
        """These sequences without their last ``tokens`` (int64 ``[S]``)."""
        length = (self.length - tokens).clamp(min=0)
        if self.boundary is None:
            return Ends(None, self.first, self.last, length, self.held)
        place = torch.arange(self.last.shape[1], device=length.device) - tokens[:, None]
        held = (self.held - tokens).clamp(min=0)
        return Ends(self.boundary, self.first, _at(self.last, place), length, held)

    def rows(self, move: Callable[[Tensor], Tensor]) -> Ends:
        """These sequences, moved by a function of the first axis."""
        parts = (self.first, self.last, self.length, self.held)
        first, last, length, held = map(move, parts)
        return Ends(self.boundary, first, last, length, held)

    def window(self) -> tuple[Tensor, Segments]:
        """What a policy is shown: keys ``[S, n, Hkv, D]`` and where each sequence lies in them.

        A sequence of at most ``2 * boundary`` tokens is there whole and in order; of a longer one
        the first and the last ``boundary`` tokens.
        """
        if self.shown is not None:
            return self.shown
        if self.boundary is None:
            return self.first, _segments(self.length)
        widths = self.first.shape[1], self.last.shape[1]
        first, last, count = _window(self.boundary, self.length, self.held, *widths)
        at_start = (first >= 0)[..., None, None]
        keys = torch.where(at_start, _at(self.first, first), _at(self.last, last))
        return keys, _segments(count)


def _window(
    boundary: int, length: Tensor, held: Tensor, heads: int, tails: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a policy is shown of ``heads`` first and ``tails`` last keys.

    Returns
    -------
    first, last, count
        int64 ``[S, m]``: each slot's place among the first keys, or -1, and among the last ones;
        and ``[S]``, how many slots count.
    """
    at_start = length.clamp(max=boundary)
    at_end = torch.minimum(length - at_start, held.clamp(max=boundary))
    count = at_start + at_end
    slot = torch.arange(min(2 * boundary, heads + tails), device=length.device)
    first = torch.where(slot < at_start[:, None], slot, -1)
    last = (slot + (tails - count)[:, None]).clamp(0, max(tails - 1, 0))
    return first, last, count


def _segments(count: Tensor) -> Segments:
    """Sequences of so many tokens, each in a row of its own."""
    row = torch.arange(count.numel(), device=count.device)
    zero = torch.zeros_like(row)
    return Segments(row, zero, count, zero, count)


def _at(keys: Tensor, place: Tensor) -> Tensor:
    """``keys [S, n, ...]`` at the places ``[S, m]``; any that are out of range give anything."""
    row = torch.arange(keys.shape[0], device=keys.device)[:, None]
    if keys.shape[1] == 0:
        return keys.new_zeros(*place.shape, *keys.shape[2:])
    return keys[row, place.clamp(0, keys.shape[1] - 1)]


def _join(one: Tensor, other: Tensor, length: Tensor, wide: int) -> Tensor:
    """The first ``wide`` of ``one``, ``length [S]`` tokens of which count, and then ``other``."""
    wide = min(wide, one.shape[1] + other.shape[1])
    slot = torch.arange(wide, device=length.device).expand(length.numel(), -1)
    n = length[:, None]
    return torch.where((slot < n)[..., None, None], _at(one, slot), _at(other, slot - n))
