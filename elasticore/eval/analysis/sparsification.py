"""What is lost when head after head turns sparse, the least retrieving first (Appendix C.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import floor
from typing import Any

import torch
from torch import Tensor

from elasticore.checks import check_number
from elasticore.eval.analysis.rows import Row
from elasticore.eval.tasks import Sample
from elasticore.eval.teacher_forced import Score, score
from elasticore.models.elastic import Elastic
from elasticore.router.tables import HeadTable

__all__ = ["Step", "progressive_sparsification", "ranked_table"]

RATIOS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class Step:
    """One task at one share of sparse heads: a cell of Table 5.

    Attributes
    ----------
    msr
        Ω_MSR asked for.
    sparse_heads
        How many KV heads of the model are sparse.
    task
        The task.
    score
        Share of exact answers of a sparsity-sensitive task, of right tokens of another.
    loss
        Mean cross-entropy of the answers' tokens, in nats.
    retention
        The score as a percentage of that with no sparse head; nan if that is 0.
    """

    msr: float
    sparse_heads: int
    task: str
    score: float
    loss: float
    retention: float

    def row(self) -> Row:
        """As a row of a CSV file."""
        return asdict(self)


def ranked_table(scores: Tensor, msr: float) -> Tensor:
    """A head table in which the heads with the highest scores stay full.

    Parameters
    ----------
    scores
        ``[layers, kv_heads]``, as of :func:`retrieval_scores`.
    msr
        Ω_MSR, from 0 to 1: ``floor((1 - msr) * heads)`` heads stay.

    Returns
    -------
    Tensor
        bool ``[layers, kv_heads]`` on the CPU; True = sparse. Of equal scores the first stays.
    """
    check_number("msr", msr, 0, 1)
    # (1 - 0.9) * 10 is 0.9999999999999998 and means 1.
    kept = floor(round((1 - msr) * scores.numel(), 6))
    order = scores.flatten().cpu().argsort(descending=True, stable=True)
    table = torch.ones(scores.numel(), dtype=torch.bool)
    table[order[:kept]] = False
    return table.view(scores.shape)


def progressive_sparsification(
    model: Any,
    samples: Sequence[Sample],
    scores: Tensor,
    *,
    ratios: Sequence[float] = RATIOS,
    way: Elastic | None = None,
    batch_size: int = 1,
    step: Callable[[str], None] = lambda text: None,
) -> list[Step]:
    """Score every task at every share of sparse heads.

    Parameters
    ----------
    model
        The backbone, not elastic; it is as before afterwards.
    samples
        What to score, of one or more tasks.
    scores
        ``[layers, kv_heads]`` of the layers that can be elastic: which heads to keep longest.
    ratios
        Values of Ω_MSR; 0 is measured in any case, as what the others are compared with.
    way
        What a head reads in either way, whatever its policy; the paper's FA-SSA by default.
    batch_size
        Prompts per forward.
    step
        Called with a line of text as each ratio starts.

    Returns
    -------
    list of Step
        By ratio, then by task in the order of the samples.
    """
    way = Elastic() if way is None else way
    results: list[Step] = []
    full: dict[str, float] = {}
    for msr in sorted({0.0, *ratios}):
        table = ranked_table(scores, msr)
        step(f"Ω_MSR = {msr:g}: {int(table.sum())} of {table.numel()} heads sparse")
        with replace(way, policy=HeadTable(table), base=None).on(model):
            found = score(model, samples, batch_size=batch_size)
        for task in dict.fromkeys(sample.task for sample in samples):
            own = [(s, f) for s, f in zip(samples, found, strict=True) if s.task == task]
            value = _mean([_score(sample, one) for sample, one in own])
            base = full.setdefault(task, value)
            results.append(
                Step(
                    msr=float(msr),
                    sparse_heads=int(table.sum()),
                    task=task,
                    score=value,
                    loss=_mean([one.loss for _, one in own]),
                    retention=100 * value / base if base else float("nan"),
                )
            )
    return results


def _score(sample: Sample, found: Score) -> float:
    return float(found.correct) if sample.sensitive else found.accuracy


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
