"""The keys at both ends of sequences that grow: all that a router needs of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore.layout import Segments

__all__ = ["Ends"]


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
    """

    boundary: int | None
    first: Tensor
    last: Tensor
    length: Tensor
    held: Tensor

    @classmethod
    def of(
        cls,
        boundary: int | None,
        tokens: Tensor,
        columns: Callable[[Tensor], Tensor],
        row: Tensor,
        length: Tensor,
        project: Callable[[Tensor], Tensor],
        *,
        spare: bool = True,
    ) -> Ends:
        """The ends of the sequences in ``tokens``.

        Parameters
        ----------
        boundary
            See the class.
        tokens
            ``[B, T, ...]``: what ``project`` turns into keys, such as hidden states.
        columns
            Where in a row the tokens at the positions ``[S, n]`` of the sequences are.
        row, length
            int64 ``[S]``: each sequence's row, and its number of tokens.
        project
            From ``[rows, n, ...]`` to keys ``[rows, n, Hkv, D]``; called once, with no more tokens
            than are needed.
        spare
            Whether tokens may be taken off the end later; else ``last`` holds no more than a
            router pools.
        """
        width, device = tokens.shape[1], tokens.device
        slot = torch.arange(width if boundary is None else min(boundary, width), device=device)
        head = columns(slot.expand(length.numel(), -1)).clamp(max=width - 1)
        if boundary is None:
            keys = project(tokens)[row[:, None], head]
            return cls(None, keys, keys[:, :0], length, length * 0)
        from_end = torch.arange(min((1 + spare) * boundary, width), 0, -1, device=device)
        tail = columns((length[:, None] - from_end).clamp(min=0)).clamp(max=width - 1)
        places = torch.cat((head, tail), 1)
        if row.numel() * places.shape[1] < tokens.shape[0] * width:
            keys = project(tokens[row[:, None], places])
        else:
            keys = project(tokens)[row[:, None], places]
        first, last = keys[:, : head.shape[1]], keys[:, head.shape[1] :]
        return cls(boundary, first, last, length, length.clamp(max=last.shape[1]))

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
        return Ends(self.boundary, *map(move, parts))

    def window(self) -> tuple[Tensor, Segments]:
        """What a policy is shown: keys ``[S, n, Hkv, D]`` and where each sequence lies in them.

        A sequence of at most ``2 * boundary`` tokens is there whole and in order; of a longer one
        the first and the last ``boundary`` tokens.
        """
        row = torch.arange(self.length.numel(), device=self.length.device)
        zero = torch.zeros_like(row)
        if self.boundary is None:
            return self.first, Segments(row, zero, self.length, zero, self.length)
        at_start = self.length.clamp(max=self.boundary)
        at_end = torch.minimum(self.length - at_start, self.held.clamp(max=self.boundary))
        count = at_start + at_end
        wide = min(2 * self.boundary, self.first.shape[1] + self.last.shape[1])
        slot = torch.arange(wide, device=row.device).expand(row.numel(), -1)
        from_end = count[:, None] - slot
        keys = torch.where(
            (slot < at_start[:, None])[..., None, None],
            _at(self.first, slot),
            _at(self.last, self.last.shape[1] - from_end),
        )
        return keys, Segments(row, zero, count, zero, count)


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
