"""The conformance suite: what any backend must pass, ours or a third party's.

Every case compares a backend with a dense-mask float64 computation that shares no code with it:
outputs, and the gradients of q, k, v and the gate. A case is one batch of three sequences of
different lengths, each routed differently, so that all lanes meet in one call.

In a test file::

    @pytest.mark.parametrize("case", testing.matrix(), ids=str)
    def test_output(case):
        testing.check_output("mine", case, device="cuda")

or all at once, with a table at the end: ``testing.check_backend("mine", device="cuda")``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from elasticore.attention import AttentionRequest, hybrid_head_attention
from elasticore.backends.registry import resolve
from elasticore.errors import UnsupportedRequest
from elasticore.layout import Segments, SequenceLayout
from elasticore.patterns import BlockLists, BlockSelector, Streaming
from elasticore.plan import HeadMode, HeadPlan

__all__ = [
    "Case",
    "Problem",
    "ScatteredBlocks",
    "attended",
    "check_backend",
    "check_gradients",
    "check_output",
    "check_repeatable",
    "check_same_alone",
    "dense_attention",
    "matrix",
]

LAYOUTS = ("dense", "left", "right", "packed")
GROUPS = (1, 4, 7, 8)
HEAD_DIMS = (32, 64, 128)
LENGTHS = (1, 127, 128, 129, 2047, 2048, 2049, 2175, 2176, 2177)
QUERIES = ("all", "some", "one")
PRESETS = {
    "128": (128, Streaming(128, 2048), Streaming(0, 128)),
    "64": (64, Streaming(64, 256), Streaming(64, 64)),
    "32": (32, Streaming(0, 128), Streaming(32, 64)),
}
"""Block size, what STREAMING heads read, and what they read in short cases: less than all."""

_SHORT = 300
"""Tokens below which a case is short."""


@dataclass(frozen=True)
class Case:
    """One problem of the matrix; ``queries`` says whether ``Tq`` is ``Tk``, shorter, or 1."""

    layout: str
    group: int
    head_dim: int
    length: int
    queries: str
    preset: str

    def __str__(self) -> str:
        return (
            f"{self.layout}-g{self.group}-d{self.head_dim}-t{self.length}-{self.queries}"
            f"-b{self.preset}"
        )


def matrix(full: bool = False) -> list[Case]:
    """The cases: every pair of values of any two axes at least once, or every combination.

    Parameters
    ----------
    full
        All combinations (some thousand; minutes on a GPU) instead of the pairwise cover.
    """
    axes: tuple[tuple[object, ...], ...] = (
        LAYOUTS,
        GROUPS,
        HEAD_DIMS,
        LENGTHS,
        QUERIES,
        tuple(PRESETS),
    )
    every = [Case(*values) for values in itertools.product(*axes)]  # type: ignore[arg-type]
    if full:
        return every
    # Greedy pairwise cover, deterministic: the case that adds the most pairs for its price, so that
    # long sequences meet wide heads where the queries are few; among equals, the one whose values
    # have been used least.
    pairs = [_pairs(case) for case in every]
    price = [_operations(case) ** 0.25 for case in every]
    missing = frozenset().union(*pairs)
    cover: list[Case] = []
    used: Counter[tuple[str, object]] = Counter()
    while missing:
        gain = [len(new & missing) / cost for new, cost in zip(pairs, price, strict=True)]
        most = max(gain)
        equals = [index for index, value in enumerate(gain) if value == most]
        best = min(equals, key=lambda i: sum(used[item] for item in vars(every[i]).items()))
        cover.append(every[best])
        used.update(vars(every[best]).items())
        missing -= pairs[best]
    return cover


def _pairs(case: Case) -> frozenset[tuple[tuple[str, object], ...]]:
    """The pairs of axis values that ``case`` puts to the test.

    With one token, or one query, most of what can go wrong cannot show: such a case counts only for
    pairs with its length (one query: or its queries).
    """
    tested = frozenset(itertools.combinations(vars(case).items(), 2))
    if case.length > 1 and case.queries != "one":
        return tested
    telling = {"length"} if case.length == 1 else {"length", "queries"}
    return frozenset(pair for pair in tested if telling & {axis for axis, _ in pair})


def _operations(case: Case) -> int:
    """Multiply-adds of a case, up to a factor."""
    queries = {"all": case.length, "some": max(1, case.length // 3), "one": 1}[case.queries]
    return queries * case.length * case.group * case.head_dim


@dataclass(frozen=True)
class ScatteredBlocks(BlockSelector):
    """A selector for tests: pseudo-random blocks that depend on nothing but their own place.

    Block ``j`` of row block ``i`` and head ``h`` is chosen for about ``share`` of all triples; the
    diagonal always is. As q and k play no part, every dtype and chunking chooses the same.
    """

    share: float = 0.5

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        """Choose the key blocks of every row block; see :class:`BlockSelector`."""
        past = (segments.key_length - segments.query_length)[:, None]
        rows = -(-segments.key_length[:, None] // block_size) - past // block_size
        device = q.device
        row = torch.arange(int(rows.max()) if rows.numel() else 0, device=device)
        row_block = past // block_size + row
        width = int((-(-segments.key_length // block_size)).max()) if len(past) else 0
        column = torch.arange(width, device=device)
        head = torch.arange(q.shape[1], device=device)
        # A multiplicative hash of (head, row block, column), its high bits read as a fraction.
        key = head[:, None, None] * 7919 + row_block[:, None, :, None] * 104729 + column * 1299709
        fraction = (key * 2654435761 % 2**32).double() / 2**32
        mask = (fraction < self.share) & (column < row_block[:, None, :, None])
        mask |= column == row_block[:, None, :, None]
        mask &= (row < rows)[:, None, :, None]
        mask &= (segments.query_length > 0)[:, None, None, None]
        return BlockLists.from_mask(mask)


class Problem(NamedTuple):
    """The arguments of one attention call."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: HeadPlan
    layout: SequenceLayout
    scale: float

    def run(self, backend: str | None = None) -> Tensor:
        """Run the call on ``backend``."""
        return hybrid_head_attention(
            self.q,
            self.k,
            self.v,
            self.plan,
            layout=self.layout,
            scale=self.scale,
            backend=backend,
        )

    def segments(self) -> Segments:
        """Where the sequences lie."""
        return self.layout.segments(
            self.q.shape[0], self.q.shape[2], self.k.shape[2], self.q.device
        )


def make_problem(
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    gate: tuple[HeadMode, HeadMode] | None = None,
    seed: int = 0,
) -> Problem:
    """Random inputs for ``case``: three sequences, two KV heads each, three routings.

    Parameters
    ----------
    gate
        The pair (retrieval, sparse) for a gated plan whose q, k, v and gate want gradients; None
        for an inference plan that mixes all three lanes.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_heads, sequences = 2, 3
    lengths = [case.length, max(1, case.length // 2), max(1, case.length - 3)]
    if case.layout == "dense":
        lengths = [case.length] * sequences
    wanted = {"all": case.length, "some": max(1, case.length // 3), "one": 1}[case.queries]
    queries = [min(wanted, length) for length in lengths]

    def draw(heads: int, rows: int, positions: int) -> Tensor:
        # Drawn as [B, T, H, D] and transposed: the strides that models hand over.
        x = torch.randn(rows, positions, heads, case.head_dim, generator=generator)
        return x.to(device=device, dtype=dtype).transpose(1, 2)

    heads = kv_heads * case.group
    if case.layout == "packed":
        cumulative = [
            torch.tensor([0, *itertools.accumulate(sizes)], device=device)
            for sizes in (queries, lengths)
        ]
        layout = SequenceLayout.packed(*cumulative)
        shape = (1, sum(queries), sum(lengths))
    else:
        shape = (sequences, wanted, case.length)
        layout = SequenceLayout.dense()
        if case.layout != "dense":
            missing = torch.tensor([case.length - length for length in lengths], device=device)
            zero = torch.zeros_like(missing)
            last = zero + case.length - 1
            layout = (
                SequenceLayout.padded(missing, last)
                if case.layout == "left"
                else SequenceLayout.padded(zero, last - missing)
            )
    batch, total_queries, total_keys = shape
    q, k, v = (
        draw(heads, batch, total_queries),
        draw(kv_heads, batch, total_keys),
        draw(kv_heads, batch, total_keys),
    )
    block_size, streaming, short = PRESETS[case.preset]
    common = {
        "streaming": short if case.length < _SHORT else streaming,
        "selector": ScatteredBlocks(),
        "block_size": block_size,
    }
    if gate is None:
        modes = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int8, device=device)
        plan = HeadPlan(modes, **common)  # type: ignore[arg-type]
    else:
        choice = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], device=device)
        plan = HeadPlan.from_gate(
            choice.requires_grad_(),
            retrieval=gate[0],
            sparse=gate[1],
            **common,  # type: ignore[arg-type]
        )
        for tensor in (q, k, v):
            tensor.requires_grad_()
    # Not the default scale, so that whoever ignores the argument shows it.
    return Problem(q, k, v, plan, layout, 1.25 * case.head_dim**-0.5)


def attended(problem: Problem, sequence: int, mode: HeadMode) -> Tensor:
    """The dense mask of one lane, token by token: bool ``[Hq, q_length, k_length]``.

    Written from the definition of the lanes, with nothing in common with any backend.
    """
    *_, query_length, _, key_length = (int(x[sequence]) for x in problem.segments())
    plan, heads = problem.plan, problem.q.shape[1]
    device = problem.q.device
    position = torch.arange(key_length, device=device)
    row = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    causal = (position <= row).expand(heads, -1, -1)
    block, row_block = position // plan.block_size, row // plan.block_size
    if mode is HeadMode.FULL:
        return causal
    if mode is HeadMode.STREAMING:
        sinks, window = plan.streaming.blocks(plan.block_size)
        return causal & ((block < sinks) | (block > row_block - window))
    assert plan.selector is not None
    lists = plan.selector.select(
        problem.q,
        problem.k,
        problem.segments(),
        block_size=plan.block_size,
        scale=problem.scale,
    )
    chosen = lists.to_mask(-(-problem.k.shape[2] // plan.block_size))[sequence]
    first = (key_length - query_length) // plan.block_size
    return causal & chosen[:, row_block[:, 0] - first][:, :, block]


def dense_attention(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """The call computed from dense masks in ``dtype``: ``[B, Hq, Tq, D]``, differentiable.

    Holds a mask and scores of every query against every key: for tests only.
    """
    q, k, v = (x.to(dtype) for x in (problem.q, problem.k, problem.v))
    plan = problem.plan
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for index, (row, q_start, q_length, k_start, k_length) in enumerate(
        torch.stack(problem.segments(), 1).tolist()
    ):
        if q_length == 0:
            continue
        queries = q[row, :, q_start : q_start + q_length].unflatten(0, (kv_heads, group))
        keys, values = (x[row, :, None, k_start : k_start + k_length] for x in (k, v))
        scores = queries @ keys.transpose(-1, -2) * problem.scale

        masks = {mode: attended(problem, index, mode) for mode in plan.lanes}

        def lane(mode: int, h: int) -> Tensor:
            mask = masks[HeadMode(mode)].unflatten(0, (kv_heads, group))[h]  # noqa: B023
            return scores[h].masked_fill(~mask, -torch.inf).softmax(-1) @ values[h]  # noqa: B023

        heads = range(kv_heads)
        if plan.gate is not None:
            gate = plan.gate[index].to(dtype)
            part = torch.stack(
                [
                    (1 - gate[h]) * lane(plan.retrieval, h) + gate[h] * lane(plan.sparse, h)
                    for h in heads
                ]
            )
        else:
            part = torch.stack([lane(int(plan.modes[index, h]), h) for h in heads])
        out[row, :, q_start : q_start + q_length] = part.flatten(0, 1)
    return out


def check_output(
    backend: str,
    case: Case,
    *,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> None:
    """The output is the dense float64 one, and zero at queries of padding.

    Raises
    ------
    AssertionError
        With the error, the bound and the case.
    """
    problem = make_problem(case, dtype=dtype, device=device)
    _require_support(backend, problem)
    _poison_padding(problem)
    reference = dense_attention(problem)
    plain = reference if dtype is torch.float64 else dense_attention(problem, dtype)
    _compare("output", problem.run(backend), reference, plain, 2, case)


def check_gradients(
    backend: str,
    case: Case,
    *,
    modes: tuple[HeadMode, HeadMode] = (HeadMode.FULL, HeadMode.STREAMING),
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> None:
    """The gradients of q, k, v and the gate are those of the dense float64 blend, zero at padding.

    Raises
    ------
    AssertionError
        With the tensor's name, the error, the bound and the case.
    """
    problem = make_problem(case, dtype=dtype, device=device, gate=modes)
    _require_support(backend, problem)
    with torch.no_grad():
        _poison_padding(problem)
    assert problem.plan.gate is not None
    inputs = (problem.q, problem.k, problem.v, problem.plan.gate)
    weight = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1))
    weight = weight.to(device)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)

    ours = gradients(problem.run(backend))
    reference = gradients(dense_attention(problem))
    plain = reference if dtype is torch.float64 else gradients(dense_attention(problem, dtype))
    # The reference's gradients arrive rounded to the inputs' dtype, which adds half an ulp.
    names = ("q", "k", "v", "gate")
    for name, mine, exact, same in zip(names, ours, reference, plain, strict=True):
        _compare(f"gradient of {name}", mine, exact, same, 3, case)


def check_same_alone(
    backend: str,
    case: Case,
    *,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> None:
    """Each sequence of a batch gives what it gives alone, whatever its neighbours' routing."""
    problem = make_problem(case, dtype=dtype, device=device)
    _require_support(backend, problem)
    together = problem.run(backend)
    for index, (row, q_start, q_length, k_start, k_length) in enumerate(
        torch.stack(problem.segments(), 1).tolist()
    ):
        if q_length == 0:
            continue
        alone = problem._replace(
            q=problem.q[row : row + 1, :, q_start : q_start + q_length],
            k=problem.k[row : row + 1, :, k_start : k_start + k_length],
            v=problem.v[row : row + 1, :, k_start : k_start + k_length],
            plan=problem.plan.with_modes(problem.plan.modes[index : index + 1]),
            layout=SequenceLayout.dense(),
        )
        part = together[row : row + 1, :, q_start : q_start + q_length]
        reference = dense_attention(alone)
        plain = reference if dtype is torch.float64 else dense_attention(alone, dtype)
        _compare("sequence alone", alone.run(backend), reference, plain, 2, case)
        _compare("sequence in its batch", part, reference, plain, 2, case)


def check_repeatable(
    backend: str,
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> None:
    """Two runs give the same bits."""
    problem = make_problem(case, dtype=dtype, device=device)
    _require_support(backend, problem)
    first, second = problem.run(backend), problem.run(backend)
    if not torch.equal(first, second):
        raise AssertionError(f"{backend}: two runs of {case} differ.")


def check_backend(
    backend: str,
    *,
    device: str | torch.device = "cpu",
    dtypes: Iterable[torch.dtype] = (torch.float64, torch.float32),
    full: bool = False,
    progress: Callable[[Iterable[Case]], Iterable[Case]] = iter,
) -> dict[str, int]:
    """Run the whole suite; return how many checks of each kind passed or were not supported.

    Parameters
    ----------
    dtypes
        What to run in; a case that the backend's ``supports`` refuses counts as ``unsupported``.
    full
        Every combination of the matrix, not the pairwise cover.
    progress
        Wraps the cases, for a progress bar.

    Raises
    ------
    AssertionError
        At the first check that fails, or if the backend supported none of them.
    """
    counts = {"output": 0, "gradients": 0, "same alone": 0, "repeatable": 0, "unsupported": 0}
    pairs: tuple[tuple[HeadMode, HeadMode], ...] = (
        (HeadMode.FULL, HeadMode.STREAMING),
        (HeadMode.FULL, HeadMode.SELECTED),
        (HeadMode.SELECTED, HeadMode.STREAMING),
    )
    for index, case in enumerate(progress(matrix(full))):
        for dtype in dtypes:
            checks: dict[str, Callable[..., None]] = {
                "output": check_output,
                "gradients": partial(check_gradients, modes=pairs[index % 3]),
                "same alone": check_same_alone,
                "repeatable": check_repeatable,
            }
            for kind, check in checks.items():
                try:
                    check(backend, case, dtype=dtype, device=device)
                except UnsupportedRequest:
                    counts["unsupported"] += 1
                else:
                    counts[kind] += 1
    if counts["unsupported"] == sum(counts.values()):
        raise AssertionError(
            f"{backend} supports no case of the matrix on {device}, so nothing was shown; every "
            "case mixes all three lanes."
        )
    return counts


def _require_support(backend: str, problem: Problem) -> None:
    request = AttentionRequest.of(problem.q, problem.k, problem.v, problem.plan, problem.layout)
    resolve(backend, request)


def _poison_padding(problem: Problem) -> None:
    """Fill what no sequence owns with NaN: whoever reads it shows it."""
    if problem.layout.kind != "padded":
        return
    assert problem.layout.first is not None
    assert problem.layout.last is not None
    position = torch.arange(problem.k.shape[2], device=problem.k.device)
    padding = (position < problem.layout.first[:, None]) | (position > problem.layout.last[:, None])
    for tensor in (problem.k, problem.v):
        tensor.masked_fill_(padding[:, None, :, None], torch.nan)
    queries = problem.q.shape[2]
    problem.q.masked_fill_(padding[:, None, -queries:, None], torch.nan)


def _compare(
    what: str, ours: Tensor, reference: Tensor, plain: Tensor, factor: float, case: Case
) -> None:
    """Fail unless ``ours`` is as near to ``reference`` as ``factor`` times a plain computation is.

    ``plain`` is the same formula in the dtype under test. The floor covers the case where it
    happens to be exact: a sum of ``n`` terms is off by at most ``n`` roundings of its largest term.
    """
    if ours.shape != reference.shape:
        raise AssertionError(
            f"{what}: shape {list(ours.shape)}, not {list(reference.shape)}, in {case}."
        )
    if ours.dtype != plain.dtype:
        raise AssertionError(f"{what}: dtype {ours.dtype}, not {plain.dtype}, in {case}.")
    if ours.numel() == 0:
        return
    if not bool(torch.isfinite(ours).all()):
        raise AssertionError(f"{what}: NaN or infinity in {case}.")
    scale = max(1.0, float(reference.abs().max()))  # inputs are of unit size
    error = float((ours.double() - reference.double()).abs().max())
    baseline = float((plain.double() - reference.double()).abs().max())
    terms = case.head_dim + (case.length if ours.dtype == torch.float64 else 0)
    floor = terms * torch.finfo(ours.dtype).eps * scale
    if error > factor * baseline + floor:
        raise AssertionError(
            f"{what}: max error {error:.3g}, allowed {factor:g} x {baseline:.3g} + {floor:.3g}, in "
            f"{case} ({ours.dtype})."
        )
