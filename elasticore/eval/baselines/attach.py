"""Let a model attend by other modules than its own, layer by layer, for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from elasticore.errors import UnsupportedModel
from elasticore.layout import SequenceLayout
from elasticore.models.families import attention_layers, family_of, is_local
from elasticore.models.function import mask_function
from elasticore.models.layouts import read_layout
from elasticore.models.versions import CACHE

__all__ = ["Call", "attend_with"]

IMPLEMENTATION = "elasticore-baseline"
"""What these layers are called among transformers' attention implementations."""
SLOT = "_elasticore_baseline"
"""Attribute that holds an attention module's :class:`_Slot`."""


@dataclass(frozen=True, eq=False)
class Call:
    """The attention of one sequence in one layer.

    Attributes
    ----------
    q
        ``[1, Hq, Tq, D]``: the last ``Tq`` positions.
    k, v
        ``[1, Hkv, Tk, D]``, with the cache; keys after rotary embedding.
    hidden
        ``[Tq, hidden size]``: what the queries were projected from.
    first
        Position, for the rotary embedding, of the sequence's first token.
    scale
        Factor on q·k.
    rotary
        The model's rotary embedding, called as ``rotary(x, position_ids)``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    first: int
    scale: float
    rotary: nn.Module


@dataclass(eq=False)
class _Slot:
    module: nn.Module
    rotary: nn.Module
    hidden: Tensor | None = None
    past: int | None = None

    def before(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: note what the layer reads, and the cache as it is before this pass."""
        self.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs.get(CACHE)
        self.past = None if cache is None else int(cache.get_seq_length(int(attention.layer_idx)))  # type: ignore[arg-type]


@contextmanager
def attend_with(model: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run ``modules[i]`` in place of the attention of layer ``i`` inside the ``with`` block.

    One sequence at a time, with any cache and any padding that an elastic model takes. The modules
    see every pass, the single tokens of decoding too.

    Parameters
    ----------
    model
        A decoder of a supported family whose layers all attend to everything; not elastic.
        As before afterwards.
    modules
        One per layer, called as ``module(call)`` with a :class:`Call` and returning
        ``[1, Hq, Tq, D]``.

    Raises
    ------
    UnsupportedModel
        If the family is unknown, or layers have a sliding window.
    ValueError
        If there is not one module per layer.
    """
    family_of(model)
    layers = attention_layers(model)
    if any(is_local(layer) for layer in layers):
        raise UnsupportedModel(
            f"model ({model.config.model_type}) keeps layers inside a sliding window; a baseline "
            "replaces the attention of every layer."
        )
    if len(modules) != len(layers):
        raise ValueError(f"modules must be one per layer ({len(layers)}), got {len(modules)}.")
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)
    rotary: Any = model.base_model.rotary_emb
    original = model.config
    config = copy.deepcopy(original)
    config._attn_implementation = IMPLEMENTATION
    users: list[Any] = [m for m in model.modules() if getattr(m, "config", None) is original]
    handles = []
    try:
        for user in users:
            user.config = config
        for layer, module in zip(layers, modules, strict=True):
            slot = _Slot(module, rotary)
            # Not a submodule: the model's state_dict stays its own.
            layer.__dict__[SLOT] = slot
            handles.append(layer.register_forward_pre_hook(slot.before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.__dict__.pop(SLOT, None)
        for user in users:
            user.config = original


def _attend(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Every sequence of the batch through its layer's module, in transformers' own signature."""
    slot: _Slot = attention.__dict__[SLOT]
    hidden, slot.hidden = slot.hidden, None
    assert hidden is not None
    batch, _, queries, head_dim = query.shape
    past = slot.past or 0
    seen = past + queries
    made = read_layout(
        attention_mask,
        kwargs.get("position_ids"),
        kwargs.get("cu_seq_lens_q"),
        kwargs.get("cu_seq_lens_k"),
        batch=batch,
        queries=queries,
        seen=seen,
        cached=slot.past is not None,
        device=query.device,
    )
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = past + torch.arange(queries, device=query.device)[None]
    position_ids = position_ids.expand(batch, -1)
    if made.order is not None:  # the queries come in this order
        position_ids = position_ids.gather(1, made.order)
        hidden = hidden.gather(1, made.order[..., None].expand_as(hidden))

    def run(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        out = torch.zeros_like(q)
        segments = layout.segments(batch, queries, k.shape[2], q.device)
        for row, start, length, k_start, k_length in torch.stack(segments, 1).tolist():
            if length == 0:
                continue
            own, keys = slice(start, start + length), slice(k_start, k_start + k_length)
            call = Call(
                q[row : row + 1, :, own],
                k[row : row + 1, :, keys],
                v[row : row + 1, :, keys],
                hidden[row, own],
                int(position_ids[row, start]) - (k_length - length),
                head_dim**-0.5 if scaling is None else scaling,
                slot.rotary,
            )
            out[row : row + 1, :, own] = slot.module(call)
        return out

    # A preallocated cache is longer than what has been seen so far.
    out = made.attend(run, query, key[:, :, :seen], value[:, :, :seen])
    return out.transpose(1, 2).contiguous(), None
