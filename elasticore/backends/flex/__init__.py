"""FlexAttention: the routing as a block mask, in kernels that PyTorch's compiler writes.

The middle way between one lane after the other and a kernel of our own: all heads of all sequences
in one launch, forward and backward, from PyTorch alone.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elasticore.attention import (
    AttentionRequest,
    HybridHeadAttention,
    Verdict,
    straight_through,
)
from elasticore.backends.flex.arrangement import Arrangement, arrange
from elasticore.backends.flex.blocks import Blocks, blocks_read
from elasticore.backends.memo import PlanMemo
from elasticore.backends.selection import choose_blocks
from elasticore.errors import ElasticoreError
from elasticore.layout import SequenceLayout
from elasticore.patterns import BlockLists
from elasticore.plan import HeadPlan

__all__ = ["FlexAttention"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = range(16, 257)
VERSIONS = 64
"""Compiled versions of the kernels, one per shape class, before PyTorch refuses more."""


class _Prepared(NamedTuple):
    """What a call needs beside its tensors."""

    places: Arrangement
    blocks: Blocks
    turned: Blocks | None


class FlexAttention(HybridHeadAttention):
    """Every lane and layout through FlexAttention, with gradients; no wait for the device."""

    name = "flex"
    devices = ("cuda",)

    def __init__(self) -> None:
        self._prepared: PlanMemo[_Prepared] = PlanMemo()

    @classmethod
    def available(cls) -> Verdict:
        """An NVIDIA GPU since Ampere and Triton, in which PyTorch writes the kernels."""
        if importlib.util.find_spec("triton") is None:
            return Verdict(
                False, "triton is not installed; pip install 'elasticore[triton]' (Linux only)."
            )
        if not torch.cuda.is_available():
            return Verdict(False, "PyTorch sees no NVIDIA GPU; the serial backend runs on CPUs.")
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return Verdict(False, f"the GPU has compute capability {major}.{minor}; 8.0 is needed.")
        return Verdict(True)

    def supports(self, request: AttentionRequest) -> Verdict:
        """bfloat16, float16 and float32, head_dim from 16 to 256, on a GPU.

        Gradients in 16 bits need blocks of 128 or a multiple.
        """
        if request.device.type not in self.devices:
            # On a CPU it would hold all scores, or have no gradients.
            return Verdict(
                False, f"it runs on NVIDIA GPUs, and the tensors are on {request.device}."
            )
        if request.dtype not in DTYPES:
            return Verdict(
                False, f"dtype {request.dtype} is none of {', '.join(map(str, DTYPES))}."
            )
        if request.head_dim not in HEAD_DIMS:
            return Verdict(False, f"head_dim {request.head_dim} is not from 16 to 256.")
        if request.gradients and request.dtype.itemsize == 2 and request.block_size % 128:
            # The tiles of PyTorch's backward kernel must divide a block, and cannot be chosen.
            return Verdict(
                False,
                f"gradients in 16 bits need blocks of 128 or a multiple, not {request.block_size}.",
            )
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
        if q.is_cuda and q.device.index != torch.cuda.current_device():
            with torch.cuda.device(q.device):  # Triton launches on the current one
                return self.attend(q, k, v, plan, layout=layout, scale=scale)
        gated = plan.gate is not None and plan.gate.requires_grad and torch.is_grad_enabled()
        # Both branches run where the gate wants a gradient, so every head needs its blocks.
        lists = choose_blocks(q, k, plan, layout, scale, every=gated)
        out = self._branch(q, k, v, plan, layout, lists, scale)
        if plan.gate is None or not gated:
            return out
        with torch.no_grad():
            other = self._branch(q, k, v, plan.swapped(), layout, lists, scale)
        return straight_through(plan.gate, out, other, layout, k.shape[2])

    def _branch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: HeadPlan,
        layout: SequenceLayout,
        lists: BlockLists | None,
        scale: float,
    ) -> Tensor:
        """Every head in the mode that it was given: into blocks, through FlexAttention, back."""
        size = plan.block_size
        backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))

        def prepare() -> _Prepared:
            places = arrange(layout, q.shape[0], q.shape[2], k.shape[2], size, q.device)
            blocks = blocks_read(plan, places, lists, q.shape[1])
            turned = blocks.transposed(places.keys.blocks) if backward else None
            return _Prepared(places, blocks, turned)

        if lists is None:
            key = (q.shape, k.shape, backward)
            prepared = self._prepared.get(plan, layout, key, prepare)
        else:
            prepared = prepare()  # the lists are those of this q and k
        rows, keys, _ = prepared.places
        moved = (rows.put(q, size), keys.put(k, size), keys.put(v, size))
        return rows.take(self._attend(*moved, prepared.blocks, prepared.turned, scale))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, turned: Blocks | None, scale: float
    ) -> Tensor:
        """FlexAttention of ``[rows, H, blocks, size, D]``: ``[rows, Hq, blocks * size, D]``."""
        # One version per head count, head_dim, block size and dtype, whatever the lengths.
        for x in (q, k, v):
            _any_size(x, 0, 2)
        for side in (blocks, turned):
            if side is not None:
                _any_size(side.diagonal, 0, 2)
                _any_size(side.diagonals, 0, 2)
                _any_size(side.whole, 0, 2, 3)
                _any_size(side.wholes, 0, 2)
        if torch._dynamo.config.disable:  # what torch.compile returns then would never compile
            _refuse_uncompiled()
        # Beyond the limit PyTorch raises, as the graph must be whole. Otherwise it would quietly go
        # on with a version that holds all scores.
        with torch._dynamo.config.patch(recompile_limit=VERSIONS):
            return _compiled()(q, k, v, blocks, turned, scale)


def _any_size(x: Tensor, *axes: int) -> None:
    """Let the compiler leave the sizes of these axes open; the others it may build upon."""
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(x, axis)


def _refuse_uncompiled() -> None:
    # Not only slow: it would ask the mask about all blocks.
    raise ElasticoreError(
        "backend 'flex' was run without being compiled, which torch.compile does if "
        "TORCH_COMPILE_DISABLE or torch._dynamo.config.disable is set, or an error is "
        "suppressed; unset it, or use another backend."
    )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex, dynamic=False, fullgraph=True)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    turned: Blocks | None,
    scale: float,
) -> Tensor:
    """What is compiled.

    The lengths are products with the block size, so that the compiler knows that it divides them.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if not torch.compiler.is_compiling():
        _refuse_uncompiled()
    size = q.shape[3]

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query % size >= key % size  # asked in diagonal blocks only

    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    mask = BlockMask(
        (q.shape[2], k.shape[2]),
        blocks.diagonals,
        blocks.diagonal,
        blocks.wholes,
        blocks.whole,
        None if turned is None else turned.diagonals,
        None if turned is None else turned.diagonal,
        None if turned is None else turned.wholes,
        None if turned is None else turned.whole,
        BLOCK_SIZE=(size, size),
        mask_mod=causal,
    )
    options = _tiles(size, q.shape[3], q.dtype)
    out: Any = flex_attention(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options
    )
    return out


def _tiles(size: int, head_dim: int, dtype: torch.dtype) -> Any:
    """Kernel options: its own tiles divide blocks of 128; smaller blocks need smaller ones."""
    # The other kernel, for few queries, knows no block mask per head.
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if size == 128:
        return options
    tile = min(size, 128 // dtype.itemsize // (2 if head_dim > 128 else 1))
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", *(f"bwd_BLOCK_{n}" for n in ("M1", "N1", "M2", "N2")))
    return options | dict.fromkeys(names, tile)
