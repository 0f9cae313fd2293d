"""The Hopper kernel compiles for its GPU, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from elasticore.backends.triton.hopper import STAGES, _forward

dim, dtype, listed, ragged = {dim}, {dtype!r}, {listed}, {ragged}
element = {{"bf16": gl.bfloat16, "fp16": gl.float16}}[dtype]
fixed = dict(D=dim, STAGES=STAGES, SELECTED=listed, RAGGED=ragged)
pointers = dict(v=dtype, out=dtype, lse="fp32", tiles="i32", total="i32", modes="i8", indices="i32",
                counts="i32")
tables = ["rows", "query_starts", "query_lengths", "key_starts", "key_lengths"]
signature, constants = {{}}, {{}}
for place, name in enumerate(_forward.arg_names):
    if name in fixed or (name in tables and not ragged):
        signature[name] = "constexpr"
        constants[place,] = fixed.get(name)
    elif name.endswith("_desc"):
        block = [1, 1, 64 if name == "q_desc" else 128, dim]
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        signature[name] = f"tensordesc<{{dtype}}{{block}},{{layout!r}}>".replace(" ", "", 3)
    elif name in tables:
        signature[name] = "*i64"
    else:
        signature[name] = "fp32" if name == "scale" else "i32"
        if name in pointers:
            signature[name] = "*" + pointers[name]
source = GluonASTSource(fn=_forward, signature=signature, constexprs=constants, attrs={{}})
options = dict(num_warps=4, maxnreg=168, enable_fp_fusion=True)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
assert "wgmma" in kernel.asm["ptx"]
print(kernel.metadata.shared)
"""


@pytest.mark.parametrize(
    ("dim", "dtype", "listed", "ragged"), [(128, "bf16", True, True), (64, "fp16", False, False)]
)
def test_compiles_without_a_gpu(dim: int, dtype: str, listed: bool, ragged: bool) -> None:
    code = COMPILE.format(dim=dim, dtype=dtype, listed=listed, ragged=ragged)
    # A process of its own: in the interpreter's, Triton cannot compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) <= 232448, "more shared memory than a Hopper multiprocessor gives"
