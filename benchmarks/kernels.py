"""The triton backend's kernels and their peers, taking turns on one GPU.

python benchmarks/kernels.py --output benchmarks/results/kernels-h200.json

A GPU at its power limit lowers its clock, and raises it again only some tens of milliseconds later:
who is timed first wins, and so does who comes after a kernel that draws less. Here the engines of a
comparison take turns in random order, and the first half of each turn is not counted.
``elasticore bench`` covers more cases, checks every output, and flushes the L2 cache before each
call; this script answers by how much one kernel beats another. Its parts:

full
    Prefill with all heads FULL, beside cuDNN.
hybrid
    Prefill with FULL and STREAMING heads, beside FlexAttention.
short
    Short prompts as CUDA graphs, which take the host's time out. ``triton`` is the backend as users
    call it, which leaves a prompt that every head reads whole to PyTorch; ``hopper`` is its kernel.
decode
    One new token as a CUDA graph, over two caches in turn.
first_call
    Seconds of a kernel's first call with an empty cache of compiled kernels.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import elasticore as ec
from elasticore.backends.triton import TritonAttention
from elasticore.bench.attention import AttentionCase, DecodeCase
from elasticore.bench.cases import tokens
from elasticore.bench.layer import AttentionWork
from elasticore.bench.timing import Call, captured, interleave
from elasticore.machine import environment

console = Console(stderr=True)

Engines = dict[str, Callable[[], Call]]
"""What prepares each engine of a comparison."""

GPU = torch.device("cuda")
SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
}
PEERS = (*SDPA, "flex")
SHARES = 0.0, 0.5, 0.75, 1.0
GRAPHED = 10
"""Calls in one CUDA graph: so many that its launch does not count."""


class Comparison(NamedTuple):
    """Engines that do the same work.

    Attributes
    ----------
    part, name
        Where its figures go.
    engines
        Makes the tensors.
    seconds, slice_ms
        Of the whole comparison; of an engine's turn.
    graphed
        How often a call does the work.
    """

    part: str
    name: str
    engines: Callable[[], Engines]
    seconds: float
    slice_ms: float
    graphed: int = 1


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run the engines of a comparison; one that cannot run is named with its reason."""
    calls: dict[str, Call] = {}
    failed = {}
    for name, prepare in comparison.engines().items():
        try:
            call = prepare()
            for _ in range(2):
                call()
            torch.cuda.synchronize()
        except Exception as error:  # the others are still worth comparing
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        else:
            calls[name] = call
    times = interleave(calls, comparison.seconds, comparison.slice_ms) if calls else {}
    ms = {name: time / comparison.graphed for name, time in times.items()}
    return {**figures(ms), "failed": failed}


def figures(ms: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The times, and how many times faster than each peer the kernels are; five digits of each."""
    peers = [name for name in PEERS if name in ms]
    ours = [name for name in ms if name not in PEERS]
    return {
        "ms": {name: _rounded(time) for name, time in ms.items()},
        "ratios": {own: {peer: _rounded(ms[peer] / ms[own]) for peer in peers} for own in ours},
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def sdpa(name: str, work: AttentionWork) -> Call:
    """PyTorch's SDPA with one of its kernels; it reads everything."""

    def call() -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return scaled_dot_product_attention(
                work.q, work.k, work.v, is_causal=work.case.queries > 1, enable_gqa=True
            )

    return call


def backend(name: str, work: AttentionWork) -> Call:
    """A backend as users call it."""
    return lambda: ec.hybrid_head_attention(work.q, work.k, work.v, work.plan, backend=name)


def kernel(name: str, work: AttentionWork) -> Call:
    """One of the backend's kernels, called directly."""
    from elasticore.backends.triton import kernels

    case, plan = work.case, work.plan
    scale = case.head_dim**-0.5
    if name == "hopper":
        chosen = kernels.choose(
            work.q,
            work.k,
            work.v,
            scale=scale,
            block_size=plan.block_size,
            sequences=case.batch,
        )
        if chosen != name:
            raise ec.UnsupportedRequest(f"here the backend uses its {chosen} kernel.")
    sink, local = plan.streaming.blocks(plan.block_size)
    return lambda: kernels.KERNELS[name](
        work.q,
        work.k,
        work.v,
        plan.modes,
        None,
        None,
        scale=scale,
        sink=sink,
        local=local,
        block_size=plan.block_size,
    )


def graph(*calls: Call) -> Call:
    """``GRAPHED`` calls in turn as one CUDA graph."""
    turns = GRAPHED // len(calls)
    return captured(lambda: [call() for _ in range(turns) for call in calls])


def full(length: int) -> Engines:
    """All heads FULL."""
    work = AttentionCase("full", length, 0.0).build(GPU)
    return {
        "sdpa-cudnn": partial(sdpa, "sdpa-cudnn", work),
        "hopper": partial(kernel, "hopper", work),
    }


def hybrid(length: int, share: float) -> Engines:
    """FULL and STREAMING heads."""
    work = AttentionCase("hybrid", length, share).build(GPU)
    return {
        "flex": partial(backend, "flex", work),
        "portable": partial(kernel, "portable", work),
        "hopper": partial(kernel, "hopper", work),
    }


def short(length: int) -> Engines:
    """A short prompt, with every share of STREAMING heads; SDPA reads everything."""
    works = {share: AttentionCase("short", length, share).build(GPU) for share in SHARES}
    engines: Engines = {name: lambda name=name: graph(sdpa(name, works[0.0])) for name in SDPA}
    for share, work in works.items():
        engines[f"triton-{share:g}"] = lambda work=work: graph(backend("triton", work))
        engines[f"hopper-{share:g}"] = lambda work=work: graph(kernel("hopper", work))
    return engines


def decode(batch: int, length: int, head_dim: int) -> Engines:
    """One token per sequence. Two caches in turn, so that the L2 cache does not keep one."""

    def works(share: float) -> list[AttentionWork]:
        case = DecodeCase("decode", length, share, batch=batch, head_dim=head_dim)
        return [case.build(GPU) for _ in range(2)]

    dense = works(0.0)
    engines: Engines = {
        name: lambda name=name: graph(*(sdpa(name, work) for work in dense)) for name in SDPA
    }
    for share, pair in ((0.0, dense), (0.75, works(0.75))):
        engines[f"decode-{share:g}"] = lambda pair=pair: graph(
            *(kernel("decode", work) for work in pair)
        )
    return engines


def comparisons() -> list[Comparison]:
    """All of them, in order."""
    K = 1024
    return [
        *(
            Comparison("full", tokens(length), partial(full, length), 6, 300)
            for length in (16 * K, 64 * K, 128 * K)
        ),
        *(
            Comparison(
                "hybrid", f"{tokens(length)}-{share:g}", partial(hybrid, length, share), 3, 100
            )
            for length in (16 * K, 64 * K)
            for share in (0.5, 0.75, 1.0)
        ),
        *(
            Comparison("short", tokens(length), partial(short, length), 1, 5, GRAPHED)
            for length in (512, K, 2 * K, 3 * K, 4 * K)
        ),
        *(
            Comparison(
                "decode",
                f"batch{batch}-{tokens(length)}-d{head_dim}",
                partial(decode, batch, length, head_dim),
                1,
                5,
                GRAPHED,
            )
            for head_dim in (128, 64)
            for batch, length in ((1, 32 * K), (1, 128 * K), (8, 32 * K))
        ),
    ]


def first_xattention() -> Call:
    """XAttention's choice of blocks."""
    from elasticore.backends.triton.selectors import select

    work = AttentionCase("first", 4096, 1.0).build(GPU)
    plan = ec.HeadPlan(torch.ones_like(work.plan.decisions), sparse=ec.XAttention())
    layout, scale = ec.SequenceLayout.dense(), work.case.head_dim**-0.5
    return lambda: select(work.q, work.k, plan, layout, scale)


def first_router() -> Call:
    """The Attention Router's decision."""
    work = AttentionCase("first", 4096, 0.0).build(GPU)
    router = ec.AttentionRouter(work.case.head_dim, device=GPU).eval()
    return lambda: router(work.k.transpose(1, 2), work.segments)


FIRST: dict[str, Callable[[], Call]] = {
    "hopper": lambda: kernel("hopper", AttentionCase("first", 4096, 0.75).build(GPU)),
    "portable": lambda: kernel("portable", AttentionCase("first", 4096, 0.75).build(GPU)),
    "decode": lambda: kernel("decode", DecodeCase("first", 4096, 0.75).build(GPU)),
    "xattention": first_xattention,
    "router": first_router,
}
"""What is compiled: a kernel with those that prepare its work."""


def time_first_call(name: str) -> float:
    """Seconds of the first call in this process."""
    call = FIRST[name]()
    torch.cuda.synchronize()
    started = perf_counter()
    call()
    torch.cuda.synchronize()
    return perf_counter() - started


def first_call(name: str) -> dict[str, Any]:
    """The same in a process of its own, with an empty cache of compiled kernels."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--first-call", name],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        return {"seconds": None, "failed": done.stderr.strip()[-300:]}
    return {"seconds": _rounded(float(done.stdout)), "failed": ""}


PARTS = ("full", "hybrid", "short", "decode", "first_call")


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; repeatable, all by default.")
    ] = None,
    first: Annotated[str | None, typer.Option("--first-call", hidden=True)] = None,
) -> None:
    """Measure the kernels in turns with their peers and print the tables."""
    parts = part or list(PARTS)
    for name in parts:
        if name not in PARTS:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(PARTS)}.", param_hint="--part"
            )
    usable = TritonAttention.available()
    if not torch.cuda.is_available() or not usable:
        reason = usable.reason if torch.cuda.is_available() else "PyTorch sees no NVIDIA GPU."
        console.print(f"[red]error:[/] these kernels cannot be timed here: {reason}")
        raise typer.Exit(1)
    with torch.no_grad():
        if first is not None:
            print(time_first_call(first))
            return
        results = measure(parts)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report(results), indent=1, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")
    show(results)


def measure(parts: list[str]) -> dict[str, dict[str, Any]]:
    """``part.comparison`` with its times, or ``first_call.kernel``."""
    chosen = [one for one in comparisons() if one.part in parts]
    results: dict[str, dict[str, Any]] = {}
    for one in track(chosen, "comparisons", console=console):
        results.setdefault(one.part, {})[one.name] = compare(one)
        torch.cuda.empty_cache()
    if "first_call" in parts:
        results["first_call"] = {
            name: first_call(name) for name in track(FIRST, "first calls", console=console)
        }
    return results


def report(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The results with what they depend on."""
    case = AttentionCase("all", 0, None)
    sizes = ("heads", "kv_heads", "head_dim", "sink", "local", "block_size", "dtype")
    return {
        "what": "kernels of the triton backend and their peers in interleaved slices: median "
        "milliseconds per call; ratios say how many times faster than a peer",
        **environment(GPU),
        "command": shlex.join(["python", *sys.argv]),
        "settings": {name: getattr(case, name) for name in sizes},
        "not_measured": [name for name in PARTS if name not in results],
        **results,
    }


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table per part."""
    printed = Console()
    for part, found in results.items():
        if part == "first_call":
            shown = Table("", "seconds", title=part, title_justify="left")
            for name, one in found.items():
                shown.add_row(name, one["failed"] or f"{one['seconds']:.1f}")
            printed.print(shown)
            continue
        shown = Table("", "engine", "ms", "times faster than", title=part, title_justify="left")
        for name, one in found.items():
            for engine, ms in one["ms"].items():
                ratios = one["ratios"].get(engine, {})
                faster = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in ratios.items())
                shown.add_row(name, engine, f"{ms:.4g}", faster)
            for engine, reason in one["failed"].items():
                shown.add_row(name, engine, "", f"[red]{reason}[/]")
        printed.print(shown)


if __name__ == "__main__":
    typer.run(main)
