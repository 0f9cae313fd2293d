"""Do several GPUs give the gradients of one? Data parallel, in shards, and with shared sequences.

torchrun --nproc-per-node 2 -m benchmarks.several_gpus \
    --output benchmarks/results/several-gpus.json

Every way trains the routers of a model in the shape of Llama-3.1-8B, with fewer layers and random
weights, on the same packed batches of three tasks, with the library's trainer. The gradients that
the optimizer sees are compared with those of one process that has the whole batch. Routers do not
sample, so that nothing but arithmetic can differ. ``--small`` is a tiny model on CPUs.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import elasticore as ec
from elasticore.machine import environment
from elasticore.train import (
    Collator,
    LagrangianObjective,
    RouterTrainer,
    TrainingSample,
    checkpoint_layers,
)
from elasticore.train.sharding import shard_backbone

TASKS = {"retrieval": 0.3, "code": 1.0, "chat": (0.1, 0.2)}
ROWS, STEPS = 4, 2  # sequences in a packed batch, and optimizer steps
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model and the length of its sequences."""

    dtype: str
    layers: int
    tokens: int  # of a sequence, on average
    vocabulary: int = 128256
    sizes: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
        }
    )
    sparse: ec.Streaming = dataclasses.field(default_factory=ec.Streaming)


SETTINGS = (Setting("float32", 4, 4096), Setting("bfloat16", 16, 8192))
SMALL = Setting(
    "float32",
    2,
    96,
    256,
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    ec.Streaming(16, 16),
)


@dataclasses.dataclass(frozen=True)
class Way:
    """How the work is spread."""

    sharding: Any = "none"
    sequence_parallel: int = 1
    shares_batch: bool = False  # whether every process sees the whole batch


WAYS = {
    "data parallel": Way(),
    "sharded": Way(sharding="full"),
    "sequence parallel": Way(sequence_parallel=2, shares_batch=True),
}
ALONE = Way(shares_batch=True)


class Samples(Dataset[TrainingSample]):
    """Random tokens: sequences of several lengths, three tasks, answers of several lengths."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __len__(self) -> int:
        return ROWS * STEPS

    def __getitem__(self, index: int) -> TrainingSample:
        generator = torch.Generator().manual_seed(index)
        length = self.setting.tokens * (3 + 2 * index % 5) // 5
        ids = torch.randint(3, self.setting.vocabulary, (length,), generator=generator)
        labels = torch.full_like(ids, -100)
        answer = length // 32 * (1 + index % 3)
        labels[-answer:] = ids[-answer:]
        return TrainingSample(ids, labels, tuple(TASKS)[index % 3])


class _Decided:
    """Chooses the likelier mode, with the gradient of its probability; draws nothing."""

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        soft = (logits / temperature).softmax(-1)[..., 1]
        return soft + (soft.round() - soft).detach()


def model_of(setting: Setting, device: torch.device) -> Any:
    """The elastic model, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=setting.layers,
        vocab_size=setting.vocabulary,
        max_position_embeddings=131072,
        **setting.sizes,
    )
    torch.set_default_dtype(getattr(torch, setting.dtype))
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    ec.elasticize(model, ec.Elastic(sparse=setting.sparse))
    for router in ec.routers(model):
        router.sampler = _Decided()
        for parameter in router.parameters():
            # Large weights without biases: heads and sequences differ, and few are close calls.
            if parameter.ndim == 1:
                parameter.data.zero_()
            else:
                parameter.data.normal_(0, 2 / parameter.shape[1] ** 0.5)
    checkpoint_layers(model)
    return model


def train(setting: Setting, way: Way, processes: int, cpu: bool) -> dict[str, Any]:
    """Train in this way; return the gradients of every step, the losses, and what it cost."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS if way.shares_batch else ROWS // processes,
            learning_rate=1e-3,
            max_grad_norm=1e9,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=cpu,
        )
        model = model_of(setting, args.device)
        if way.sharding != "none":
            shard_backbone(model, way.sharding)
        objective = LagrangianObjective(TASKS, init=(1.0, 2.0), seed=0)
        trainer = RouterTrainer(
            model,
            args,
            objective,
            train_dataset=Samples(setting),
            collator=Collator(objective.tasks, packed=True),
            multiplier_lr=0.01,
            sequence_parallel=way.sequence_parallel,
        )
        gradients: list[dict[str, Tensor]] = []

        def note(*_: Any) -> None:
            named = [*model.named_parameters(), *objective.named_parameters()]
            gradients.append({n: p.grad.detach().cpu() for n, p in named if p.grad is not None})

        trainer.create_optimizer().register_step_pre_hook(note)
        gc.collect()
        memory: dict[str, float] = {}
        if not cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            memory["weights_gb"] = torch.cuda.memory_allocated() / 1e9
        start = time.perf_counter()
        with ec.use_backend("serial" if cpu else "triton"):
            trainer.train()
        if not cpu:
            memory["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        logged = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
        return {
            "gradients": gradients,
            "losses": [entry["lm_loss"] for entry in logged],
            "msr": [{k: v for k, v in entry.items() if k.startswith("msr/")} for entry in logged],
            "seconds": time.perf_counter() - start,
            **memory,
        }


def apart(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> dict[str, Any]:
    """How far gradients are apart, the worst over the steps."""
    found: dict[str, Any] = {"bits": True}
    for kind in ("routers", "multipliers"):
        norms, largest = [], []
        for a, b in zip(ours, theirs, strict=True):
            if set(a) != set(b):
                raise RuntimeError(f"gradients of {sorted(set(a) ^ set(b))} are missing.")
            names = [n for n in a if n.startswith("lambda") == (kind == "multipliers")]
            one, two = (torch.cat([x[n].double().flatten() for n in names]) for x in (a, b))
            norms.append(float((one - two).norm() / two.norm()))
            largest.append(float((one - two).abs().max() / two.abs().max()))
            found["bits"] &= all(torch.equal(a[n], b[n]) for n in names)
        found[kind] = {"norm": max(norms), "largest": max(largest)}
    return found


def alone(settings: list[Setting], cpu: bool, folder: Path) -> list[dict[str, Any]]:
    """What one process finds, started without the launcher's variables."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHED and not name.startswith(("TORCHELASTIC", "GROUP_", "ROLE_"))
    }
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    env["CUDA_VISIBLE_DEVICES"] = "" if cpu else first
    file = folder / "alone.pt"
    command = [sys.executable, "-m", "benchmarks.several_gpus", "--alone", str(file)]
    subprocess.run([*command, *["--small"] * cpu], env=env, check=True, stdout=subprocess.DEVNULL)
    return list(torch.load(file))


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    small: Annotated[bool, typer.Option("--small", help="A tiny model, on CPUs.")] = False,
    alone_to: Annotated[Path | None, typer.Option("--alone", hidden=True)] = None,
) -> None:
    """Train in every way, compare, print the table."""
    settings = [SMALL] if small else list(SETTINGS)
    if alone_to is not None:
        torch.save([train(setting, ALONE, 1, small) for setting in settings], alone_to)
        return
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun --nproc-per-node 2 -m benchmarks.several_gpus")
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if small:
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    ones = []
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            ones = alone(settings, small, Path(folder))
    results: dict[str, Any] = {}
    for place, setting in enumerate(settings):
        found = {}
        for name, way in WAYS.items():
            found[name] = train(setting, way, processes, small)
            gc.collect()
        if rank == 0:
            results[setting.dtype] = _compared(ones[place], found)
    device = torch.device("cpu" if small else "cuda")
    dist.destroy_process_group()
    if rank:
        return
    report = {
        "what": "gradients on several processes against those of one with the whole batch",
        **environment(device),
        "command": f"torchrun --nproc-per-node {processes} -m benchmarks.several_gpus",
        "settings": {setting.dtype: dataclasses.asdict(setting) for setting in settings},
        "processes": processes,
        "results": results,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _show(results)


def _compared(one: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Per way, how far it is from one process, and what it cost."""
    compared = {"one process": {k: v for k, v in one.items() if k != "gradients"}}
    for name, own in found.items():
        compared[name] = {k: v for k, v in own.items() if k != "gradients"} | {
            "against_one": apart(own["gradients"], one["gradients"]),
            "against_data_parallel": apart(own["gradients"], found["data parallel"]["gradients"]),
        }
    return compared


def _show(results: dict[str, Any]) -> None:
    shown = Table("dtype", "way", title="Gradients against those of one process")
    for heading in ("routers", "λ", "largest", "bits of data parallel", "weights GB", "peak GB"):
        shown.add_column(heading, justify="right")
    for dtype, ways in results.items():
        for name, own in ways.items():
            gigabytes = [f"{own[k]:.1f}" if k in own else "" for k in ("weights_gb", "peak_gb")]
            if name == "one process":
                shown.add_row(dtype, name, "", "", "", "", *gigabytes)
                continue
            far, same = own["against_one"], own["against_data_parallel"]["bits"]
            shown.add_row(
                dtype,
                name,
                f"{far['routers']['norm']:.1e}",
                f"{far['multipliers']['norm']:.1e}",
                f"{far['routers']['largest']:.1e}",
                "yes" if same else "no",
                *gigabytes,
            )
    Console(width=120).print(shown)


if __name__ == "__main__":
    typer.run(main)
