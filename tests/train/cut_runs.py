"""Runs that end in the middle, in processes of their own; started by the tests beside this."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

import elasticore as ec
from elasticore.assets import tiny
from elasticore.data import TokenSequence
from elasticore.data.layouts import Header
from elasticore.data.writer import PackedWriter
from elasticore.train import (
    Collator,
    JsonLines,
    LagrangianObjective,
    OfflineTasks,
    PackedSamples,
    RouterTrainer,
    TrainingSample,
    resuming,
)

TARGETS = {"needle": 0.7, "code": 1.0}
FORKSERVER = mp.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__])


class Tokens(Dataset[TrainingSample]):
    """Random tokens of two lengths; notes which samples it was asked for."""

    def __init__(self, count: int = 22) -> None:
        self.count, self.asked = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> TrainingSample:
        self.asked.append(index)
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 128, (48 if index % 3 else 64,), generator=generator)
        labels = torch.where(torch.arange(len(ids)) < len(ids) - 8, -100, ids)
        return TrainingSample(ids, labels, ("needle", "code")[index % 2])


def dataset(kind: str, folder: Path) -> tuple[Dataset[Any], int]:
    """A data set of a kind, and its vocabulary."""
    if kind == "tokens":
        return Tokens(), 128
    if kind == "offline":
        tokenizer = AutoTokenizer.from_pretrained(tiny() / "backbone")
        return OfflineTasks(tokenizer, {"needle": 1, "code": 1}, 256, 22), len(tokenizer)
    rows = [Tokens()[index] for index in range(22)]
    if kind == "jsonl":
        file = folder / "data.jsonl"
        if not file.exists():
            lines = [
                {"task": r.task, "input_ids": r.input_ids.tolist(), "labels": r.labels.tolist()}
                for r in rows
            ]
            file.write_text("\n".join(map(json.dumps, lines)))
        return JsonLines(file, None, 64), 128
    packed = folder / "packed"
    if not packed.exists():
        packed.mkdir()
        writer = PackedWriter(packed, Header(128, tuple(TARGETS), ("mine",), None))
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            writer.add(
                [
                    TokenSequence(
                        np.asarray(one.input_ids, np.int32),
                        np.asarray(one.labels, np.int32),
                        one.task,
                        "mine",
                    )
                    for one in (first, second)
                ]
            )
        writer.close()
    return PackedSamples(packed, None), 128


class At(TrainerCallback):
    """Does something in the middle of an optimizer step."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def kill_while_saving() -> None:
    """Let the next checkpoint be cut when everything of it is written, but not renamed."""
    resuming.commit = lambda *_: kill()  # type: ignore[assignment]


def trainer_in(
    folder: Path,
    kind: str = "tokens",
    callbacks: tuple[TrainerCallback, ...] = (),
    data: Dataset[Any] | None = None,
    **changes: Any,
) -> RouterTrainer:
    """Three batches of one or two samples to a step, saved every two steps, logged every three."""
    torch.manual_seed(0)
    made, vocabulary = dataset(kind, folder.parent)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=vocabulary,
        max_position_embeddings=256,
    )
    model = ec.elasticize(Qwen3ForCausalLM(config).eval(), ec.Elastic(sparse=ec.Streaming(16, 16)))
    objective = LagrangianObjective(TARGETS, seed=0)
    settings = {
        "output_dir": str(folder),
        "max_steps": 7,
        "per_device_train_batch_size": 1 if kind == "packed" else 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "logging_steps": 3,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_multiprocessing_context": "fork"
        if changes.get("dataloader_num_workers")
        else None,
        "lr_scheduler_type": "cosine",
    }
    return RouterTrainer(
        model,
        TrainingArguments(**{**settings, **changes}),
        objective,
        train_dataset=made if data is None else data,
        collator=Collator(objective.tasks, packed=kind == "packed"),
        multiplier_lr=0.05,
        callbacks=callbacks,
    )


def child(
    folder: Path, resume: Any, cut: tuple[int, int, int] | None, settings: dict[str, Any]
) -> None:
    """Train; ``cut`` is the step, the rank and the signal, or 0 to be killed in the next save."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    log = open(folder.parent / f"log-{os.environ.get('RANK', '0')}", "w")  # noqa: SIM115
    os.dup2(log.fileno(), 2)
    callbacks: tuple[TrainerCallback, ...] = ()
    if cut is not None and int(os.environ.get("RANK", "0")) == cut[1]:
        callbacks = (At(cut[0], (lambda: kill(cut[2])) if cut[2] else kill_while_saving),)
    trainer_in(folder, callbacks=callbacks, **settings).train(resume_from_checkpoint=resume)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _ranked(rank: int, port: int, *arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    child(*arguments)


def train(
    folder: Path,
    resume: Any = None,
    cut: tuple[int, int, int] | None = None,
    processes: int = 1,
    **settings: Any,
) -> list[int]:
    """Run :func:`child` in new processes; return their exit codes."""
    folder.mkdir(exist_ok=True)
    arguments = (folder, resume, cut, settings)
    if processes == 1:
        started = [FORKSERVER.Process(target=child, args=arguments)]
    else:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        started = [
            FORKSERVER.Process(target=_ranked, args=(rank, port, *arguments))
            for rank in range(processes)
        ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{folder}: a process did not end in a minute")
    return [int(process.exitcode or 0) for process in started]


def what_is_in(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint that a run's course decides, without clock times."""
    found: dict[str, Any] = {}
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors":
            found[file.name] = file.read_bytes()
        elif file.suffix in (".pt", ".pth"):
            found[file.name] = plain(torch.load(file, weights_only=False))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    found["log"] = [
        {k: v for k, v in entry.items() if k not in ("tokens_per_second", "train_runtime")}
        for entry in state["log_history"]
    ]
    return found


def plain(value: Any) -> Any:
    """Tensors and arrays as lists, so that equality is exact; without clock times."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "seconds"}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
