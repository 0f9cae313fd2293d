"""What one request cost: how sparsely it was read, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elasticore.models.elastic import is_elastic
from elasticore.models.recording import Trace, record

__all__ = ["Measures", "measured"]


@dataclass(frozen=True)
class Measures:
    """Of one request; those of time and memory are its batch's.

    Attributes
    ----------
    prompt_tokens, new_tokens
        Padding is not counted, nor what follows the end of the answer.
    msr, esr, esr_last_query
        Ω_MSR and both Ω_ESR of the prompt's prefill; 0 for a model that is not elastic.
    decisions
        Per elastic layer, a character for each KV head: 1 = sparse. Empty if not elastic.
    first_token_seconds
        Until the prompt was read.
    tokens_per_second
        New tokens of this request over the time after its first one; None with only one.
    peak_gb
        Highest memory of the GPU, model included; None on a CPU.
    batch_size
        Prompts of the batch.
    backend
        What ran the attention; transformers' name of it for a model that is not elastic.
    """

    prompt_tokens: int
    new_tokens: int
    msr: float
    esr: float
    esr_last_query: float
    decisions: tuple[str, ...]
    first_token_seconds: float
    tokens_per_second: float | None
    peak_gb: float | None
    batch_size: int
    backend: str


class _Batch:
    """What is seen of one batch while it is generated."""

    def __init__(self, trace: Trace, backend: str) -> None:
        self.trace, self.backend = trace, backend
        self.seconds: list[float] = []

    def rows(self, lengths: Tensor, new_tokens: list[int]) -> list[Measures]:
        """One entry per row of the batch, from prompt lengths and the counts of new tokens."""
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        first, rest = self.seconds[0], sum(self.seconds[1:])
        prefill = self.trace.prefill if self.trace.passes else None
        found = []
        for row, (length, new) in enumerate(zip(lengths.tolist(), new_tokens, strict=True)):
            sparsity: dict[str, Any] = {"msr": 0.0, "esr": 0.0, "esr_last_query": 0.0}
            decisions: tuple[str, ...] = ()
            if prefill is not None:
                sparsity = {name: float(getattr(prefill, name)[row]) for name in sparsity}
                layers = prefill.decisions[:, row].tolist()
                decisions = tuple("".join(map(str, layer)) for layer in layers)
            found.append(
                Measures(
                    prompt_tokens=length,
                    new_tokens=new,
                    **sparsity,
                    decisions=decisions,
                    first_token_seconds=first,
                    tokens_per_second=(new - 1) / rest if new > 1 and rest else None,
                    peak_gb=peak,
                    batch_size=len(new_tokens),
                    backend=self.backend if prefill is None else prefill.backend,
                )
            )
        return found


@contextmanager
def measured(model: PreTrainedModel) -> Iterator[_Batch]:
    """Watch ``model`` generate one batch; the device is waited for around every pass.

    Parameters
    ----------
    model
        A causal language model, elastic or not.
    """
    begun = 0.0
    device = model.device
    backend: str = model.config._attn_implementation

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(*_: Any) -> None:
        nonlocal begun
        begun = wait()

    def after(*_: Any) -> None:
        batch.seconds.append(wait() - begun)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    hooks = [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after, always_call=False),
    ]
    try:
        if is_elastic(model):
            with record() as trace:
                batch = _Batch(trace, backend)
                yield batch
        else:
            batch = _Batch(Trace(), backend)
            yield batch
    finally:
        for hook in hooks:
            hook.remove()
