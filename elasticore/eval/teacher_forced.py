"""Scores of a model on samples with a known answer, with its sparsity beside each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elasticore.eval.tasks import Sample
from elasticore.models.elastic import is_elastic
from elasticore.models.recording import record
from elasticore.models.versions import CACHE

__all__ = ["Score", "score", "scoring_order"]


@dataclass(frozen=True)
class Score:
    """One sample's result.

    Attributes
    ----------
    task
        The sample's task.
    correct
        Whether every answer token is the model's first choice: what greedy decoding would write.
    accuracy
        Share of the answer's tokens, but for given ones, that are the model's first choice.
    loss
        Mean cross-entropy of the answer's tokens, in nats.
    msr, esr, esr_last_query
        Ω_MSR and both Ω_ESR of the prompt's prefill; 0 for a model that is not elastic.
    decisions
        int8 ``[layers, kv_heads]`` on the CPU: which heads that prefill made sparse; None for a
        model that is not elastic.
    """

    task: str
    correct: bool
    accuracy: float
    loss: float
    msr: float
    esr: float
    esr_last_query: float
    decisions: Tensor | None = field(default=None, repr=False, compare=False)


@torch.no_grad()
def score(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_size: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Score]:
    """Score every sample, in order.

    The prompt is prefilled alone, as in generation, so that routing never sees the answer; the
    answer's tokens follow in one pass on the cache.

    Parameters
    ----------
    model
        A causal language model, elastic or not, in evaluation mode.
    samples
        What to score. Samples of a batch are padded on the left, for an elastic model; for another,
        only those of equal prompt and answer length share one.
    batch_size
        Prompts per forward.
    progress
        Wraps the batches, for a progress bar.
    """
    order = scoring_order(samples)
    if is_elastic(model):
        batches = list(_chunks(order, batch_size))
    else:  # a mask makes plain attention quadratic in memory
        batches = [
            chunk
            for _, group in groupby(order, key=lambda i: _shape(samples[i]))
            for chunk in _chunks(list(group), batch_size)
        ]
    scores: dict[int, Score] = {}
    for batch in progress(batches):
        scores |= zip(batch, _score_batch(model, [samples[i] for i in batch]), strict=True)
    return [scores[i] for i in range(len(samples))]


def scoring_order(samples: Sequence[Sample]) -> list[int]:
    """The order in which :func:`score` goes through ``samples``: by their prompts' lengths."""
    return sorted(range(len(samples)), key=lambda i: _shape(samples[i]))


def _score_batch(model: Any, samples: list[Sample]) -> list[Score]:
    device = model.device
    prompts = [sample.input_ids[: sample.start] for sample in samples]
    answers = [sample.input_ids[sample.start :] for sample in samples]
    prompt, mask = _stacked(prompts, device, left=True)
    answer, asked = _stacked(answers, device, left=False)
    given = torch.tensor([sample.given for sample in samples], device=device)
    asked &= torch.arange(answer.shape[1], device=device) >= given[:, None]
    padded = {} if bool(mask.all()) else _places(mask)
    with record() as trace:
        first = model(prompt, use_cache=True, logits_to_keep=1, **padded)
        logits = [first.logits]
        if answer.shape[1] > 1:
            cache = getattr(first, CACHE)
            fed = answer[:, :-1]
            if padded:
                # What follows a short answer counts as tokens, too: they change nothing before.
                padded = _places(torch.cat((mask, torch.ones_like(fed, dtype=torch.bool)), 1))
                padded["position_ids"] = padded["position_ids"][:, -fed.shape[1] :]
            # Asked for the logits of all of them, an elastic model knows that they are no prompt.
            kept = {"use_cache": True, "logits_to_keep": fed.shape[1]}
            logits.append(model(fed, **{CACHE: cache}, **kept, **padded).logits)
    scores = torch.cat(logits, 1).float()
    hits = scores.argmax(-1) == answer
    losses = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), answer.flatten(), reduction="none"
    ).view_as(answer)
    zero = torch.zeros(len(samples))
    elastic = is_elastic(model)
    count = asked.sum(1).double()
    columns: list[Tensor] = [
        (hits | ~asked).all(1),
        (hits & asked).sum(1) / count,
        losses.double().masked_fill(~asked, 0).sum(1) / count,
        trace.prefill.msr if elastic else zero,
        trace.prefill.esr if elastic else zero,
        trace.prefill.esr_last_query if elastic else zero,
    ]
    decisions = trace.prefill.decisions.unbind(1) if elastic else [None] * len(samples)
    rows = zip(*(column.tolist() for column in columns), decisions, strict=True)
    return [Score(sample.task, *row) for sample, row in zip(samples, rows, strict=True)]


def _stacked(parts: list[Any], device: Any, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of one length, padded on one side with a token of theirs, and where they are not."""
    width = max(map(len, parts))
    ids = np.stack([np.full(width, part[0]) for part in parts])
    mask = np.zeros(ids.shape, bool)
    for row, part in enumerate(parts):
        own = slice(width - len(part), None) if left else slice(len(part))
        ids[row, own], mask[row, own] = part, True
    return torch.as_tensor(ids, device=device), torch.as_tensor(mask, device=device)


def _places(mask: Tensor) -> dict[str, Tensor]:
    """Arguments that say which tokens are padding, and the positions of the others."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": mask.long(), "position_ids": positions}


def _shape(sample: Sample) -> tuple[int, int]:
    return sample.start, sample.stop


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))
