"""From what transformers hands to an attention layer to a :class:`SequenceLayout`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from elasticore.layout import SequenceLayout

__all__ = ["layout_of", "packed_lengths"]


def layout_of(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    *,
    batch: int,
    queries: int,
    keys: int,
    past: int | Tensor,
    device: torch.device,
) -> SequenceLayout:
    """The layout of one forward pass; it is the same for every layer, so compute it once.

    Parameters
    ----------
    attention_mask
        Bool ``[B, positions seen]`` or None; what the mask function of ``elasticore`` returns.
    position_ids
        ``[B or 1, queries]`` or None; they show packed sequences where nothing else does.
    cu_queries, cu_keys
        Cumulative lengths of packed sequences (``cu_seq_lens_q`` and ``_k``) or None.
    past
        Positions in the cache before this pass; a tensor for a static cache.

    Raises
    ------
    ValueError
        If the arguments contradict each other, or the mask is not one of padding.
    """
    if cu_queries is not None:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask and cu_seq_lens_q were both given; packed sequences have no "
                "padding, so pass no attention_mask."
            )
        return SequenceLayout.packed(cu_queries.to(device), _to(cu_keys, device))
    first = isinstance(past, int) and past == 0
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                "attention_mask must be a [batch, positions] mask of padding, got shape "
                f"{list(attention_mask.shape)}; elastic attention is causal, with no other mask."
            )
        mask = attention_mask.to(device=device, dtype=torch.bool)
        seen = (past if isinstance(past, int) else 0) + queries
        if mask.shape[1] < seen:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} positions, but cache and input hold "
                f"{seen}; pass the mask of all of them."
            )
        if first and position_ids is not None:
            goes_on = (position_ids.diff() == 1) | ~(mask[:, 1:seen] & mask[:, : seen - 1])
            if not bool(goes_on.all()):
                raise ValueError(
                    "position_ids start over between valid tokens, and attention_mask was given; "
                    "packed sequences have no padding, so pass no attention_mask."
                )
        # A static cache is longer than what has been seen so far.
        mask = pad(mask, (0, keys - mask.shape[1]))
        return SequenceLayout.from_attention_mask(mask, _offset(past, queries, keys, batch, device))
    if first and position_ids is not None and queries > 1:
        if batch == 1:
            lengths = packed_lengths(position_ids)
            if lengths.numel() > 2:
                return SequenceLayout.packed(lengths.to(device))
        elif bool((position_ids.diff() != 1).any()):
            raise ValueError(
                f"position_ids start over inside a batch of {batch} rows; pack sequences into one "
                "row, or pad them and pass an attention_mask."
            )
    offset = _offset(past, queries, keys, batch, device)
    if offset is None:
        return SequenceLayout.dense()
    return SequenceLayout.padded(torch.zeros_like(offset), offset + queries - 1, offset)


def _offset(
    past: int | Tensor, queries: int, keys: int, batch: int, device: torch.device
) -> Tensor | None:
    """Where the queries start on the key axis; None if they end where it ends."""
    if isinstance(past, int) and past + queries == keys:
        return None
    return torch.as_tensor(past, device=device).long().expand(batch)


def packed_lengths(position_ids: Tensor) -> Tensor:
    """Cumulative lengths of the sequences in one row: positions ``[1, T]`` start over at each."""
    inner = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    return pad(pad(inner, (1, 0)), (0, 1), value=position_ids.shape[1])


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
