"""What a backend must do: right outputs, right gradients, the same alone, the same again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elasticore.attention import AttentionRequest
from elasticore.choice import choose
from elasticore.errors import UnsupportedRequest
from elasticore.layout import SequenceLayout
from elasticore.patterns import HeadMode
from elasticore.testing.cases import PAGED, PAIRS, Case, matrix
from elasticore.testing.paging import paged, run_paged
from elasticore.testing.problems import Problem, make_problem
from elasticore.testing.reference import dense_attention

__all__ = [
    "check_backend",
    "check_checkpointing",
    "check_gradients",
    "check_output",
    "check_pages",
    "check_repeatable",
    "check_same_alone",
]

Lanes: TypeAlias = tuple[HeadMode, HeadMode]
"""Those of a plan's patterns, (retrieval, sparse)."""


def check_output(
    backend: str,
    case: Case,
    *,
    lanes: Lanes | None = None,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> None:
    """The output is the dense float64 one, and zero at queries of padding.

    Parameters
    ----------
    lanes
        Those of the plan, (retrieval, sparse); None for each of the three pairs in turn.

    Raises
    ------
    AssertionError
        With the error, the bound and the case.
    """
    for pair in PAIRS if lanes is None else (lanes,):
        problem = make_problem(case, dtype=dtype, device=device, lanes=pair)
        _require_support(backend, problem)
        _poison_padding(problem)
        reference = dense_attention(problem)
        plain = reference if dtype is torch.float64 else dense_attention(problem, dtype)
        _compare("output", problem.run(backend), reference, plain, 2, case)


def check_gradients(
    backend: str,
    case: Case,
    *,
    lanes: Lanes = PAIRS[0],
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> None:
    """The gradients of q, k, v and the gate are those of the dense float64 blend, zero at padding.

    The gate's is a sum over many rows in which most cancels, so it has a bound of its own: what the
    rounding of both outputs to ``dtype`` explains, see ``_compare_gate``.

    Raises
    ------
    AssertionError
        With the tensor's name, the error, the bound and the case.
    """
    problem = make_problem(case, dtype=dtype, device=device, lanes=lanes, gated=True)
    _require_support(backend, problem)
    with torch.no_grad():
        _poison_padding(problem)
    assert problem.plan.gate is not None
    inputs = (problem.q, problem.k, problem.v, problem.plan.gate)
    # The incoming gradient: of each dtype's own values, so that only what follows is compared.
    weight = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = weight.to(device)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, weight.to(out.dtype))

    *ours, gate = gradients(problem.run(backend))
    *reference, exact_gate = gradients(dense_attention(problem))
    plain = reference
    if dtype is not torch.float64:
        *plain, _ = gradients(dense_attention(problem, dtype))
    # The reference's gradients arrive rounded to the inputs' dtype, which adds half an ulp.
    for name, mine, exact, same in zip(("q", "k", "v"), ours, reference, plain, strict=True):
        _compare(f"gradient of {name}", mine, exact, same, 3, case)
    _compare_gate(problem, gate, exact_gate, case)


def check_pages(
    backend: str,
    case: Case,
    *,
    lanes: Lanes | None = None,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> None:
    """Over pages, the output is the dense float64 one too, wherever they lie.

    ``case`` is one of a layout in ``PAGED``; ``lanes`` are a full and a streaming one.

    Raises
    ------
    UnsupportedRequest
        If the backend reads no pages, or not those of this case.
    """
    pair = PAIRS[0] if lanes is None else lanes
    problem = make_problem(case, dtype=dtype, device=device, lanes=pair)
    reference = dense_attention(problem)
    plain = reference if dtype is torch.float64 else dense_attention(problem, dtype)
    for by_head, page_size in ((True, problem.plan.block_size), (False, 16)):
        pages = paged(problem, page_size, by_head=by_head)
        _compare("output over pages", run_paged(problem, pages, backend), reference, plain, 2, case)


def check_same_alone(
    backend: str,
    case: Case,
    *,
    lanes: Lanes | None = None,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> None:
    """Each sequence of a batch gives what it gives alone, whatever its neighbours' routing.

    ``lanes`` as for :func:`check_output`.
    """
    for pair in PAIRS if lanes is None else (lanes,):
        problem = make_problem(case, dtype=dtype, device=device, lanes=pair)
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
                plan=problem.plan.with_decisions(problem.plan.decisions[index : index + 1]),
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
    lanes: Lanes | None = None,
    gradients: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> None:
    """Two runs give the same bits; with ``gradients``, those have the same bits as well.

    ``lanes`` as for :func:`check_output`.
    """
    names = ("output", *(f"gradient of {name}" for name in ("q", "k", "v", "gate")))
    for pair in PAIRS if lanes is None else (lanes,):
        problem = make_problem(case, dtype=dtype, device=device, lanes=pair, gated=gradients)
        _require_support(backend, problem)
        runs = [_bits(problem, backend) for _ in range(2)]
        for name, first, second in zip(names, *runs, strict=False):
            if not torch.equal(first, second):
                raise AssertionError(f"{backend}: {name} of two runs of {case} differ.")


def _bits(problem: Problem, backend: str) -> tuple[Tensor, ...]:
    """The output and, of a gated problem, the gradients of a run."""
    out = problem.run(backend)
    if problem.plan.gate is None:
        return (out,)
    inputs = (problem.q, problem.k, problem.v, problem.plan.gate)
    return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))


def check_checkpointing(
    backend: str,
    case: Case,
    *,
    lanes: Lanes = PAIRS[0],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> None:
    """Under gradient checkpointing, output and gradients have the bits that they have without."""
    problem = make_problem(case, dtype=dtype, device=device, lanes=lanes, gated=True)
    _require_support(backend, problem)
    assert problem.plan.gate is not None
    inputs = (problem.q, problem.k, problem.v, problem.plan.gate)
    weight = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = weight.to(device)

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        plan = dataclasses.replace(problem.plan, gate=gate, check=False)
        return problem._replace(q=q, k=k, v=v, plan=plan).run(backend)

    plain, again = run(*inputs), checkpoint(run, *inputs, use_reentrant=False)
    pairs = {"output": (plain, again)}
    gradients = (torch.autograd.grad(out, inputs, weight) for out in (plain, again))
    for name, one, other in zip(("q", "k", "v", "gate"), *gradients, strict=True):
        pairs[f"gradient of {name}"] = one, other
    for name, (first, second) in pairs.items():
        if not torch.equal(first, second):
            raise AssertionError(f"{backend}: checkpointing changes the {name} of {case}.")


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
    kinds = ("output", "gradients", "same alone", "repeatable", "pages", "unsupported")
    counts = dict.fromkeys(kinds, 0)
    for index, case in enumerate(progress(matrix(full))):
        rotated = PAIRS[index % len(PAIRS)]
        for dtype in dtypes:
            checks: dict[str, Callable[..., None]] = {
                "output": check_output,
                "gradients": partial(check_gradients, lanes=rotated),
                "same alone": partial(check_same_alone, lanes=rotated),
                "repeatable": partial(check_repeatable, lanes=rotated),
            }
            if case.layout in PAGED:
                checks["pages"] = check_pages
            for kind, check in checks.items():
                try:
                    check(backend, case, dtype=dtype, device=device)
                except UnsupportedRequest:
                    counts["unsupported"] += 1
                else:
                    counts[kind] += 1
    if counts["unsupported"] == sum(counts.values()):
        raise AssertionError(
            f"{backend} supports no case of the matrix on {device}, so nothing was shown; it "
            "must support all three lanes."
        )
    return counts


def _require_support(backend: str, problem: Problem) -> None:
    request = AttentionRequest.of(problem.q, problem.k, problem.v, problem.plan, problem.layout)
    choose(backend, request)


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


def _compare_gate(problem: Problem, ours: Tensor, reference: Tensor, case: Case) -> None:
    """Fail unless the gate's gradient is as good as outputs rounded to the dtype under test allow.

    The gradient is ``sum(dO * (O_sparse - O_retrieval))``. Call the outputs' error ``e``. The
    incoming ``dO`` is normal noise that knows nothing of it, so ``sum(dO * e)`` is normal with the
    standard deviation ``norm(e)``; six of them are exceeded once in 10^9 times. And ``e`` is at
    most ``unit * sum(p |v|)``, where in 16 bits weights and output are rounded, half an ``eps``
    each, and in others, which accumulate in their own precision, a score has ``head_dim`` terms.
    """
    dtype, gate = problem.q.dtype, problem.plan.gate
    assert gate is not None
    unit = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else case.head_dim)
    with torch.no_grad():
        halves = dataclasses.replace(problem.plan, gate=torch.full_like(gate, 0.5), check=False)
        size = 2 * dense_attention(problem._replace(v=problem.v.abs(), plan=halves))
    for index, (row, start, length, *_) in enumerate(torch.stack(problem.segments(), 1).tolist()):
        rows = size[row, :, start : start + length].unflatten(0, (gate.shape[1], -1))
        allowed = 6 * unit * rows.flatten(1).norm(dim=1)
        allowed += 2 * torch.finfo(gate.dtype).eps * reference[index].abs()  # both were rounded
        error = (ours[index].double() - reference[index].double()).abs()
        if not bool((error <= allowed).all()):
            raise AssertionError(
                f"gradient of gate: errors {error.tolist()} in sequence {index}, allowed "
                f"{allowed.tolist()}, in {case} ({dtype})."
            )
