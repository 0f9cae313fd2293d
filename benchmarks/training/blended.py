"""The ways that compute both branches of every head and blend them, as backends."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import elasticore as ec
from elasticore.attention import AttentionRequest, HybridHeadAttention, Verdict
from elasticore.bench.peers import compiled_flex

__all__ = ["PEERS", "Blended", "CudnnAndFlex", "FlashAndFlex"]


class Blended(HybridHeadAttention):
    """Every head runs both branches over the whole sequence; the gate blends their outputs."""

    lanes = frozenset({ec.HeadMode.FULL, ec.HeadMode.STREAMING})

    @classmethod
    def available(cls) -> Verdict:
        """Always."""
        return Verdict(True)

    def supports(self, request: AttentionRequest) -> Verdict:
        """Dense batches without a cache."""
        whole = request.layout == "dense" and request.queries == request.keys
        return Verdict(whole, "it knows whole sequences only.")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: ec.HeadPlan,
        *,
        layout: ec.SequenceLayout,
        scale: float,
    ) -> Tensor:
        """See :class:`elasticore.HybridHeadAttention`."""
        with self.full_kernel() if q.is_cuda else nullcontext():
            full = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        sink, local = plan.streaming.blocks(plan.block_size)
        streaming = streaming_attention(q, k, v, scale, (sink, local, plan.block_size))
        gate = plan.decisions.float() if plan.gate is None else plan.gate
        return self.blend(gate, streaming, full)

    @abstractmethod
    def full_kernel(self) -> AbstractContextManager[None]:
        """SDPA's kernel of the full branch."""

    @abstractmethod
    def blend(self, gate: Tensor, streaming: Tensor, full: Tensor) -> Tensor:
        """``gate · streaming + (1 - gate) · full`` in the dtype of ``full``."""


def blend(gate: Tensor, streaming: Tensor, full: Tensor) -> Tensor:
    """In float32, as the gate is: eager code makes temporaries of twice the outputs' size."""
    z = gate.repeat_interleave(full.shape[1] // gate.shape[1], 1)[:, :, None, None]
    return (z * streaming + (1 - z) * full).to(full.dtype)


class FlashAndFlex(Blended):
    """As the released code blends: FlashAttention-2, and the products in eager mode."""

    name = "flash+flex"

    def full_kernel(self) -> AbstractContextManager[None]:
        """FlashAttention-2."""
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)

    def blend(self, gate: Tensor, streaming: Tensor, full: Tensor) -> Tensor:
        """One product after the other."""
        return blend(gate, streaming, full)


class CudnnAndFlex(Blended):
    """With the fastest kernels: cuDNN, and a blend that is compiled into one pass."""

    name = "cudnn+flex"

    def full_kernel(self) -> AbstractContextManager[None]:
        """The one of cuDNN."""
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)

    def blend(self, gate: Tensor, streaming: Tensor, full: Tensor) -> Tensor:
        """All of it in one pass."""
        run = compiled_blend() if full.is_cuda else blend
        return run(gate, streaming, full)


@functools.cache
def compiled_blend() -> Callable[..., Tensor]:
    """The blend as one kernel."""
    return torch.compile(blend, dynamic=False)


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, blocks: tuple[int, int, int]
) -> Tensor:
    """All heads over sink and window: FlexAttention on a GPU, which has no backward on a CPU."""
    mask = streaming_mask(q.shape[2], *blocks, q.device)
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)


@functools.cache
def streaming_mask(length: int, sink: int, local: int, block: int, device: torch.device) -> Any:
    """The key blocks of every row block, of which the last one is masked inside."""
    from torch.nn.attention.flex_attention import BlockMask

    if length % block:
        raise ValueError(f"length must be a multiple of the block size {block}, got {length}.")
    rows = length // block
    n = torch.arange(rows, device=device)
    visible = (n <= n[:, None]) & ((n < sink) | (n > n[:, None] - local))
    if device.type == "cpu":
        position = torch.arange(length)
        of = position // block
        return visible[of[:, None], of] & (position <= position[:, None])
    before = visible & (n < n[:, None])
    index = before.int().argsort(dim=1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        torch.ones(1, 1, rows, dtype=torch.int32, device=device),
        n.int()[None, None, :, None].expand(1, 1, rows, rows).contiguous(),
        before.sum(1, dtype=torch.int32)[None, None],
        index[None, None],
        BLOCK_SIZE=block,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(length, length),
    )


PEERS: tuple[type[Blended], ...] = (FlashAndFlex, CudnnAndFlex)
