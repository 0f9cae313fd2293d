"""vLLM engines in the tests' own process, and the same models in transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams, TokensPrompt

import elasticore
from elasticore import Elastic
from elasticore.models.families import attention_layers, is_local
from elasticore.serving.vllm.decisions import Decisions
from elasticore.serving.vllm.report import Report
from elasticore.serving.vllm.step import Step

__all__ = ["Engine", "SamplingParams", "TokensPrompt", "answers", "engine", "prompts"]


class Engine:
    """An engine of vLLM, and what it decided.

    Attributes
    ----------
    decided
        (tokens of the prompt, decisions int8 ``[Hkv]`` by layer) of every prompt, as they ended;
        several of each where vLLM keeps the layers in several groups.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.decided: list[tuple[int, dict[int, Tensor]]] = []

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Greedy answers of ``tokens`` tokens, all prompts at once."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        made = self.llm.generate(asked, sampling, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in made]

    def counter(self, name: str) -> int:
        """The value of one of vLLM's counters."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)


@contextmanager
def engine(
    model: str | Path, way: Elastic | str | Path | None, **settings: Any
) -> Iterator[Engine]:
    """An engine that serves a model in a way; ``elasticore`` holds further settings of ours."""
    ours = settings.pop("elasticore", {})
    if way is not None:
        settings["additional_config"] = {"elasticore": {"router": str(way), **ours}}
    settings = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4} | settings
    made = Engine(LLM(str(model), disable_log_stats=False, **settings))
    original = Report.__call__

    def report(self: Report, step: Step, decisions: Decisions) -> None:
        original(self, step, decisions)
        rows = list(step.ended)
        for number, row in enumerate(rows):
            own = {n: decisions.of(n, step.page[rows])[number].clone() for n in decisions.layers}
            made.decided.append((step.lengths[row], own))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "__call__", report)
        try:
            yield made
        finally:
            made.llm.llm_engine.engine_core.shutdown()


def answers(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int
) -> tuple[list[list[int]], list[dict[int, Tensor]]]:
    """What transformers answers, and what an elastic model decides: int8 ``[Hkv]`` by layer."""
    layers = [int(x.layer_idx) for x in attention_layers(model) if not is_local(x)]
    texts: list[list[int]] = []
    decided: list[dict[int, Tensor]] = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with elasticore.record() as trace:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                eos_token_id=None,
                do_sample=False,
            )
        texts.append(out[0, ids.shape[1] :].tolist())
        if elasticore.is_elastic(model):
            decided.append(dict(zip(layers, trace.decisions[:, 0], strict=True)))
    return texts, decided


def prompts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
