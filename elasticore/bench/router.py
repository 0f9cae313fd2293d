"""The suite ``router``: the Attention Router's decision for one layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elasticore.attention import Verdict
from elasticore.bench.cases import Case, Engine, Ready, Work
from elasticore.bench.timing import captured
from elasticore.layout import SequenceLayout
from elasticore.router import AttentionRouter, pool_boundary

__all__ = ["RouterCase", "RouterWork", "router_cases"]


@dataclass(frozen=True)
class RouterCase(Case):
    """One decision for every KV head of one sequence, in evaluation mode."""

    suite: ClassVar[str] = "router"
    unit: ClassVar[str] = "ms"

    kv_heads: int = 8
    head_dim: int = 128
    boundary: int = 100
    dtype: str = "bfloat16"

    def engines(self) -> Sequence[Engine]:
        """The router as models call it and as it is defined, each also as a CUDA graph."""
        engines = (AsCalled, AsDefined)
        return [engine(graph) for graph in (False, True) for engine in engines]

    def build(self, device: torch.device) -> RouterWork:
        """Make the keys and the router."""
        return RouterWork(self, device)


class RouterWork(Work):
    """Keys before rotary embedding, ``[1, T, Hkv, D]``, and an untrained router."""

    # Both compute the logits in float32, from means of up to 200 keys.
    tolerance = 1e-4

    def __init__(self, case: RouterCase, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        shape = 1, case.length, case.kv_heads, case.head_dim
        self.keys = torch.randn(
            shape, generator=generator, device=device, dtype=getattr(torch, case.dtype)
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            self.router = AttentionRouter(case.head_dim, boundary=case.boundary, device=device)
        self.router.eval()
        self.segments = SequenceLayout.dense().segments(1, case.length, case.length, device)

    def defined(self) -> Tensor:
        """The logits by the definition's own parts."""
        return self.router.logits(pool_boundary(self.keys, self.segments, self.case.boundary))

    def difference(self, out: Tensor) -> float:
        """Relative error of the logits."""
        reference = self.defined()
        return float((out - reference).norm() / reference.norm())


class _Router(Engine):
    def __init__(self, graph: bool) -> None:
        self.graph = graph
        self.name += "-graph" * graph

    def available(self, case: RouterCase, device: torch.device) -> Verdict:
        """Graphs are a GPU's."""
        if self.graph and device.type != "cuda":
            return Verdict(False, "needs an NVIDIA GPU.")
        return Verdict(True)

    def prepare(self, work: RouterWork) -> Ready:
        """Capture the graph, if it is to be one."""
        call = torch.no_grad()(self.decide(work))
        return Ready(captured(call) if self.graph else call)

    @abstractmethod
    def decide(self, work: RouterWork) -> Callable[[], Any]:
        """What is timed."""


class AsCalled(_Router):
    """``AttentionRouter`` as a model calls it: fused where there is a kernel for it."""

    name = "router"
    peer = False

    def decide(self, work: RouterWork) -> Callable[[], Any]:
        """The module's call; its logits."""
        return lambda: work.router(work.keys, work.segments).logits


class AsDefined(_Router):
    """Pooling and MLPs one after the other, in plain PyTorch."""

    name = "definition"

    def decide(self, work: RouterWork) -> Callable[[], Any]:
        """Pool, run the MLPs, compare the logits."""

        def call() -> Tensor:
            logits = work.defined()
            (logits[..., 1] >= logits[..., 0]).to(torch.int8)
            return logits

        return call


def router_cases(device: torch.device, quick: bool) -> list[Case]:
    """The router reads both ends only: its time should not grow with the length."""
    sizes: dict[str, Any] = {}
    lengths: tuple[int, ...] = (512, 4096) if quick else (512, 4096, 32768, 131072, 2**20)
    if device.type != "cuda":
        lengths = (512,) if quick else (512, 4096)
        sizes = {"dtype": "float32"}
    return [RouterCase("router", length, None, **sizes) for length in lengths]
