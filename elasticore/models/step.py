"""A step of decoding that ``torch.compile`` sees through: one token a row, on a static cache.

Nothing is decided in it, and nothing is read on the host. What the heads run lies in the cache, and
how far that is filled is counted on the device: so a step is one graph, the same for every length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elasticore.call import hybrid_head_attention, paged_attention
from elasticore.errors import ElasticoreError
from elasticore.layout import SequenceLayout
from elasticore.models.cache import ElasticCacheLayer
from elasticore.models.paged_cache import PagedLayer
from elasticore.models.passes import PASS
from elasticore.models.recording import anyone_records
from elasticore.models.state import STATE, LayerState
from elasticore.models.versions import CACHE

__all__ = ["Step", "attend_step", "begin_step", "is_step"]


class Step:
    """What the layers of such a pass share: the cache."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache


def is_step(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model that is being compiled is called for a step of decoding.

    Else the pass is one that the compiler does not see into: a prompt, a cache that grows, a pass
    that is recorded, or one that the caller tells something.
    """
    if kwargs.get(PASS) is not None or anyone_records():
        return False
    layers = getattr(kwargs.get(CACHE), "layers", None)
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = args[0] if args else kwargs.get("inputs_embeds")
    if tokens is None or tokens.shape[1] != 1 or not isinstance(layers, list):
        return False
    elastic = [layer for layer in layers if isinstance(layer, ElasticCacheLayer)]
    return len(elastic) > 0 and all(layer.steps for layer in elastic)


def begin_step(
    attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: Step
) -> None:
    """Before a layer's attention: note its input, and tell pages which rows' tokens are none."""
    layer = step.cache.layers[attention.layer_idx]
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    column = torch.zeros(1, dtype=torch.int64, device=hidden.device) + layer.get_seq_length()
    trail, mask = layer.memory.trail, kwargs.get("attention_mask")
    if trail is not None:
        trail.index_copy_(1, column % trail.shape[1], hidden.detach())
    if isinstance(layer.inner, PagedLayer) and mask is not None:
        layer.inner.own = mask.index_select(1, column).bool()


def attend_step(
    attention: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    step: Step,
) -> Tensor:
    """All heads of a layer in one call, as the cache says.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, 1, D]`` and ``[B, Hkv, columns, D]``, filled or not; over pages the new ones.
    mask
        Bool ``[B, columns]``, or None: all tokens are valid. NaN comes out for a row in which
        padding has come between valid tokens only since the last pass that was not compiled.
    scale
        Factor on q·k; None for ``1 / sqrt(D)``.
    step
        The pass.
    """
    state: LayerState = getattr(attention, STATE)
    layer = step.cache.layers[attention.layer_idx]
    memory = layer.memory
    if memory.owner != state.owner:
        raise ElasticoreError(
            "the cache was filled by another model, or by this one while it attended in another "
            "way, so its routing means something else here; prefill the prompt again."
        )
    if memory.decisions.shape[0] != q.shape[0]:
        raise ElasticoreError(
            f"the cache was prefilled with {memory.decisions.shape[0]} sequences but now serves "
            f"{q.shape[0]}; prefill the prompts in the batch that is generated."
        )
    plan = state.way.plan(memory.decisions, short=True)
    if isinstance(layer.inner, PagedLayer):
        return paged_attention(q, layer.inner.pages, plan, scale=scale)
    end = layer.inner.get_seq_length() - 1  # on the device, or on the host in front of a window
    if isinstance(end, int) and end >= k.shape[2]:
        raise ElasticoreError(
            f"the cache has room for {k.shape[2]} tokens, and this would be one more; make one "
            "with room for all that is to be generated."
        )
    if mask is None:
        last = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device) + end
        layout = SequenceLayout("padded", torch.zeros_like(last), last, last)
        return hybrid_head_attention(q, k, v, plan, layout=layout, scale=scale)
    place = torch.arange(k.shape[2], device=q.device)
    valid = mask.bool() & (place <= end)
    if not memory.plain:  # padding between valid tokens: keys and values are put in order
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
        k, v = (x.gather(2, order.expand_as(x)) for x in (k, v))
        last = valid.sum(1) - 1
        layout = SequenceLayout("padded", torch.zeros_like(last), last, last.clamp(min=0))
        return hybrid_head_attention(q, k, v, plan, layout=layout, scale=scale)
    first = torch.where(valid, place, k.shape[2]).amin(1)
    last = torch.where(valid, place, -1).amax(1)
    # A token that is padding is answered as if it stood at the row's last valid position.
    layout = SequenceLayout("padded", first, last, last.clamp(min=0))
    out = hybrid_head_attention(q, k, v, plan, layout=layout, scale=scale)
    holes = (last - first + 1).clamp(min=0) != valid.sum(1)
    return torch.where(holes[:, None, None, None], torch.nan, out)
