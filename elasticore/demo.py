"""The main job in small: the shipped model answers long prompts, elastic and full."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elasticore.eval.tasks import TASKS, Sample, make_sample
from elasticore.eval.teacher_forced import score
from elasticore.models.elastic import elasticize, restore
from elasticore.models.loading import TINY, load_backbone
from elasticore.models.recording import Trace, record

__all__ = ["Answer", "run_demo"]

SHOWN = 24
"""Tokens of a continuation that are written out."""


@dataclass(frozen=True)
class Answer:
    """What the elastic model made of one prompt, beside full attention.

    ``correct`` is exact for a retrieval task; for a continuation ``accuracy`` counts, the share of
    the next tokens that are the model's first choice. Both pairs are (elastic, full attention).
    """

    task: str
    prompt_tokens: int
    expected: str
    text: str
    full_text: str
    sensitive: bool
    correct: tuple[bool, bool]
    accuracy: tuple[float, float]
    msr: float
    esr: float
    esr_last_query: float
    prefill_seconds: float
    full_prefill_seconds: float
    backend: str
    decisions: torch.Tensor


def run_demo(
    *,
    prompts: Sequence[tuple[str, int]],
    length: int = 4096,
    router: str | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> list[Answer]:
    """Answer held-out prompts with the tiny model, elastic and then with full attention.

    Parameters
    ----------
    prompts
        Pairs of a task (``elasticore.eval.tasks.TASKS``) and a seed.
    length
        Tokens of each prompt and answer together, at most the model's 4,096.
    router
        Directory or hub id of other routers than the shipped ones.
    step
        Called with a line of text as each prompt starts.

    Raises
    ------
    ValueError
        If a task is unknown or ``length`` does not fit.
    """
    # Without tensor cores, as in float32, a GPU's time would say little.
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    model, tokenizer = load_backbone(TINY, "bfloat16" if fast else "float32")
    longest = model.config.max_position_embeddings
    if not 256 <= length <= longest:
        raise ValueError(f"length must be from 256 to {longest} tokens, got {length}.")
    unknown = sorted({task for task, _ in prompts} - set(TASKS))
    if unknown:
        raise ValueError(f"prompts name unknown tasks {unknown}; there are: {', '.join(TASKS)}.")
    samples = [make_sample(task, tokenizer, length, seed) for task, seed in prompts]
    full = []
    _answer(model, tokenizer, samples[0])  # warms up, so that the first time shown is fair
    for sample in samples:
        step(f"{sample.task}: full attention")
        full.append(_answer(model, tokenizer, sample))
    elasticize(model, TINY if router is None else router)
    answers = []
    _answer(model, tokenizer, samples[0])
    for sample, (full_text, full_score, _, full_seconds) in zip(samples, full, strict=True):
        step(f"{sample.task}: elastic")
        text, own, trace, seconds = _answer(model, tokenizer, sample)
        one = trace.passes[0]
        answers.append(
            Answer(
                task=sample.task,
                prompt_tokens=sample.start,
                expected=sample.answer if sample.sensitive else _shown(tokenizer, sample),
                text=text,
                full_text=full_text,
                sensitive=sample.sensitive,
                correct=(own.correct, full_score.correct),
                accuracy=(own.accuracy, full_score.accuracy),
                msr=float(one.msr[0]),
                esr=float(one.esr[0]),
                esr_last_query=float(one.esr_last_query[0]),
                prefill_seconds=seconds,
                full_prefill_seconds=full_seconds,
                backend=one.backend,
                decisions=one.decisions[:, 0],
            )
        )
    restore(model)
    return answers


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, sample: Sample) -> tuple[str, Any, Trace, float]:
    """Generate the answer; return it, its score, the trace and the seconds of the prefill."""
    prompt = torch.as_tensor(sample.input_ids[: sample.start], device=model.device)[None]
    wanted = len(sample.input_ids) - sample.start
    if prompt.is_cuda:  # a GPU's first time at a length is that of allocating
        model(prompt, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
    with record() as trace:
        started = time.perf_counter()
        model(prompt, use_cache=False, logits_to_keep=1)
        if prompt.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=wanted if sample.sensitive else SHOWN,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    text = tokenizer.decode(out[0, prompt.shape[1] :].tolist())
    return text, score(model, [sample])[0], trace, seconds


def _shown(tokenizer: Any, sample: Sample) -> str:
    return tokenizer.decode(sample.input_ids[sample.start : sample.start + SHOWN].tolist())
