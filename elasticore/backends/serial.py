"""The reference backend: one lane after the other, in plain PyTorch (the paper's Algorithm 1a).

For every sequence the heads are split by mode, each lane runs on its own heads, and the outputs are
merged. The lanes work through the queries in tiles of rows, so nothing of size Tq × Tk is held; a
tile's scores are ``[heads, tile rows, keys read]`` inside SDPA. Which engine SDPA picks (flash,
memory-efficient, cuDNN, CPU flash) is PyTorch's choice.

Splitting needs to know the modes and lengths on the host, so a call on a GPU waits for the device
once: that, and one launch per lane, is the cost that a fused backend removes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from elasticore.attention import (
    AttentionRequest,
    HybridHeadAttention,
    Verdict,
    straight_through,
)
from elasticore.layout import SequenceLayout
from elasticore.pages import Pages
from elasticore.patterns import BlockLists, HeadMode
from elasticore.plan import HeadPlan

__all__ = ["SerialAttention"]

TILE = 512
"""Query rows of one tile, a multiple of every block size."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SerialAttention(HybridHeadAttention):
    """The oracle: plain PyTorch on any device, dtype and layout, with all gradients."""

    name = "serial"

    @classmethod
    def available(cls) -> Verdict:
        """Always: it needs PyTorch only."""
        return Verdict(True)

    def supports(self, request: AttentionRequest) -> Verdict:
        """Every request in a dtype that SDPA computes in, on a device whose values can be read."""
        if request.dtype not in DTYPES:
            return Verdict(
                False, f"dtype {request.dtype} is none of {', '.join(map(str, DTYPES))}."
            )
        if request.device.type == "meta":
            return Verdict(False, "tensors on the meta device have no values to read.")
        return Verdict(True)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: HeadPlan,
        *,
        layout: SequenceLayout,
        scale: float,
    ) -> Tensor:
        """See :meth:`HybridHeadAttention.attend`."""
        out = _dispatch(q, k, v, plan, layout, scale)
        if plan.gate is None or not (plan.gate.requires_grad and torch.is_grad_enabled()):
            return out
        with torch.no_grad():
            other = _dispatch(q, k, v, plan.swapped(), layout, scale)
        return straight_through(plan.gate, out, other, layout, k.shape[2])

    def supports_pages(self, request: AttentionRequest) -> Verdict:
        """As :meth:`supports`, without heads that select blocks."""
        if HeadMode.SELECTED in request.lanes:
            return Verdict(False, "heads that select blocks read no pages.")
        return self.supports(request)

    def attend_pages(
        self, q: Tensor, pages: Pages, plan: HeadPlan, *, layout: SequenceLayout, scale: float
    ) -> Tensor:
        """See :meth:`HybridHeadAttention.attend_pages`."""
        out = torch.zeros_like(q)
        kv_heads, modes = pages.keys.shape[1], plan.modes.tolist()
        sink, local = (
            blocks * plan.block_size for blocks in plan.streaming.blocks(plan.block_size)
        )
        segments = torch.stack(pages.segments(q, layout), 1).tolist()
        for index, (row, start, queries, _, keys) in enumerate(segments):
            if queries == 0:
                continue
            own = slice(start, start + queries)
            mine = out[row, :, own].unflatten(0, (kv_heads, -1))
            first = ((keys - queries) // plan.block_size + 1) * plan.block_size - local
            spans = {int(HeadMode.FULL): [(0, keys)], int(HeadMode.STREAMING): [(0, keys)]}
            if first > sink:  # what lies between may be gone
                spans[int(HeadMode.STREAMING)] = [(0, sink), (first, keys)]
            for mode in set(modes[index]):
                heads = torch.tensor([h for h, m in enumerate(modes[index]) if m == mode])
                heads = heads.to(q.device)
                part = q[row, :, own].unflatten(0, (kv_heads, -1))[heads]
                k, v = (
                    [_read(x, pages, index, heads, *span) for span in spans[mode]]
                    for x in (pages.keys, pages.values)
                )
                if queries == 1:
                    mine[heads] = _sdpa(part, torch.cat(k, 1), torch.cat(v, 1), scale)
                    continue
                all_k, all_v = (_spread(x, spans[mode], keys) for x in (k, v))
                alike = [mode] * len(heads)
                mine[heads] = _sequence(part, all_k, all_v, alike, plan, None, scale)
        return out


def _read(x: Tensor, pages: Pages, index: int, heads: Tensor, first: int, last: int) -> Tensor:
    """Tokens ``[first, last)`` of some heads of a sequence, ``[heads, tokens, D]``."""
    size = pages.page_size
    block = first // size
    page = pages.table[index, heads, block : -(-last // size)].long()
    found = x[page, heads[:, None]].flatten(1, 2)
    return found[:, first - block * size : last - block * size]


def _spread(parts: list[Tensor], spans: list[tuple[int, int]], keys: int) -> Tensor:
    """Parts at their places among ``keys`` tokens; zero between, where nobody reads."""
    out = parts[0].new_zeros(parts[0].shape[0], keys, parts[0].shape[2])
    for part, (first, last) in zip(parts, spans, strict=True):
        out[:, first:last] = part
    return out


def _dispatch(
    q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, layout: SequenceLayout, scale: float
) -> Tensor:
    """Run every sequence on its own slice of the batch; queries of padding stay zero."""
    batch, _, queries, _ = q.shape
    modes = plan.modes.tolist()
    if queries == 1 and layout.kind == "dense" and not any(map(any, modes)):
        # A step of decoding in which every head reads everything: SDPA itself.
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    selection = None
    selects = HeadMode.SELECTED in plan.lanes and any(HeadMode.SELECTED in row for row in modes)
    if selects or layout.kind != "dense":
        segments = layout.segments(batch, queries, k.shape[2], q.device)
    if selects:
        assert plan.selector is not None
        with torch.no_grad():
            selection = plan.selector.select(
                q, k, segments, block_size=plan.block_size, scale=scale
            )
    if layout.kind == "dense" and selection is None:
        # Equal lengths: the sequences of the batch are just more heads.
        flat = [mode for row in modes for mode in row]
        out = _sequence(
            q.unflatten(1, (k.shape[1], -1)).flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            flat,
            plan,
            None,
            scale,
        )
        return out.unflatten(0, (batch, -1)).flatten(1, 2)

    out = torch.zeros_like(q)
    for index, (row, q_start, q_length, k_start, k_length) in enumerate(
        torch.stack(segments, 1).tolist()
    ):
        if q_length == 0:
            continue
        lists = None
        if selection is not None:
            lists = BlockLists(
                selection.indices[index].unflatten(0, (k.shape[1], -1)),
                selection.counts[index].unflatten(0, (k.shape[1], -1)),
            )
        part = _sequence(
            q[row, :, q_start : q_start + q_length].unflatten(0, (k.shape[1], -1)),
            k[row, :, k_start : k_start + k_length],
            v[row, :, k_start : k_start + k_length],
            modes[index],
            plan,
            lists,
            scale,
        )
        out[row, :, q_start : q_start + q_length] = part.flatten(0, 1)
    return out


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modes: list[int],
    plan: HeadPlan,
    lists: BlockLists | None,
    scale: float,
) -> Tensor:
    """Split the KV heads by mode, run each lane, merge: all heads have the same lengths.

    Shapes: q ``[H, group, Tq, D]``; k, v ``[H, Tk, D]``; modes ``H`` entries; lists (only with
    SELECTED heads) ``[H, group, row blocks, width]``.
    """
    if not any(modes):
        return _full(q, k, v, scale)
    if q.shape[2] == 1 and HeadMode.SELECTED not in modes:
        return _step(q, k, v, modes, plan, scale)
    groups = {mode: [h for h, m in enumerate(modes) if m == mode] for mode in HeadMode}
    outputs, order = [], []
    for mode, heads in groups.items():
        if not heads:
            continue
        everything = len(heads) == len(modes)
        index = torch.tensor(heads, device=q.device)
        part = (q, k, v) if everything else (q[index], k[index], v[index])
        if mode is HeadMode.SELECTED:
            assert lists is not None
            chosen = BlockLists(lists.indices[index], lists.counts[index])
            output = _selected(*part, chosen, plan.block_size, scale)
        elif mode is HeadMode.STREAMING:
            output = _streaming(
                *part, *plan.streaming.blocks(plan.block_size), plan.block_size, scale
            )
        else:
            output = _full(*part, scale)
        if everything:
            return output
        outputs.append(output)
        order += heads
    inverse = torch.tensor(order, device=q.device).argsort()
    return torch.cat(outputs)[inverse]


def _step(
    q: Tensor, k: Tensor, v: Tensor, modes: list[int], plan: HeadPlan, scale: float
) -> Tensor:
    """One query, in a step of decoding: neighbours of one mode together, so that no key is copied.

    But for the sink and the window of streaming heads, which are few.
    """
    keys, block = k.shape[1], plan.block_size
    sink, local = plan.streaming.blocks(block)
    start = max(0, ((keys - 1) // block - local + 1) * block)
    far = min(sink * block, start)
    out, first = torch.empty_like(q), 0
    for mode, alike in groupby(modes):
        last = first + len(list(alike))
        near_k, near_v = k[first:last], v[first:last]
        if mode == HeadMode.STREAMING and start:
            near_k, near_v = (torch.cat([x[:, :far], x[:, start:]], 1) for x in (near_k, near_v))
        out[first:last] = _sdpa(q[first:last], near_k, near_v, scale)
        first = last
    return out


def _full(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Every key up to the query."""
    queries, keys = q.shape[2], k.shape[1]
    if queries == 1:  # the last position: a step of decoding
        return _sdpa(q, k, v, scale)
    # SDPA's causal kernels hold no scores; for float64 on a GPU PyTorch has none of them.
    if queries == keys and not (q.is_cuda and q.dtype == torch.float64):
        return _sdpa(q, k, v, scale, is_causal=True)

    def visible(first: int, last: int) -> Tensor:
        rows = torch.arange(first, last, device=q.device)[:, None]
        return torch.arange(last, device=q.device) <= rows

    tiles = [
        _remasked(partial(visible, first, last), tile, k[:, :last], v[:, :last], scale)
        for first, last, tile in _tiles(q, keys)
    ]
    return torch.cat(tiles, 2)


def _streaming(
    q: Tensor, k: Tensor, v: Tensor, sink: int, local: int, block: int, scale: float
) -> Tensor:
    """Key blocks ``{0..sink-1}`` and ``{i-local+1..i}`` for row block ``i``."""
    tiles = []
    # A tile reads its rows and the window before them: tall tiles would compute mostly masked
    # scores where the window is small.
    for first, last, tile in _tiles(q, k.shape[1], min(TILE, local * block)):
        start = max(0, (first // block - local + 1) * block)
        position = torch.arange(start, last, device=q.device)
        near_k, near_v = k[:, start:last], v[:, start:last]
        far = min(sink * block, start)
        if far:
            position = torch.cat([torch.arange(far, device=q.device), position])
            near_k = torch.cat([k[:, :far], near_k], 1)
            near_v = torch.cat([v[:, :far], near_v], 1)
        rows = torch.arange(first, last, device=q.device)[:, None]
        in_reach = (position // block < sink) | (position // block > rows // block - local)
        visible = in_reach & (position <= rows)
        tiles.append(_sdpa(tile, near_k, near_v, scale, attn_mask=visible))
    return torch.cat(tiles, 2)


def _selected(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, block: int, scale: float
) -> Tensor:
    """The listed key blocks; one row block at a time, as every head has its own list."""
    keys = k.shape[1]
    past = keys - q.shape[2]
    mask = lists.to_mask(-(-keys // block))

    def visible(first: int, last: int) -> Tensor:
        rows = torch.arange(first, last, device=q.device)[:, None]
        position = torch.arange(last, device=q.device)
        chosen = mask[:, :, first // block - past // block][..., position // block]
        return chosen[:, :, None] & (position <= rows)

    tiles = [
        _remasked(partial(visible, first, last), tile, k[:, :last], v[:, :last], scale)
        for first, last, tile in _tiles(q, keys, block)
    ]
    return torch.cat(tiles, 2)


def _tiles(q: Tensor, keys: int, size: int = TILE) -> Iterator[tuple[int, int, Tensor]]:
    """Spans of positions ``[first, last)`` cut at multiples of ``size``, and their queries of q."""
    past = keys - q.shape[2]
    first = past
    while first < keys:
        last = min((first // size + 1) * size, keys)
        yield first, last, q[:, :, first - past : last - past]
        first = last


def _remasked(
    visible: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """SDPA under the mask ``visible()``, which the backward makes again with the scores.

    Kept for the backward, the masks of all tiles together would be as large as Tq × Tk.
    """

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, k, v, scale, attn_mask=visible())

    if not torch.is_grad_enabled():
        return run(q, k, v)
    return checkpoint(run, q, k, v, use_reentrant=False, preserve_rng_state=False)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """SDPA of q ``[H, group, T, D]`` over k, v ``[H, keys, D]``, which the group shares."""
    shape = (-1, q.shape[1], -1, -1)  # a view: nothing is repeated in memory
    return scaled_dot_product_attention(
        q,
        k[:, None].expand(shape),
        v[:, None].expand(shape),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )
