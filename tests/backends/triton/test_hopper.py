"""The Hopper kernels compile, also where their GPU is missing, and repeat themselves on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from elasticore import HeadMode, testing
from elasticore.backends.triton import kernels
from elasticore.backends.triton.hopper import memory
from elasticore.testing import Case
from tests.plans import mixed

COMPILE = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

module = importlib.import_module("elasticore.backends.triton.hopper.{module}")
kernel, blocks = module.{kernel}, {blocks}
element = {{"bf16": gl.bfloat16, "fp16": gl.float16}}


def compile(dim, dtype, listed, ragged):
    fixed = dict(D=dim, STAGES=module.STAGES, LISTED=listed, RAGGED=ragged)
    tables = ["rows", "query_starts", "query_lengths", "key_starts", "key_lengths"]
    pointers = {{name: "i64" for name in tables}} | dict(modes="i8", lse="fp32", delta="fp32")
    for name in ("tiles", "total", "indices", "counts", "rest_indices", "rest_counts"):
        pointers[name] = "i32"
    for name in ("q", "k", "v", "grad", "out", "other", "dq", "dk", "dv"):
        pointers[name] = dtype
    signature, constants, attributes = {{}}, {{}}, {{}}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed or (name in tables and not ragged):
            signature[name] = "constexpr"
            constants[place,] = fixed.get(name)
        elif name.endswith("_desc"):
            block = [1, 1, blocks.get(name, 64), dim]
            layout = gl.NVMMASharedLayout.get_default_for(block, element[dtype])
            signature[name] = f"tensordesc<{{dtype}}{{block}},{{layout!r}}>".replace(" ", "", 3)
        elif name in pointers:
            signature[name] = "*" + pointers[name]
            if pointers[name] == dtype:
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=4, maxnreg=168, enable_fp_fusion=True)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    print(compiled.metadata.shared)


compile(128, "bf16", True, True)
compile(64, "fp16", False, False)
"""

WIDE = {"k_desc": 128, "v_desc": 128}
KERNELS = [
    ("forward", "_forward", WIDE),
    ("snapshot", "_forward", WIDE),
    ("dq", "_dq", WIDE),
    ("dkv", "_dkv", {}),
]
"""Module, kernel, and the rows that its descriptors copy at a time if not 64."""


@pytest.mark.parametrize(("module", "kernel", "blocks"), KERNELS, ids=[row[0] for row in KERNELS])
def test_compiles_without_a_gpu(module: str, kernel: str, blocks: dict[str, int]) -> None:
    code = COMPILE.format(module=module, kernel=kernel, blocks=blocks)
    # A process of its own: in the interpreter's, Triton cannot compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for shared in done.stdout.split():
        assert int(shared) <= 232448, "more shared memory than a Hopper multiprocessor gives"


@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3),
    strides=st.permutations([64, 192, 576]) | st.tuples(*[st.sampled_from([0, 1, 8, 68, 192])] * 3),
    shift=st.sampled_from([0, 0, 1, 4, 8]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_descriptors_pass_the_checks_that_they_skip(
    shape: tuple[int, ...], strides: Sequence[int], shift: int, dtype: torch.dtype
) -> None:
    x = torch.empty(2**12, dtype=dtype)[shift:].as_strided((*shape, 64), (*strides, 1))
    if memory.copyable(x):
        ours = memory.descriptor(x, 64)
        fields = ours.base, ours.shape, ours.strides, ours.block_shape, ours.layout
        assert vars(TensorDescriptor(*fields)) == vars(ours)
    else:
        used = [step for step, size in zip(strides, shape, strict=True) if size > 1]
        assert shift % 8 or any(step == 0 or step % 8 for step in used)


RUNS = 120
STRESS = [
    (Case("dense", 4, 128, 1024, "all", "128"), True),
    (Case("dense", 4, 128, 1024, "all", "128"), False),
    (Case("dense", 4, 128, 4096, "all", "128"), True),
    (Case("dense", 7, 64, 1000, "some", "128"), True),
    (Case("left", 4, 128, 2177, "all", "128"), False),
    (Case("right", 1, 64, 2048, "some", "128"), True),
    (Case("packed", 4, 128, 2175, "some", "128"), True),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "listed"), STRESS, ids=str)
def test_many_runs_have_the_same_bits(case: Case, listed: bool) -> None:
    """A race would break it: who reads shared memory too early or too late sees other bits."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (compute capability 9.0)")
    p = mixed(testing.make_problem(case, dtype=torch.bfloat16, device="cuda"))
    x = p.q, p.k, p.v
    modes, segments, lists = p.plan.modes, None, None
    if case.layout != "dense":
        segments = p.segments()
    sparse = HeadMode.SELECTED if listed else HeadMode.STREAMING
    if listed:
        lists = p.plan.selector.select(p.q, p.k, p.segments(), block_size=128, scale=p.scale)  # type: ignore[union-attr]
    else:
        modes = modes.clamp(max=int(HeadMode.STREAMING))
    pair = torch.where(modes == int(HeadMode.FULL), modes, int(sparse)).to(torch.int8)
    settings: dict[str, Any] = {"scale": p.scale, "sink": 1, "local": 2, "block_size": 128}
    branches: dict[str, Any] = {"sparse": sparse, "both": True}
    training = kernels.TRAINING["hopper"]
    out, lse = kernels.KERNELS["hopper"](*x, modes, segments, lists, **settings)
    grad = torch.randn_like(out)
    delta = (out.float() * grad.float()).sum(3)
    backward = (*x, grad, lse, delta, modes, segments, lists)

    def run(name: str) -> tuple[Tensor | None, ...]:
        if name == "attention":
            return kernels.KERNELS["hopper"](*x, modes, segments, lists, **settings)
        if name == "snapshot":
            return tuple(training.snapshot(*x, pair, segments, lists, **branches, **settings))
        if name == "dq":
            return (training.query_gradient(*backward, **settings),)
        return training.key_value_gradients(*backward, **settings)

    for name in ("attention", "snapshot", "dq", "dkv"):
        first = run(name)
        other = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(RUNS):
            for one, expected in zip(run(name), first, strict=True):
                assert one is not None
                other += (one != expected).any()
        assert other.item() == 0, f"{name}: {other.item()} of {RUNS} runs differ"
