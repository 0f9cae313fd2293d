"""Native Sparse Attention: three branches, joined by learned gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from elasticore.checks import check_int
from elasticore.errors import UnsupportedModel
from elasticore.eval.baselines.attach import Call
from elasticore.eval.baselines.per_query import masked, tiles
from elasticore.models.families import attention_layers
from elasticore.patterns.nsa import NSASelected

__all__ = ["NativeSparseAttention", "load_nsa"]


class NativeSparseAttention(nn.Module):
    """The attention of one layer: compressed, selected and sliding keys, each by its gate.

    - *Compressed*: every ``stride`` tokens, a learned linear map turns ``kernel`` keys, before
      rotary embedding and with a learned vector for their place, into one; likewise the values.
      A query attends to those that lie behind it as a whole. Compressed key ``j`` is rotated to the
      position of its first token.
    - *Selected*: the weights of that attention choose blocks for each query, as in
      :class:`~elasticore.patterns.NSASelected`.
    - *Sliding*: the latest ``window`` tokens, the query's own among them.

    The output is the sum of the three, each times the sigmoid of a linear map of the layer's input,
    one gate per query head and branch.

    Parameters
    ----------
    query_heads, kv_heads, head_dim, hidden_size
        Sizes of the model.
    selection
        How blocks are chosen, and the sizes of compression.
    window
        Tokens of the sliding branch.

    Notes
    -----
    Yuan et al. 2025 (arXiv 2502.11089). That paper leaves open how keys are rotated, and what the
    map looks like; both are here as in the implementation that the Elastic Attention paper names,
    whose compression is one linear map. Keys come rotated from the cache and are turned back, which
    is exact up to rounding. New modules compress by the mean, with gates of one half: they are to
    be trained, or loaded (:func:`load_nsa`). Every query works for itself, in plain PyTorch; masks
    are held for a few queries at a time.
    """

    def __init__(
        self,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        hidden_size: int,
        selection: NSASelected | None = None,
        window: int = 512,
    ) -> None:
        super().__init__()
        check_int("window", window, 1)
        self.selection, self.window = selection or NSASelected(), window
        kernel = self.selection.kernel
        mean = torch.eye(head_dim).repeat(kernel, 1) / kernel
        self.compress_key = nn.Parameter(mean.repeat(kv_heads, 1, 1))
        self.compress_value = nn.Parameter(mean.repeat(kv_heads, 1, 1))
        self.place = nn.Parameter(torch.zeros(kv_heads, kernel, head_dim))
        self.gate = nn.Parameter(torch.zeros(3 * query_heads, hidden_size))

    def forward(self, call: Call) -> Tensor:
        """Attention ``[1, Hq, Tq, D]`` of a :class:`~elasticore.eval.baselines.Call`."""
        gates = (call.hidden @ self.gate.to(call.hidden.dtype).T).sigmoid()
        gates = gates.unflatten(1, (-1, 3)).transpose(0, 1)[None]  # [1, Hq, Tq, 3]
        keys, values = self._compressed(call)
        outputs = []
        for first, last in tiles(call.q.shape[2]):
            compressed, chosen = self._compressed_branch(call, first, last, keys, values)
            selected = masked(call, first, last, chosen, self.selection.block)
            branches = torch.stack([compressed, selected, self._sliding(call, first, last)], -1)
            outputs.append((branches * gates[:, :, first:last, None]).sum(-1))
        return torch.cat(outputs, 2)

    def _compressed(self, call: Call) -> tuple[Tensor, Tensor]:
        """Compressed keys and values ``[Hkv, n, D]`` in float32 or more."""
        kernel, stride = self.selection.kernel, self.selection.stride
        exact = torch.promote_types(call.k.dtype, torch.float32)
        keys, values = call.k[0].to(exact), call.v[0].to(exact)
        cells = max((keys.shape[1] - kernel) // stride + 1, 0)
        if cells == 0:
            return keys[:, :0], values[:, :0]
        position = call.first + torch.arange(keys.shape[1], device=keys.device)
        keys = _turn(keys, position, call.rotary, back=True).unfold(1, kernel, stride)
        values = values.unfold(1, kernel, stride)  # [Hkv, n, D, kernel]
        keys = keys.transpose(2, 3) + self.place[:, None].to(exact)
        keys = keys.flatten(2) @ self.compress_key.to(exact)
        values = values.transpose(2, 3).flatten(2) @ self.compress_value.to(exact)
        return _turn(keys, position[: cells * stride : stride], call.rotary, back=False), values

    def _compressed_branch(
        self, call: Call, first: int, last: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The branch's output ``[1, Hq, queries, D]``, and the blocks each query selects by it."""
        past = call.k.shape[2] - call.q.shape[2]
        position = torch.arange(past + first, past + last, device=call.q.device)[:, None]
        cell = torch.arange(keys.shape[1], device=call.q.device)
        visible = cell * self.selection.stride + self.selection.kernel - 1 <= position
        queries = call.q[0, :, first:last].unflatten(0, (keys.shape[0], -1)).to(keys.dtype)
        scores = queries @ keys[:, None].transpose(2, 3) * call.scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        weights = torch.where(visible, weights, 0)  # a query that sees none has a row of NaN
        blocks = -(-call.k.shape[2] // self.selection.block)
        with torch.no_grad():
            summed = weights.double().sum(1)[None]
            importance = self.selection.score(self.selection.overlapping(summed, blocks))
            chosen = self.selection.best(importance, position)
        out = (weights @ values[:, None]).flatten(0, 1)[None]
        return out.to(call.q.dtype), chosen

    def _sliding(self, call: Call, first: int, last: int) -> Tensor:
        """The latest ``window`` tokens of each query."""
        past = call.k.shape[2] - call.q.shape[2]
        key = torch.arange(past + last, device=call.q.device)
        position = torch.arange(past + first, past + last, device=call.q.device)[:, None]
        return masked(call, first, last, (key > position - self.window)[None, None], 1)


def load_nsa(
    model: Any, path: str | Path, selection: NSASelected | None = None, window: int = 512
) -> nn.ModuleList:
    """The trained modules of every layer, for :func:`~elasticore.eval.baselines.attend_with`.

    Parameters
    ----------
    model
        The backbone that they were trained with, its own fine-tuned projections included.
    path
        A safetensors file with, per layer ``i``, ``i.compress_key`` and ``i.compress_value``
        ``[Hkv, kernel * D, D]``, ``i.place`` ``[Hkv, kernel, D]`` and ``i.gate``
        ``[3 * Hq, hidden size]`` (row ``3 h + b`` for query head ``h`` and branch ``b``):
        the ``state_dict`` of this function's result.
    selection, window
        See :class:`NativeSparseAttention`.

    Raises
    ------
    ValueError
        If the file does not hold these tensors in these shapes.
    UnsupportedModel
        If the rotary embedding changes with the length: cached keys could not be turned back.
    """
    config, kind = model.config, getattr(model.base_model.rotary_emb, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UnsupportedModel(
            f"model has a rotary embedding of type {kind!r}, which changes with the length; NSA "
            "needs one that does not."
        )
    layers = attention_layers(model)
    modules = nn.ModuleList(
        NativeSparseAttention(
            config.num_attention_heads,
            config.num_key_value_heads,
            int(layer.head_dim),  # type: ignore[arg-type]
            config.hidden_size,
            selection,
            window,
        )
        for layer in layers
    )
    try:
        modules.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"path {path} does not hold the weights of this model: {error}") from None
    return modules.to(next(model.parameters()).device)


def _turn(x: Tensor, position: Tensor, rotary: nn.Module, *, back: bool) -> Tensor:
    """Rotate ``x`` ``[heads, n, D]`` to ``position`` (int64 ``[n]``), or back from there."""
    cos, sin = (part.to(x.dtype) for part in rotary(x, position[None]))
    if cos.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"model rotates {cos.shape[-1]} of {x.shape[-1]} dimensions; NSA needs all of them."
        )
    low, high = x.chunk(2, -1)
    other = torch.cat([-high, low], -1)
    if not back:
        return x * cos + other * sin
    return (x * cos - other * sin) / (cos**2 + sin**2)  # 1, unless the embedding scales
