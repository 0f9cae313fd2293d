"""Other projects' engines for the same work, each in its best set-up that we know of.

What they need once per routing (block masks, plans) is prepared outside the timed call and reported
apart, as their plan time. For SELECTED heads that includes choosing the blocks, which our backends
do inside the call.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elasticore.attention import Verdict
from elasticore.backends.flex import FlexAttention
from elasticore.bench.cases import Engine, Ready
from elasticore.bench.timing import planned
from elasticore.layout import SequenceLayout
from elasticore.patterns import HeadMode

if TYPE_CHECKING:
    from elasticore.bench.attention import AttentionCase
    from elasticore.bench.layer import AttentionWork

__all__ = [
    "DENSE",
    "DENSE_DECODE",
    "CudnnAndFlex",
    "FlashInfer",
    "FlashInferBlockSparse",
    "FlashInferDecode",
    "Sdpa",
    "compiled_flex",
]

BLOCK = 128
"""Side of the blocks that FlexAttention and FlashInfer skip."""
PAGE = 16
"""Tokens of a page of FlashInfer's cache."""
WORKSPACE = 128 * 2**20
"""Bytes that FlashInfer asks for."""


def _needs_gpu(device: torch.device) -> Verdict:
    return Verdict(device.type == "cuda", "needs an NVIDIA GPU.")


class Sdpa(Engine):
    """PyTorch's SDPA with one of its kernels; reads everything."""

    def __init__(self, name: str, kernel: SDPBackend) -> None:
        self.name, self.kernel = name, kernel

    def available(self, case: AttentionCase, device: torch.device) -> Verdict:
        """Flash has a CPU kernel; cuDNN has none."""
        if self.kernel is not SDPBackend.CUDNN_ATTENTION:
            return Verdict(True)
        if device.type == "cuda" and not torch.backends.cudnn.is_available():
            return Verdict(False, "this PyTorch has no cuDNN.")
        return _needs_gpu(device)

    def prepare(self, work: AttentionWork) -> Ready:
        """Nothing to plan."""

        def call() -> Tensor:
            with sdpa_kernel(self.kernel):
                return scaled_dot_product_attention(
                    work.q, work.k, work.v, is_causal=work.case.queries > 1, enable_gqa=True
                )

        return Ready(work.as_timed(call))


class CudnnAndFlex(Engine):
    """One lane after the other: FULL heads through cuDNN, STREAMING heads through FlexAttention.

    What one builds from the fastest parts of PyTorch without a fused kernel. The heads of each lane
    are gathered, and its output is scattered back.
    """

    name = "cudnn+flex"

    def available(self, case: AttentionCase, device: torch.device) -> Verdict:
        """Where there are two lanes."""
        if case.sparse != "STREAMING":
            return Verdict(False, "it knows no SELECTED heads.")
        if case.share == 1:
            return Verdict(False, "every head streams: that is FlexAttention alone.")
        if case.length <= case.sink + case.local:
            return Verdict(False, "streaming heads read everything: nothing to split.")
        return Sdpa(self.name, SDPBackend.CUDNN_ATTENTION).available(case, device)

    def prepare(self, work: AttentionWork) -> Ready:
        """Find out where each lane's heads lie; the first call writes the block mask."""
        (modes,) = work.routing
        group = work.case.heads // work.case.kv_heads

        def lane(mode: HeadMode) -> tuple[Tensor, Tensor]:
            heads = torch.tensor([h for h, m in enumerate(modes) if m == mode], device=work.device)
            every = heads[:, None] * group + torch.arange(group, device=work.device)
            return every.flatten(), heads

        (full_q, full), (stream_q, stream) = lane(HeadMode.FULL), lane(HeadMode.STREAMING)
        flex = FlexAttention()
        plan = work.plan.with_decisions(work.plan.decisions[:, stream])

        def call() -> Tensor:
            out = torch.empty_like(work.q)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out[:, full_q] = scaled_dot_product_attention(
                    work.q[:, full_q],
                    work.k[:, full],
                    work.v[:, full],
                    is_causal=True,
                    enable_gqa=True,
                )
            out[:, stream_q] = flex.attend(
                work.q[:, stream_q],
                work.k[:, stream],
                work.v[:, stream],
                plan,
                layout=SequenceLayout.dense(),
                scale=work.case.head_dim**-0.5,
            )
            return out

        return Ready(call)


class FlashInfer(Engine):
    """FlashInfer's dense prefill of one sequence: FlashAttention-3 on Hopper."""

    name = "flashinfer-dense"

    def available(self, case: AttentionCase, device: torch.device) -> Verdict:
        """Whether the package is installed, on a GPU."""
        if importlib.util.find_spec("flashinfer") is None:
            return Verdict(False, "flashinfer is not installed; pip install flashinfer-python.")
        return _needs_gpu(device)

    def left_out(self, case: AttentionCase, device: torch.device) -> str:
        """Each head size is a compilation."""
        if case.head_dim == 128:
            return ""
        return "FlashInfer compiles for minutes per head_dim; measured at 128."

    def prepare(self, work: AttentionWork) -> Ready:
        """Nothing to plan."""
        import flashinfer

        q, k, v = (x[0].transpose(0, 1) for x in (work.q, work.k, work.v))  # [T, H, D]

        def call() -> Tensor:
            out = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
            return out.transpose(0, 1)[None]

        return Ready(call)


class FlashInferBlockSparse(FlashInfer):
    """FlashInfer's block-sparse attention with a mask per KV head: FlashAttention-3 on Hopper.

    Each row block is a request of its own over the keys it reads, so ``causal=True`` masks inside
    its last block, the diagonal one.
    """

    name = "flashinfer-block-sparse"

    def available(self, case: AttentionCase, device: torch.device) -> Verdict:
        """Where all query heads of a KV head read the same blocks."""
        if case.sparse == "SELECTED":
            return Verdict(False, "its masks are per KV head, the selector's per query head.")
        return super().available(case, device)

    def prepare(self, work: AttentionWork) -> Ready:
        """Expand the block mask to the tokens of every row block, on the host too."""
        import flashinfer

        case = work.case
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=work.device)

        def plan() -> Any:
            mask = _blocks_read(work)
            sizes = torch.full(mask.shape[:2], BLOCK, dtype=torch.int32, device=work.device)
            wrapper = flashinfer.VariableBlockSparseAttentionWrapper(workspace)
            wrapper.plan(
                mask,
                sizes,
                sizes,
                case.heads,
                case.kv_heads,
                case.head_dim,
                causal=True,
                q_data_type=work.q.dtype,
            )
            return wrapper

        wrapper, plan_ms = planned(work.device, plan)

        def call() -> Tensor:
            return wrapper.run(work.q[0], work.k[0], work.v[0])[None]

        return Ready(call, plan_ms)


class FlashInferDecode(FlashInfer):
    """FlashInfer's decoding over a paged cache."""

    def left_out(self, case: AttentionCase, device: torch.device) -> str:
        """Version 0.6.8 ends in an illegal memory access here, which takes the whole run down."""
        return "its captured decoding crashed the process with FlashInfer 0.6.8; name it to try."

    def prepare(self, work: AttentionWork) -> Ready:
        """Lay the cache out in pages, and plan."""
        import flashinfer

        case, device = work.case, work.device
        pages = case.length // PAGE

        def paged(x: Tensor) -> Tensor:
            return x.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1).contiguous()

        cache = paged(work.k), paged(work.v)
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True
        )
        rows = torch.arange(case.batch + 1, dtype=torch.int32, device=device)

        def plan() -> None:
            wrapper.plan(
                rows * pages,
                torch.arange(case.batch * pages, dtype=torch.int32, device=device),
                torch.full_like(rows[1:], PAGE),
                case.heads,
                case.kv_heads,
                case.head_dim,
                PAGE,
                q_data_type=work.q.dtype,
            )

        _, plan_ms = planned(device, plan)

        def call() -> Tensor:
            return wrapper.run(work.q[:, :, 0], cache)[:, :, None]

        return Ready(work.as_timed(call), plan_ms)


_SDPA = (
    Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION),
    Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
)
DENSE: tuple[Engine, ...] = (*_SDPA, FlashInfer())
"""Peers that read everything, for prefill."""
DENSE_DECODE: tuple[Engine, ...] = (*_SDPA, FlashInferDecode())
"""Peers that read everything, for decoding."""


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once per shape.

    With ``fullgraph`` a limit on recompilations is an error; without it, PyTorch would quietly go
    on with the version that holds all scores.
    """
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _blocks_read(work: AttentionWork) -> Tensor:
    """The key blocks that each row block of a FULL or STREAMING KV head reads: ``[Hkv, n, n]``."""
    block = torch.arange(work.case.length // BLOCK, device=work.device)
    row = block[:, None]
    sink, local = work.plan.streaming.blocks(BLOCK)
    near = (block < sink) | (block > row - local)
    streaming = work.plan.modes[0] == int(HeadMode.STREAMING)
    return (block <= row) & (near | ~streaming[:, None, None])
