"""A whole training step of a model with random weights, through the real trainer."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import elasticore as ec
from benchmarks.training.blended import PEERS
from benchmarks.training.measuring import (
    NO_MEMORY,
    clear,
    console,
    peak_memory,
    reason,
    rounded,
)
from benchmarks.training.sizes import OURS, Sizes
from benchmarks.training.timed import PHASES, Stopwatch, Timed
from elasticore.bench.cases import tokens as written

__all__ = ["Forced", "llama", "spread", "step", "steps"]

NO_STEP: dict[str, Any] = {
    "seconds": None,
    "tokens_per_second": None,
    "first_step_seconds": None,
    "attention_seconds": dict.fromkeys(PHASES),
    "attention_share": None,
    "memory": NO_MEMORY,
}
"""What is known of a step that failed."""


@dataclass(frozen=True)
class Forced:
    """A sampler whose decisions are given, with the gradient of the soft ones."""

    streams: Tensor

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        """The gate ``[sequences, kv_heads]``."""
        soft = (logits / temperature).softmax(-1)[..., 1]
        return self.streams.to(soft) + (soft - soft.detach())


def spread(count: int, share: float) -> Tensor:
    """Which of ``count`` heads stream: a share of them, evenly spread. Bool ``[count]``."""
    steps = torch.floor(torch.arange(count + 1, dtype=torch.float64) * share + 1e-9)
    return steps.diff() > 0


class Text(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Random tokens, all of them learnt: the most that the loss can cost."""

    def __init__(self, sizes: Sizes, length: int) -> None:
        self.sizes, self.length = sizes, length

    def __len__(self) -> int:
        return self.sizes.steps

    def __getitem__(self, index: int) -> Any:
        from elasticore.train import TrainingSample

        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.sizes.vocabulary, (self.length,), generator=generator)
        return TrainingSample(ids, ids.clone(), "text")


def llama(sizes: Sizes, length: int, device: torch.device) -> Any:
    """A Llama with random weights, made where it is used."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, sizes.dtype), attn_implementation="sdpa"
        )


def step(
    model: Any, sizes: Sizes, length: int, backend: str, device: torch.device
) -> dict[str, Any]:
    """Train for some steps; the figures of all but the first, which compiles."""
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    from elasticore.train import LagrangianObjective, RouterTrainer, checkpoint_layers

    sparse = ec.Streaming(sizes.sink, sizes.local)
    torch.manual_seed(0)
    ec.elasticize(model, ec.Elastic(sparse=sparse, block_size=sizes.block_size))
    streams = spread(sizes.layers * sizes.kv_heads, sizes.share).to(device)
    for router, row in zip(ec.routers(model), streams.view(sizes.layers, -1), strict=True):
        router.sampler = Forced(row)  # type: ignore[assignment]
    checkpoint_layers(model)
    Timed.inner, Timed.stopwatch = backend, Stopwatch(device)
    clock = Clock(device, Timed.stopwatch)

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    with tempfile.TemporaryDirectory() as folder:
        trainer = RouterTrainer(
            model,
            TrainingArguments(
                folder,
                max_steps=sizes.steps,
                per_device_train_batch_size=1,
                logging_steps=sizes.steps,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=device.type == "cpu",
            ),
            LagrangianObjective({"text": sizes.share}, seed=0),
            train_dataset=Text(sizes, length),
            callbacks=[Steps()],
        )
        trainer.remove_callback(PrinterCallback)
        with ec.use_backend(Timed.name):
            trainer.train()
    seconds = statistics.median(one["seconds"] for one in clock.steps[1:])
    attention = {
        phase: rounded(statistics.median(one["attention"][phase] for one in clock.steps[1:]))
        for phase in PHASES
    }
    (logged,) = (entry for entry in trainer.state.log_history if "lm_loss" in entry)
    return {
        "tokens": length,
        "seconds": rounded(seconds),
        "tokens_per_second": rounded(length / seconds),
        "first_step_seconds": rounded(clock.steps[0]["seconds"]),
        "attention_seconds": attention,
        "attention_share": rounded(sum(attention.values()) / seconds),
        "memory": clock.steps[-1]["memory"],
        "lm_loss": rounded(logged["lm_loss"]),
        "msr": rounded(logged["msr/text"]),
    }


class Clock:
    """What the steps of a training took."""

    def __init__(self, device: torch.device, stopwatch: Stopwatch) -> None:
        self.device, self.stopwatch = device, stopwatch
        self.steps: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Wait for the device, and start."""
        self.memory = peak_memory(self.device)
        self.peak = self.memory.__enter__()
        self.started = time.perf_counter()

    def end(self) -> None:
        """Wait for the device, and note."""
        self.memory.__exit__(None, None, None)
        taken = time.perf_counter() - self.started
        self.steps.append(
            {"seconds": taken, "attention": self.stopwatch.seconds(), "memory": self.peak}
        )


def steps(sizes: Sizes, ours: str, device: torch.device) -> dict[str, Any]:
    """Every engine's step; one that runs out of memory tries again with half of the tokens."""
    model = llama(sizes, sizes.tokens, device)
    found: dict[str, Any] = {}
    names = {OURS: ours} | {peer.name: peer.name for peer in PEERS}
    for name, backend in track(names.items(), "step", console=console):
        for length in (sizes.tokens, sizes.tokens // 2):
            again = False
            try:
                one = step(model, sizes, length, backend, device)
            except Exception as error:  # the others are still worth comparing
                again = isinstance(error, torch.OutOfMemoryError)
                one = {**NO_STEP, "tokens": length, "failed": reason(error)}
            if ec.is_elastic(model):
                ec.restore(model)
            found.setdefault(written(length), {})[name] = one
            clear(device)
            if not again:
                break
    return found
