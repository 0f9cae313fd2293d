"""Samples of the candidate tasks, made by several processes, and what a model scores on them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from torch import nn

from elasticore.assets.fetched import smollm2
from elasticore.data.encoding import load_tokenizer
from elasticore.eval.corpus import Split
from elasticore.eval.tasks import Sample, make_sample
from elasticore.eval.teacher_forced import Score, score
from recipes.smollm2.tasks import TASKS

__all__ = ["FIRST_SEED", "figures", "make_samples", "scored"]

FIRST_SEED = {"heldout": 0, "train": 900_000_000}
"""Where evaluation starts to count seeds: training uses those from 0 on."""


@lru_cache
def _tokenizer() -> Any:
    return load_tokenizer(str(smollm2()))


def _make(job: tuple[str, int], length: int, split: Split) -> Sample:
    task, seed = job
    return make_sample(task, _tokenizer(), length, seed, split, TASKS)


def make_samples(
    tasks: Sequence[str], length: int, count: int, split: Split = "heldout"
) -> list[Sample]:
    """``count`` samples of each task, the same in every run."""
    jobs = [(task, FIRST_SEED[split] + seed) for task in tasks for seed in range(count)]
    make = partial(_make, length=length, split=split)
    workers = len(os.sched_getaffinity(0))
    # Spawned, as the parent may hold a GPU.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(make, jobs, chunksize=max(1, min(20, len(jobs) // workers)))


def scored(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    batch_tokens: int = 65536,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Score]:
    """Score samples of one length."""
    size = max(1, batch_tokens // len(samples[0].input_ids))
    return score(model, samples, batch_size=size, progress=progress)


def figures(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """By task: the score in percent with its standard error, losses, and sparsity.

    ``each`` holds the score of every sample, in order, so that two ways can be compared in pairs.
    """
    found: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(one.task for one in scores):
        own = [one for one in scores if one.task == task]
        each = np.array([one.accuracy if TASKS[task].tokens else one.correct for one in own], float)
        found[task] = {
            "score": round(100 * float(each.mean()), 2),
            "error": round(100 * float(each.std() / max(1, len(each) - 1) ** 0.5), 2),
            "loss": round(float(np.mean([one.loss for one in own])), 4),
            "msr": round(float(np.mean([one.msr for one in own])), 4),
            "esr": round(float(np.mean([one.esr for one in own])), 4),
            "each": [round(float(x), 3) for x in each],
        }
    return found
