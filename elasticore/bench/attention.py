"""The suites ``attention`` (prefill) and ``decode``: one call with all heads of a layer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elasticore.attention import Verdict
from elasticore.backends.registry import list_backends
from elasticore.bench import peers
from elasticore.bench.cases import Case, Engine, Ready, tokens
from elasticore.bench.layer import AttentionWork
from elasticore.bench.timing import stopped
from elasticore.call import hybrid_head_attention
from elasticore.choice import choose
from elasticore.layout import SequenceLayout
from elasticore.patterns import HeadMode

__all__ = ["AttentionCase", "Backend", "DecodeCase", "OneByOne", "decode_cases", "prefill_cases"]

OTHERS = ("flex", "flashinfer")
"""Backends whose kernels are another project's."""
WAITING = ("serial", "flashinfer")
"""Backends that wait for the device, so that no CUDA graph holds them."""
PREPARING = ("flex", "flashinfer")
"""Backends that prepare something for a plan, which its later calls find."""
SERIAL_LONGEST = 16384, 4096
"""Tokens up to which the serial backend is measured on a GPU; with SELECTED heads."""


@dataclass(frozen=True)
class AttentionCase(Case):
    """Causal prefill of one layer.

    Parameters
    ----------
    share
        Share of the KV heads that are sparse; None for a batch whose rows have 0, ½, ¾ and 1.
    sparse
        What sparse heads run: ``"STREAMING"`` or ``"SELECTED"`` (XAttention at 0.9).
    heads, kv_heads, head_dim, batch
        Shapes.
    sink, local, block_size
        What STREAMING heads read.
    dtype
        Of q, k and v.
    """

    suite: ClassVar[str] = "attention"
    unit: ClassVar[str] = "TFLOP/s"

    sparse: str = "STREAMING"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    sink: int = 128
    local: int = 2048
    block_size: int = 128
    dtype: str = "bfloat16"

    @property
    def queries(self) -> int:
        """Queries of each sequence."""
        return self.length

    @property
    def dense(self) -> str:
        """The case of the same shapes in which all heads are FULL."""
        if self.sparse == "STREAMING":
            return super().dense
        return str(dataclasses.replace(self, family="attention", share=0.0))

    def engines(self) -> Sequence[Engine]:
        """Every registered backend, then the peers that do the same work."""
        ours: list[Engine] = [Backend(info.name) for info in list_backends()]
        if self.batch > 1:
            return [*ours, *(OneByOne(engine.name) for engine in ours if not engine.peer)]
        if self.share == 0:
            return [*ours, *peers.DENSE]
        return [*ours, peers.CudnnAndFlex(), peers.FlashInferBlockSparse()]

    def build(self, device: torch.device) -> AttentionWork:
        """Make q, k, v and the plan."""
        return AttentionWork(self, device)

    def routing(self) -> list[list[int]]:
        """:class:`HeadMode` of every row and KV head.

        Which heads are sparse is a fixed permutation, turned by one head from row to row.
        """
        order = torch.randperm(self.kv_heads, generator=torch.Generator().manual_seed(0))
        rows = []
        for row in range(self.batch):
            share = (0, 0.5, 0.75, 1)[row % 4] if self.share is None else self.share
            sparse = order.roll(row)[: round(share * self.kv_heads)].tolist()
            mode = HeadMode[self.sparse]
            rows.append([int(mode) if h in sparse else 0 for h in range(self.kv_heads)])
        return rows


@dataclass(frozen=True)
class DecodeCase(AttentionCase):
    """One new token per sequence on a filled cache, as the replay of a CUDA graph."""

    suite: ClassVar[str] = "decode"
    unit: ClassVar[str] = "GB/s"

    @property
    def queries(self) -> int:
        """One."""
        return 1

    def engines(self) -> Sequence[Engine]:
        """Every registered backend, and the dense peers where all heads are FULL."""
        ours = [Backend(info.name) for info in list_backends()]
        return [*ours, *peers.DENSE_DECODE] if self.share == 0 else ours


class Backend(Engine):
    """One of our backends, or one that a package registered, in one call.

    What it prepares for a plan is there after the first call, and counts as ``plan_ms``.
    """

    def __init__(self, name: str) -> None:
        self.name = self.backend = name
        self.peer = name in OTHERS

    def available(self, case: AttentionCase, device: torch.device) -> Verdict:
        """Whether the backend can run here."""
        info = next(info for info in list_backends() if info.name == self.backend)
        if info.available and device.type == "cuda" and case.queries == 1 and self.name in WAITING:
            return Verdict(False, "it waits for the device in every call: no CUDA graph holds it.")
        return Verdict(info.available, info.reason)

    def left_out(self, case: AttentionCase, device: torch.device) -> str:
        """The reference is slow, and so is a kernel that is interpreted."""
        if self.backend == "triton" and os.environ.get("TRITON_INTERPRET", "0") == "1":
            return "TRITON_INTERPRET is set: an interpreted kernel's time means nothing."
        longest = SERIAL_LONGEST[case.sparse == "SELECTED"]
        if self._serial and device.type == "cuda" and case.length > longest:
            return f"it is the reference, not measured above {tokens(longest)} tokens."
        return ""

    @property
    def _serial(self) -> bool:
        return self.backend == "serial"

    def prepare(self, work: AttentionWork) -> Ready:
        """What is prepared for a routing is what a call takes longer that sees its first one."""
        engine = choose(self.backend, work.request()).engine

        def call() -> Tensor:
            return hybrid_head_attention(work.q, work.k, work.v, work.plan, backend=self.backend)

        # What belongs to blocks that were selected is made in every call.
        if self.name not in PREPARING or work.case.queries == 1 or work.plan.selector is not None:
            return Ready(work.as_timed(call))
        again = stopped(work.device, call)
        # A backend made anew has seen nothing.
        of = (work.q, work.k, work.v, work.plan)
        given = {"layout": SequenceLayout.dense(), "scale": work.case.head_dim**-0.5}
        anew = stopped(work.device, lambda: type(engine)().attend(*of, **given))
        return Ready(work.as_timed(call), max(0.0, anew - again))


class OneByOne(Backend):
    """The rows of a batch in one call each."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.name = f"{backend}-one-by-one"

    def prepare(self, work: AttentionWork) -> Ready:
        """Split the plan by rows."""
        choose(self.backend, work.request())
        rows = [
            (slice(row, row + 1), work.plan.with_decisions(work.plan.decisions[row : row + 1]))
            for row in range(work.case.batch)
        ]

        def call() -> list[Tensor]:
            return [
                hybrid_head_attention(
                    work.q[row], work.k[row], work.v[row], plan, backend=self.backend
                )
                for row, plan in rows
            ]

        return Ready(call)


CPU: dict[str, Any] = {
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "sink": 64,
    "local": 256,
    "block_size": 64,
    "dtype": "float32",
}
"""Sizes on a CPU."""


def prefill_cases(device: torch.device, quick: bool) -> list[Case]:
    """FULL beside STREAMING, at head_dim 128 and 64; FULL beside SELECTED; batches of four."""

    def family(
        name: str, lengths: Sequence[int], shares: Sequence[float | None], **sizes: Any
    ) -> list[Case]:
        return [
            AttentionCase(name, length, share, **sizes) for length in lengths for share in shares
        ]

    every = (0.0, 0.5, 0.75, 1.0)
    if device.type != "cuda":
        lengths = (512,) if quick else (1024, 4096)
        return [
            *family("attention", lengths, (0.0, 0.75) if quick else every, **CPU),
            *family("attention-xa", lengths[:1], (0.75,), sparse="SELECTED", **CPU),
            *family("attention-batch4", lengths[:1], (None,), batch=4, **CPU),
        ]
    if quick:
        return [
            *family("attention", (1024, 4096), (0.0, 0.75)),
            *family("attention-xa", (4096,), (0.75,), sparse="SELECTED"),
            *family("attention-batch4", (4096,), (None,), batch=4),
        ]
    return [
        *family("attention", (512, 1024, 4096, 16384, 65536, 131072, 262144), every),
        *family("attention-d64", (4096, 16384, 65536), (0.0, 0.75), head_dim=64),
        *family("attention-xa", (4096, 16384, 65536, 131072), every[1:], sparse="SELECTED"),
        *family("attention-batch4", (4096, 16384), (None,), batch=4),
    ]


def decode_cases(device: torch.device, quick: bool) -> list[Case]:
    """One sequence at two lengths of the cache, and a batch of eight."""
    if device.type != "cuda":
        shapes = [(1, 1024)] if quick else [(1, 4096), (4, 1024)]
        return [
            DecodeCase(f"decode-batch{batch}", length, share, batch=batch, **CPU)
            for batch, length in shapes
            for share in (0.0, 0.75)
        ]
    shapes = [(1, 8192)] if quick else [(1, 32768), (1, 131072), (8, 32768)]
    return [
        DecodeCase(f"decode-batch{batch}", length, share, batch=batch)
        for batch, length in shapes
        for share in (0.0, 0.75)
    ]
