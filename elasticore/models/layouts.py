"""From what transformers hands to a model to where the sequences of a pass lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from elasticore.layout import SequenceLayout
from elasticore.models.ends import EndColumns

__all__ = ["PassLayout", "packed_lengths", "read_layout"]


@dataclass(eq=False)
class PassLayout:
    """Where the sequences of one pass lie: the same for all layers, so made once.

    Attributes
    ----------
    layout
        Of the attention call.
    row, start, length
        int64 ``[S]``: each sequence's tokens in this pass, as a slice of a row. With holes, of the
        row in the order of ``order``.
    valid
        bool ``[B, positions seen]``: what is no padding; None: all.
    order
        Where padding stands between valid tokens: int64 ``[B, T]``, the columns of the pass with
        the valid ones first; else None. The attention call then gets the queries in this order, and
        the keys in that of ``key_order`` (int64 ``[B, N]``).
    ends
        Where the last column of a row is padding that follows a prompt: the rows (bool ``[B]``)
        and the layout of one query at each row's last valid position; else None. What is written
        after a prompt that is padded on the right is read from there, so it is answered as if it
        stood at that position, which is what SDPA gives.
    end_columns
        Where the prompts' ends are, which the first layer of each kind finds for the others; by
        the boundary, the width of rows, whether tokens may be taken off later, and whether prompts
        are all there is.
    """

    layout: SequenceLayout
    row: Tensor
    start: Tensor
    length: Tensor
    valid: Tensor | None = None
    order: Tensor | None = None
    key_order: Tensor | None = None
    ends: tuple[Tensor, SequenceLayout] | None = None
    end_columns: dict[tuple[int | None, int, bool, bool], EndColumns] = field(default_factory=dict)

    @classmethod
    def dense(cls, batch: int, queries: int, device: torch.device) -> PassLayout:
        """Rows that are full."""
        row = torch.arange(batch, device=device)
        zero = torch.zeros_like(row)
        return cls(SequenceLayout.dense(), row, zero, zero + queries)

    @classmethod
    def of_valid(
        cls, valid: Tensor | None, batch: int, queries: int, device: torch.device
    ) -> PassLayout:
        """Rows whose valid tokens (bool ``[B, T]``, None: all) may be anywhere; for their places.

        Its ``layout`` is of no use.
        """
        made = cls.dense(batch, queries, device)
        if valid is not None:
            made.length = valid.sum(1)
            made.order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        return made

    def columns(self, position: Tensor) -> Tensor:
        """Where in their rows the tokens ``position`` (int64 ``[S, n]``) of the sequences are."""
        column = self.start[:, None] + position
        if self.order is None:
            return column
        return self.order[self.row].gather(1, column.clamp(max=self.order.shape[1] - 1))

    def attend(
        self,
        call: Callable[[Tensor, Tensor, Tensor, SequenceLayout], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """``call(q, k, v, layout)``, with the padding between valid tokens taken out and put back.

        Zero at queries that are padding.
        """
        if self.order is None or self.key_order is None:
            return call(q, k, v, self.layout)
        k, v = _pick(k, self.key_order), _pick(v, self.key_order)
        return _pick(call(_pick(q, self.order), k, v, self.layout), self.order.argsort(1))

    def attend_ends(
        self,
        call: Callable[[Tensor, Tensor, Tensor, SequenceLayout], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    ) -> Tensor:
        """``out`` of :meth:`attend`, with the last column of rows that end in padding."""
        if self.ends is None:
            return out
        rows, layout = self.ends
        if self.key_order is not None:
            k, v = _pick(k, self.key_order), _pick(v, self.key_order)
        last = call(q[:, :, -1:], k, v, layout)
        last = torch.where(rows[:, None, None, None], last, out[:, :, -1:])
        return torch.cat((out[:, :, :-1], last), 2)


def _pick(x: Tensor, order: Tensor) -> Tensor:
    """``x [B, H, T, D]`` at the columns ``[B, n]`` of each row."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[row, order].transpose(1, 2)


def read_layout(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    *,
    batch: int,
    queries: int,
    seen: int,
    cached: bool,
    device: torch.device,
) -> PassLayout:
    """The layout of one forward pass.

    Parameters
    ----------
    attention_mask
        Bool ``[B, positions]`` or None: what the mask function of ``elasticore`` returns. Columns
        beyond ``seen`` are in the future and not read.
    position_ids
        ``[B or 1, queries]`` or None. Without a cache and a mask, sequences that are packed in one
        row show where they fall; otherwise they say nothing of where sequences lie.
    cu_queries, cu_keys
        Cumulative lengths of packed sequences (``cu_seq_lens_q`` and ``_k``) or None.
    seen
        Positions on the key axis: those before this pass, and its own.
    cached
        Whether there is a cache, empty or not.

    Raises
    ------
    ValueError
        If the arguments contradict each other, or the mask is none of padding.
    """
    if cu_queries is not None:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask and cu_seq_lens_q were both given; packed sequences have no "
                "padding, so pass no attention_mask."
            )
        keys = None if cu_keys is None else cu_keys.to(device)
        return _packed(cu_queries.to(device), keys)
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                "attention_mask must be a [batch, positions] mask of padding, got shape "
                f"{list(attention_mask.shape)}; elastic attention is causal, with no other mask."
            )
        if attention_mask.shape[1] < seen:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} positions, but cache and input "
                f"hold {seen}; pass the mask of all of them."
            )
        valid = attention_mask[:, :seen].to(device=device, dtype=torch.bool).expand(batch, -1)
        return _masked(valid, None if cached else position_ids, queries)
    if position_ids is not None and not cached and queries > 1:
        if batch == 1:
            lengths = packed_lengths(position_ids)
            if lengths.numel() > 2:
                return _packed(lengths.to(device))
        elif bool((position_ids.diff() <= 0).any()):
            raise ValueError(
                f"position_ids start over inside a batch of {batch} rows; pack sequences into one "
                "row, or pad them and pass an attention_mask."
            )
    return PassLayout.dense(batch, queries, device)


def packed_lengths(position_ids: Tensor) -> Tensor:
    """Cumulative lengths of the sequences in one row: positions ``[1, T]`` fall at each start."""
    inner = (position_ids[0].diff() <= 0).nonzero().flatten() + 1
    return pad(pad(inner, (1, 0)), (0, 1), value=position_ids.shape[1])


def _packed(cu_queries: Tensor, cu_keys: Tensor | None = None) -> PassLayout:
    layout = SequenceLayout.packed(cu_queries, cu_keys)
    assert layout.cu_queries is not None
    start = layout.cu_queries[:-1]
    return PassLayout(layout, torch.zeros_like(start), start, layout.cu_queries.diff())


def _masked(valid: Tensor, position_ids: Tensor | None, queries: int) -> PassLayout:
    """The layout of rows with padding; the device is waited for once, as by SDPA's own mask."""
    seen = valid.shape[1]
    position = torch.arange(seen, device=valid.device)
    count = valid.sum(1)
    first = torch.where(valid, position, seen).amin(1)
    last = torch.where(valid, position, -1).amax(1)
    holes = ((last - first + 1).clamp(min=0) != count).any()
    own = valid[:, seen - queries :]
    length = own.sum(1)
    room = (count - length).amax() + queries
    falls = torch.zeros_like(holes)
    if position_ids is not None and queries > 1:
        falls = ((position_ids.to(valid.device).diff() <= 0) & own[:, 1:] & own[:, :-1]).any()
    after = ~own[:, -1] & (count > 0)
    padded, has_holes, fell, cut, keys = torch.stack(
        ((~valid).any().long(), holes.long(), falls.long(), after.any().long(), room)
    ).tolist()
    if fell:
        raise ValueError(
            "position_ids start over between valid tokens, and attention_mask was given; packed "
            "sequences have no padding, so pass no attention_mask."
        )
    made = PassLayout.dense(valid.shape[0], queries, valid.device)
    if not padded:
        return made
    made.valid, made.length = valid, length
    if not has_holes:
        made.layout = SequenceLayout.padded(first, last)
        if cut:
            made.ends = after, SequenceLayout.padded(first, last, last.clamp(min=0))
        made.start = (first - (seen - queries)).clamp(0, queries)
        return made
    # Queries and keys are put in order, so that each sequence lies at the start of its row.
    made.order = (~own).to(torch.uint8).argsort(dim=1, stable=True)
    made.key_order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, :keys]
    zero = torch.zeros_like(count)
    made.layout = SequenceLayout.padded(zero, count - 1, count - length)
    if cut:
        made.ends = after, SequenceLayout.padded(zero, count - 1, (count - 1).clamp(min=0))
    return made
