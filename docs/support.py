"""What each backend says that it supports, as a Markdown table: the directive ``{support}``.

Nothing is run: every backend's ``supports`` is asked about requests that name a device, so the
table is the same on a machine without a GPU. Backends of installed packages have a row too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from elasticore.attention import HybridHeadAttention, Verdict
from elasticore.backends.registry import BACKENDS
from elasticore.backends.typical import example_request
from elasticore.patterns import HeadMode

if TYPE_CHECKING:
    from docutils.nodes import Node
    from sphinx.application import Sphinx

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
CALLS: dict[str, dict[str, object]] = {
    "prefill": {},
    "decode": {"queries": 1},
    "gradients": {"gradients": True},
    "padded": {"layout": "padded", "sequences": 4},
    "packed": {"layout": "packed", "sequences": 4},
    "selector": {"lanes": frozenset({HeadMode.FULL, HeadMode.SELECTED})},
}


def support() -> str:
    """Rows are backends on a device; the cells list dtypes, the last columns head dimensions."""
    heads = ["backend", "device", *CALLS, "head_dim", "head_dim, gradients"]
    lines = [heads, ["---"] * len(heads)]
    for name in BACKENDS.names():
        try:
            backend = BACKENDS.get(name)
        except Exception:
            if name in BACKENDS.built_in:
                raise
            continue  # another package's, and broken: `elasticore doctor` says so
        lines += [
            [f"`{name}`", device, *cells(backend(), torch.device(device))]
            for device in backend.devices
        ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(backend: HybridHeadAttention, device: torch.device) -> Iterator[str]:
    """What one backend says about one device."""

    def ask(**changes: object) -> bool:
        with not_interpreted():
            return Verdict(*backend.supports(example_request(device=device, **changes))).ok

    for call in CALLS.values():
        yield listed(name for name, dtype in DTYPES.items() if ask(dtype=dtype, **call))
    for gradients in (False, True):
        yield listed(
            str(size)
            for size in HEAD_DIMS
            if any(ask(dtype=d, head_dim=size, gradients=gradients) for d in DTYPES.values())
        )


def listed(names: Iterator[str]) -> str:
    """The names, or a dash for none."""
    return ", ".join(names) or "–"


@contextmanager
def not_interpreted() -> Iterator[None]:
    """As on a GPU: Triton's interpreter supports less, and the tests run in it."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the ``support`` directive known to Sphinx."""
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.util.docutils import SphinxDirective

    class Support(SphinxDirective):
        def run(self) -> list[Node]:
            holder = nodes.container()
            self.state.nested_parse(StringList(support().splitlines(), "support"), 0, holder)
            return list(holder.children)

    app.add_directive("support", Support)
    # Asked at every build, so the page is never taken from the cache.
    return {"parallel_read_safe": True, "parallel_write_safe": True}
