"""FlashInfer: its batch prefill, FlashAttention-3 on Hopper, over the blocks that a routing reads.

Forward only. FlashInfer plans on the host, so a call waits for the device where its routing has not
been seen; see :mod:`elasticore.backends.flashinfer.requests` for what is planned. This file does
not import FlashInfer: it must load where that is missing, to say so.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from elasticore.attention import AttentionRequest, HybridHeadAttention, Verdict
from elasticore.backends.flashinfer.requests import (
    TILE,
    HostRouting,
    Places,
    Requests,
    key_rows,
    make_requests,
    page_table,
    query_rows,
)
from elasticore.backends.memo import PlanMemo
from elasticore.backends.selection import choose_blocks
from elasticore.errors import UnsupportedRequest
from elasticore.layout import SequenceLayout
from elasticore.patterns import BlockLists
from elasticore.plan import HeadPlan
from elasticore.requirements import is_older, oldest

__all__ = ["FlashInferAttention"]

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
NEEDED = {"flashinfer": "flashinfer-python", "tvm_ffi": "apache-tvm-ffi", "pynvml": "nvidia-ml-py"}
"""What ``import flashinfer`` asks for, by the name of the package to install."""

DECODED = 16
"""Queries up to which keys are split among programs, which only FlashAttention-2 does here."""
TALL = 1024
"""Queries from which copying the keys of FULL heads is little beside attending."""
PLANS = 64
"""FlashInfer plans that are kept, the last ones used; each takes some megabytes."""
WORKSPACE = 128 * 2**20
"""Bytes for partial results, as FlashInfer recommends; more for large groups."""


class _Launch(NamedTuple):
    """A FlashInfer wrapper that has planned, and what it is to be given.

    Attributes
    ----------
    wrapper
        Of a paged or a ragged cache.
    heads
        Query heads of every request.
    rows
        The requests' query rows among ``[batch, Tq, Hq / heads]``.
    keys, filling
        For a ragged cache: the rows of K and V, and which of them are to be zero.
    """

    wrapper: Any
    heads: int
    rows: Tensor
    keys: Tensor | None = None
    filling: Tensor | None = None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, block_size: int, out: Tensor
    ) -> None:
        """Attend from these rows of q ``[batch, Tq, Hq, D]``, into those of ``out``."""
        shape = (-1, self.heads, q.shape[3])
        part = q.view(shape).index_select(0, self.rows)
        result = torch.empty_like(part)
        if self.keys is None or self.filling is None:
            pages = _pages(k, places, block_size), _pages(v, places, block_size)
            self.wrapper.run(part, pages, out=result)
        else:
            moved = (_rows(x, places).index_select(0, self.keys) for x in (k, v))
            filled = (x.index_fill_(0, self.filling, 0)[:, None] for x in moved)
            self.wrapper.run(part, *filled, out=result)
        out.view(shape).index_copy_(0, self.rows, result)


class FlashInferAttention(HybridHeadAttention):
    """Every lane and layout, exactly causal, as requests to FlashInfer's batch prefill."""

    name = "flashinfer"
    devices = ("cuda",)

    def __init__(self) -> None:
        self._routings: PlanMemo[HostRouting] = PlanMemo()
        self._plans: OrderedDict[Hashable, tuple[_Launch, ...]] = OrderedDict()
        # One per stream, as long as a plan uses it.
        self._workspaces: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()

    @classmethod
    def available(cls) -> Verdict:
        """FlashInfer with what it imports, and an NVIDIA GPU since Ampere."""
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if "flashinfer" in missing:
            return Verdict(
                False, "flashinfer is not installed; pip install 'elasticore[flashinfer]'."
            )
        if missing:
            packages = " ".join(NEEDED[name] for name in missing)
            return Verdict(
                False, f"flashinfer is installed without {packages}; pip install {packages}."
            )
        if not torch.cuda.is_available():
            return Verdict(False, "PyTorch sees no NVIDIA GPU; the serial backend runs on CPUs.")
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return Verdict(False, f"the GPU has compute capability {major}.{minor}; 8.0 is needed.")
        return _version()

    def supports(self, request: AttentionRequest) -> Verdict:
        """bfloat16 and float16, head_dim 64, 128 or 256, without gradients, on a GPU."""
        if request.device.type not in self.devices:
            return Verdict(
                False, f"it runs on NVIDIA GPUs, and the tensors are on {request.device}."
            )
        if request.dtype not in DTYPES:
            return Verdict(
                False, f"dtype {request.dtype} is none of {', '.join(map(str, DTYPES))}."
            )
        if request.head_dim not in HEAD_DIMS:
            return Verdict(
                False, f"head_dim {request.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}."
            )
        if request.gradients:
            return Verdict(
                False,
                "it has no backward pass; use the triton or flex backend for training, or "
                "torch.no_grad().",
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
            with torch.cuda.device(q.device):  # FlashInfer plans for the current one
                return self.attend(q, k, v, plan, layout=layout, scale=scale)
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedRequest(
                "backend 'flashinfer' plans on the host, so no CUDA graph can hold it; capture the "
                "triton or flex backend."
            )
        batch, _, queries, _ = q.shape
        routing = self._routings.get(
            plan,
            layout,
            (batch, queries, k.shape[2]),
            lambda: HostRouting.read(
                plan.modes, layout.segments(batch, queries, k.shape[2], plan.modes.device)
            ),
        )
        lists = None
        if routing.selects:
            lists = choose_blocks(q, k, plan, layout, scale, every=False)
        if scale <= 0:  # its softmax looks for the largest score before it scales
            q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
        k, v, places = _pageable(k, v, plan.block_size)

        launches = self._plan(q, k, plan, routing, lists, places, scale)
        # In the order of [batch, Tq, heads]: models' tensors lie like that.
        rows = q.transpose(1, 2).contiguous()
        covered = sum(one.rows.numel() * one.heads for one in launches)
        out = torch.empty_like(rows) if covered == rows[..., 0].numel() else torch.zeros_like(rows)
        for launch in launches:
            launch.run(rows, k, v, places, plan.block_size, out)
        return out.transpose(1, 2)

    def _plan(
        self,
        q: Tensor,
        k: Tensor,
        plan: HeadPlan,
        routing: HostRouting,
        lists: BlockLists | None,
        places: Places,
        scale: float,
    ) -> tuple[_Launch, ...]:
        """FlashInfer's plans for a routing, old ones if there are: FULL heads, then the others."""
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
        fixed = (q.shape, q.dtype, k.shape, places, plan.block_size, plan.streaming, scale)
        values = (routing.modes, *routing.segments)
        key = (q.device, stream, *fixed, *(tuple(x.flatten().tolist()) for x in values))
        if lists is None and key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        if q.is_cuda:
            # A plan is copied from pinned memory that PyTorch may have given to an earlier one,
            # whose copy FlashInfer does not tell it about: let that one arrive.
            torch.cuda.current_stream(q.device).synchronize()

        group = q.shape[1] // k.shape[1]
        size, streaming = plan.block_size, plan.streaming
        counts = None if lists is None else lists.counts.cpu()
        launches = []
        for sparse in (False, True):
            # A group's query heads are the heads of one request, unless each has its own list.
            apart = group if sparse and lists is not None else 1
            requests = make_requests(routing, apart, streaming, size, counts, sparse=sparse)
            if requests.sequence.numel() == 0:
                continue
            heads = group // apart
            rows = query_rows(requests, routing.segments, q.shape[2], k.shape[1] * apart, q.device)
            where = (requests, routing.segments, apart)
            common = {"causal": True, "sm_scale": scale, "q_data_type": q.dtype}
            if not sparse and _by_tma(q):
                keys, filling, lengths = key_rows(*where, places, q.device)
                wrapper = self._wrapper(q, size, stream, heads, requests, ragged=True)
                # Requests without queries stand for the filling.
                queries = torch.stack([requests.queries, 0 * requests.queries], 1)
                wrapper.plan(
                    _starts(queries.flatten()),
                    _starts(lengths.flatten()),
                    heads,
                    1,
                    q.shape[3],
                    **common,
                )
                launches.append(_Launch(wrapper, heads, rows, keys, filling))
            else:
                table = page_table(*where, streaming, size, places, lists, q.device)
                wrapper = self._wrapper(q, size, stream, heads, requests, ragged=False)
                wrapper.plan(
                    _starts(requests.queries),
                    _starts(requests.pages),
                    table,
                    requests.tail.int(),
                    heads,
                    1,
                    q.shape[3],
                    size,
                    max_token_per_sequence=int(requests.queries.max()),
                    **common,
                )
                launches.append(_Launch(wrapper, heads, rows))
        if lists is None:  # lists are those of one q and k
            self._plans[key] = tuple(launches)
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        return tuple(launches)

    def _wrapper(
        self,
        q: Tensor,
        block_size: int,
        stream: object,
        heads: int,
        requests: Requests,
        *,
        ragged: bool,
    ) -> Any:
        """A FlashInfer wrapper with room for a plan of these requests."""
        flashinfer = _import()
        # Keys are split where there are less than two pieces of work per multiprocessor, and each
        # then takes a tile of every query head.
        pieces = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
        partial = pieces * heads * TILE * (q.shape[3] + 1) * 4 + 2**20
        workspace = self._workspaces.get((q.device, stream))
        if workspace is None or workspace.numel() < partial:
            size = max(WORKSPACE, partial)
            workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
            self._workspaces[q.device, stream] = workspace
        # FlashAttention-3's tiles have 128 rows or more, most of them empty for small blocks.
        short = q.shape[2] <= DECODED or (block_size < 64 and not ragged)
        engine = "fa2" if short else "auto"
        if ragged:
            wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
                workspace, "NHD", backend=engine
            )
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                workspace, "NHD", backend=engine
            )
        # Up to 28 bytes for each tile of at least 64 rows, or a part of one.
        tiles = 2 * requests.sequence.numel() + int(requests.queries.sum()) // 64
        room = 32 * heads * tiles + 2**20
        wrapper.reset_workspace_buffer(
            workspace, torch.empty(room, dtype=torch.uint8, device=q.device)
        )
        return wrapper


def _by_tma(q: Tensor) -> bool:
    """Whether FULL heads' keys are copied into rows, for FlashAttention-3's fastest way."""
    if not q.is_cuda or q.shape[2] < TALL:
        return False
    return torch.cuda.get_device_capability(q.device)[0] == 9


def _starts(counts: Tensor) -> Tensor:
    """Cumulative counts from 0, as FlashInfer takes them."""
    return pad(counts.cumsum(0), (1, 0)).int()


def _pageable(k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, Tensor, Places]:
    """K and V such that any token can begin a page, which takes a copy only in odd cases."""
    places = _places(k)
    aligned = all(x % 8 == 0 for x in places) and (k.data_ptr() | v.data_ptr()) % 16 == 0
    # Two pages have to fit: of an axis with one entry nobody needs to keep the stride.
    roomy = min(_room(k, places, block_size), _room(v, places, block_size)) >= 2
    if k.stride() == v.stride() and aligned and roomy:
        return k, v, places
    # Different strides, or hardly any tokens.
    missing = (0, 0, 0, max(0, block_size + 1 - k.shape[2]))
    k, v = (pad(x, missing).contiguous() for x in (k, v))
    return k, v, _places(k)


def _places(k: Tensor) -> Places:
    row, head, token, _ = k.stride()
    used = [step for step, size in zip(k.stride()[:3], k.shape[:3], strict=True) if size > 1]
    return Places(row, head, token, math.gcd(token, *used))


def _room(x: Tensor, places: Places, block_size: int) -> int:
    """Pages that PyTorch's bounds allow: the last ones lie half outside, and are not checked."""
    there = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return (there - (block_size - 1) * places.token - x.shape[3]) // places.unit + 1


def _pages(x: Tensor, places: Places, block_size: int) -> Tensor:
    """``[pages, block_size, 1, D]``, one page beginning at every ``places.unit`` elements."""
    shape = (_room(x, places, block_size), block_size, 1, x.shape[3])
    return x.as_strided(shape, (places.unit, places.token, x.shape[3], 1))


def _rows(x: Tensor, places: Places) -> Tensor:
    """``[rows, D]``, one row beginning at every ``places.unit`` elements."""
    there = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    number = (there - x.shape[3]) // places.unit + 1
    return x.as_strided((number, x.shape[3]), (places.unit, 1))


@functools.cache  # reading a package's metadata takes milliseconds
def _version() -> Verdict:
    """Whether the installed FlashInfer is new enough; importing it takes seconds."""
    try:
        found = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return Verdict(True, "of an unknown version: its package has no metadata.")
    if is_older("flashinfer-python", found):
        wanted = oldest("flashinfer-python")
        return Verdict(False, f"flashinfer {found} is older than {wanted}; upgrade it.")
    return Verdict(True)


def _import() -> Any:
    """FlashInfer itself."""
    try:
        import flashinfer
    except Exception as error:  # a package of native code can fail in any way
        raise UnsupportedRequest(
            f"backend 'flashinfer' cannot do this call: the package fails to load "
            f"({type(error).__name__}: {error}); reinstall it with pip install --force-reinstall "
            "'elasticore[flashinfer]'."
        ) from error
    return flashinfer
