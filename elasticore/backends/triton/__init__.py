"""The fused backend: all heads in one launch, whatever their modes (the paper's Algorithm 1b).

Kernels in Triton for every GPU since Ampere, and faster ones in Gluon for Hopper. This file imports
neither: it must load where Triton is missing, to say so.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from elasticore.attention import (
    AttentionRequest,
    HybridHeadAttention,
    Verdict,
    wants_gradients,
)
from elasticore.backends.triton.arguments import DECODE_ROWS
from elasticore.layout import SequenceLayout
from elasticore.pages import Pages
from elasticore.patterns import HeadMode
from elasticore.plan import HeadPlan
from elasticore.requirements import is_older, oldest

__all__ = ["TritonAttention"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = range(32, 257, 16)
TRAINED_HEAD_DIMS = range(32, 129, 16)


class TritonAttention(HybridHeadAttention):
    """Every lane, layout and head in one launch, forward and backward; no wait for the device."""

    name = "triton"
    devices = ("cuda",)

    @classmethod
    def available(cls) -> Verdict:
        """Triton 3.6 or newer and an NVIDIA GPU since Ampere, or Triton's interpreter."""
        if importlib.util.find_spec("triton") is None:
            return Verdict(
                False, "triton is not installed; pip install 'elasticore[triton]' (Linux only)."
            )
        return _engine()

    def supports(self, request: AttentionRequest) -> Verdict:
        """bfloat16, float16 and float32, head_dim a multiple of 16 to 256, for gradients to 128."""
        if request.device.type != "cuda" and not _interpreted():
            return Verdict(
                False, f"it runs on NVIDIA GPUs, and the tensors are on {request.device}."
            )
        if request.dtype not in DTYPES:
            return Verdict(
                False, f"dtype {request.dtype} is none of {', '.join(map(str, DTYPES))}."
            )
        if request.dtype == torch.bfloat16 and _interpreted():
            return Verdict(False, "Triton's interpreter computes bfloat16 wrongly; use float16.")
        if request.head_dim not in HEAD_DIMS:
            return Verdict(
                False, f"head_dim {request.head_dim} is no multiple of 16 from 32 to 256."
            )
        if request.gradients and request.head_dim not in TRAINED_HEAD_DIMS:
            return Verdict(
                False,
                f"head_dim {request.head_dim} is above 128, for which it has no backward pass; use "
                "the serial backend for training, or torch.no_grad().",
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
        from elasticore.backends.triton import kernels

        if q.is_cuda and q.device.index != torch.cuda.current_device():
            with torch.cuda.device(q.device):  # Triton launches on the current one
                return self.attend(q, k, v, plan, layout=layout, scale=scale)
        segments = None
        if layout.kind != "dense":
            segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)
        if wants_gradients(q, k, v, plan):
            from elasticore.backends.triton import training

            return training.attention(q, k, v, plan, layout, segments, scale)
        if segments is None and _reads_everything(q, k, plan):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        lists = None
        if HeadMode.SELECTED in plan.lanes:
            from elasticore.backends.triton.selectors import select

            lists = select(q, k, plan, layout, scale)
        sink, local = plan.streaming.blocks(plan.block_size)
        out, _ = kernels.attention(
            q,
            k,
            v,
            plan.modes,
            segments,
            lists,
            scale=scale,
            sink=sink,
            local=local,
            block_size=plan.block_size,
        )
        return out

    def supports_pages(self, request: AttentionRequest) -> Verdict:
        """As :meth:`supports`, without heads that select blocks."""
        if HeadMode.SELECTED in request.lanes:
            return Verdict(False, "heads that select blocks read no pages.")
        return self.supports(request)

    def attend_pages(
        self, q: Tensor, pages: Pages, plan: HeadPlan, *, layout: SequenceLayout, scale: float
    ) -> Tensor:
        """See :meth:`HybridHeadAttention.attend_pages`."""
        from elasticore.backends.triton import decode, portable

        if q.is_cuda and q.device.index != torch.cuda.current_device():
            with torch.cuda.device(q.device):
                return self.attend_pages(q, pages, plan, layout=layout, scale=scale)
        sink, local = plan.streaming.blocks(plan.block_size)
        sizes: dict[str, Any] = {"scale": scale, "sink": sink, "local": local}
        sizes["block_size"] = plan.block_size
        tensors = q, pages.keys, pages.values, plan.modes
        few = q.shape[2] * q.shape[1] // pages.keys.shape[1] <= DECODE_ROWS
        if few and layout.kind == "dense":  # in a step of decoding nothing else is launched
            sizes["lengths"] = pages.lengths
            return decode.attention(*tensors, None, None, **sizes, table=pages.table)[0]
        attention = decode.attention if few else portable.attention
        segments = pages.segments(q, layout)
        return attention(*tensors, segments, None, **sizes, table=pages.table)[0]


def _reads_everything(q: Tensor, k: Tensor, plan: HeadPlan) -> bool:
    """Whether every head reads all keys up to the query, whatever its mode.

    So it is where the prompt is no longer than sink and window together. PyTorch's own kernels
    start sooner, which is worth more there than the few microseconds of GPU time that ours save.
    """
    return (
        q.shape[2] == k.shape[2] <= plan.streaming.sink + plan.streaming.local
        and HeadMode.SELECTED not in plan.lanes
        and q.is_cuda
        and q.dtype.itemsize == 2
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _engine() -> Verdict:
    """Whether the installed Triton and GPU will do; asked once, as the answer does not change."""
    import triton

    found = triton.__version__
    if is_older("triton", found):
        return Verdict(False, f"triton {found} is older than {oldest('triton')}; upgrade it.")
    if _interpreted():
        return Verdict(True, "in Triton's interpreter (TRITON_INTERPRET=1): slow, for tests.")
    if not torch.cuda.is_available():
        return Verdict(False, "PyTorch sees no NVIDIA GPU; TRITON_INTERPRET=1 runs it on a CPU.")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return Verdict(
            False, f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 is needed."
        )
    if capability == (9, 0):
        from elasticore.backends.triton.kernels import HOPPER_MISSING

        if HOPPER_MISSING:
            return Verdict(
                True,
                f"without its Hopper kernels, which triton {triton.__version__} cannot load "
                f"({HOPPER_MISSING}): slower; it was tested with 3.6.",
            )
    return Verdict(True)
