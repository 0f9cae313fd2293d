"""The main job in small: a model answers long prompts, elastic and with full attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from elasticore.eval import chat_tasks, tasks
from elasticore.eval.tasks import Sample, Task, make_sample
from elasticore.eval.teacher_forced import score
from elasticore.models.elastic import elasticize, restore, way_of
from elasticore.models.generating import greedy
from elasticore.models.loading import load_backbone
from elasticore.models.recording import record
from elasticore.patterns import Streaming

__all__ = ["DEMOS", "Answer", "Demo", "run_demo"]

SHOWN = 24
"""Tokens of an answer that are written out."""


@dataclass(frozen=True)
class Demo:
    """A model and what it is asked.

    Attributes
    ----------
    title
        What the model is.
    tasks
        By name.
    prompts
        A task, a length in tokens with the answer, and a seed; all are held out.
    """

    title: str
    tasks: Mapping[str, Task]
    prompts: Sequence[tuple[str, int, int]]


DEMOS = {
    "smollm2": Demo(
        "SmolLM2-135M-Instruct",
        chat_tasks.TASKS,
        (
            ("needle", 7900, 0),
            ("two-values", 4096, 0),
            ("far-sentence", 4096, 1),
            ("near-needle", 7900, 0),
            ("near-fact", 7900, 0),
        ),
    ),
    "tiny": Demo(
        "the tiny model in the package",
        tasks.TASKS,
        (("multikey", 4096, 0), ("tracking", 4096, 0), ("code", 4096, 0), ("code", 4096, 1)),
    ),
}
"""By the name of the backbone, which its routers share.

SmolLM2's prompts are ones that it answers with full attention.
"""


@dataclass(frozen=True)
class Answer:
    """What the elastic model made of one prompt, beside full attention.

    Pairs are (elastic, full attention). ``right``: whether the answer is the expected one, to the
    letter; None for a text that goes on, where ``accuracy`` counts, the share of the next tokens
    that are the model's first choice. ``seconds`` are those to the first token. ``cache_read`` is
    how many bytes of keys and values each further token reads.
    """

    task: str
    prompt_tokens: int
    question: str
    expected: str
    text: tuple[str, str]
    sensitive: bool
    right: tuple[bool, bool] | None
    accuracy: tuple[float, float] | None
    msr: float
    esr: float
    esr_last_query: float
    seconds: tuple[float, float]
    cache_read: tuple[int, int]
    backend: str
    decisions: torch.Tensor


def run_demo(
    name: str = "tiny",
    *,
    prompts: Sequence[tuple[str, int, int]] | None = None,
    router: str | None = None,
    step: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> list[Answer]:
    """Answer held-out prompts with full attention, and then elastic.

    Parameters
    ----------
    name
        Of a model in :data:`DEMOS`, which must be there (:func:`elasticore.fetch`).
    prompts
        Instead of the demo's own: a task, a length and a seed each.
    router
        Directory or hub id of other routers than the package's.
    step
        Told what is being done, and how many of all answers are there.

    Raises
    ------
    ValueError
        If a task is unknown, or a length is too long or too short.
    FileNotFoundError
        If the model, or the texts of its prompts, have not been fetched.
    """
    demo = DEMOS[name]
    prompts = demo.prompts if prompts is None else prompts
    unknown = sorted({task for task, _, _ in prompts} - set(demo.tasks))
    if unknown:
        there = ", ".join(demo.tasks)
        raise ValueError(f"prompts name unknown tasks {unknown}; there are: {there}.")
    model, tokenizer = load_backbone(name, _dtype(name))
    longest = model.config.max_position_embeddings
    for _, length, _ in prompts:
        if not 256 <= length <= longest:
            raise ValueError(f"length must be from 256 to {longest} tokens, got {length}.")
    samples = [make_sample(task, tokenizer, n, seed, tasks=demo.tasks) for task, n, seed in prompts]
    done: list[list[_Told]] = []
    for elastic in (False, True):
        if elastic:
            elasticize(model, name if router is None else router)
        _answer(model, tokenizer, samples[-1], first_only=True)  # so that the first time is fair
        told: list[_Told] = []
        for sample in samples:
            what = "elastic" if elastic else "full attention"
            step(f"{sample.task}, {what}", len(samples) * elastic + len(told), 2 * len(samples))
            goes_on = demo.tasks[sample.task].tokens
            told.append(_answer(model, tokenizer, sample, goes_on=goes_on))
        done.append(told)
    way = way_of(model)
    reads = way.sparse.sink + way.sparse.local if isinstance(way.sparse, Streaming) else None
    restore(model)
    answers = []
    for sample, full, own in zip(samples, *done, strict=True):
        one, tokens = own.prefill, sample.start
        head = 2 * model.config.head_dim * model.dtype.itemsize  # bytes of a key and a value
        sparse = int(one.decisions.sum())
        heads = one.decisions.numel()
        read = (heads - sparse) * tokens + sparse * min(tokens, reads or tokens)
        exact = not demo.tasks[sample.task].tokens
        answers.append(
            Answer(
                task=sample.task,
                prompt_tokens=tokens,
                question=_question(tokenizer, sample),
                expected=tokenizer.decode(sample.input_ids[sample.start :][:SHOWN].tolist()),
                text=(own.text, full.text),
                sensitive=sample.sensitive,
                right=(own.right, full.right) if exact else None,
                accuracy=None if exact else (own.accuracy, full.accuracy),
                msr=float(one.msr[0]),
                esr=float(one.esr[0]),
                esr_last_query=float(one.esr_last_query[0]),
                seconds=(own.seconds, full.seconds),
                cache_read=(read * head, heads * tokens * head),
                backend=one.backend,
                decisions=one.decisions[:, 0],
            )
        )
    return answers


def _dtype(name: str) -> str:
    """What is quick: bfloat16 where there are tensor cores, and for all but the tiny model."""
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast or name != "tiny" else "float32"


@dataclass(frozen=True)
class _Told:
    text: str
    right: bool
    accuracy: float
    seconds: float
    prefill: Any


class _FirstToken(BaseStreamer):
    """Notes when the first token of an answer is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, and then with every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last one."""


@torch.no_grad()
def _answer(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    *,
    goes_on: bool = False,
    first_only: bool = False,
) -> _Told:
    prompt = torch.as_tensor(sample.input_ids[: sample.start], device=model.device)[None]
    expected = sample.input_ids[sample.start :].tolist()
    clock = _FirstToken()
    with record() as trace, greedy(model):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=1 if first_only else min(len(expected), SHOWN),
            streamer=clock,
        )
    written = out[0, prompt.shape[1] :].tolist()
    # For a text that goes on: given what comes before, how many of its tokens come first.
    accuracy = score(model, [sample])[0].accuracy if goes_on else 0.0
    return _Told(
        tokenizer.decode(written, skip_special_tokens=True).strip(),
        written == expected,
        accuracy,
        clock.times[1] - clock.times[0],
        trace.passes[0] if trace.passes else None,
    )


def _question(tokenizer: Any, sample: Sample) -> str:
    """The end of the prompt: a question, and the start of its answer if there is one."""
    end = sample.input_ids[max(0, sample.start - 120) : sample.start].tolist()
    words = tokenizer.decode(end, skip_special_tokens=True)
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    if "assistant" in lines:  # the name of a role in a chat template
        place = len(lines) - 1 - lines[::-1].index("assistant")
        return " ".join([lines[place - 1], "|", *lines[place + 1 :]])
    return lines[-1]
