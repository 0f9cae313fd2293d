"""Training with sequence parallelism: the gradients, logs and evaluation of one process."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

import elasticore as ec
from elasticore.train import (
    Collator,
    LagrangianObjective,
    Recipe,
    RouterTrainer,
    TrainingSample,
    checkpoint_layers,
    train,
)
from elasticore.train.sharding import shard_backbone
from elasticore.train.slices import SliceCollator, check_slices, share_batches

from .test_processes import NoNoise

STEPS = 2
CLOSE = 1e-6
"""Losses, pooled keys and gates are in float32, which rounds at 6e-8; all else is in float64."""
RUNS: dict[str, tuple[int, int, str]] = {
    # Processes that share a batch, rows of a batch, what the loss averages over. The first run's
    # backbone is sharded as well; the second one's layers are checkpointed.
    "2 batches of 2 slices": (2, 1, "tokens"),
    "1 batch of 4 slices": (4, 2, "samples"),
}


class Rows(Dataset[tuple[TrainingSample, ...]]):
    """Rows of three samples of different tasks; answers of different lengths, one across a cut."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[TrainingSample, ...]:
        generator = torch.Generator().manual_seed(index)
        samples = []
        for task, length, answer in (("a", 47, 3), ("b", 160 + index, 90), ("c", 61, 2 + index)):
            ids = torch.randint(3, 128, (length,), generator=generator)
            labels = torch.full_like(ids, -100)
            if task == "a" or index % 2:  # or else most slices have nothing to learn
                labels[-answer:] = ids[-answer:]
            samples.append(TrainingSample(ids, labels, task))
        return tuple(samples[index % 3 :] + samples[: index % 3])


def trained(folder: str, sequence_parallel: int, batch_size: int, reduction: Any) -> dict[str, Any]:
    """Train some steps; return every step's gradients, the logs and the loss of an evaluation."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=512,
    )
    model = ec.elasticize(
        Qwen3ForCausalLM(config).double(), ec.Elastic(sparse=ec.Streaming(16, 16))
    )
    for router in ec.routers(model):
        router.calibrate(torch.randn(6, 4, 16))  # type: ignore[operator]
        router.double().sampler = NoNoise()  # type: ignore[assignment]
        for parameter in router.parameters():
            parameter.data.normal_(0, 0.5)
    objective = LagrangianObjective({"a": 0.3, "b": 1.0, "c": (0.1, 0.2)}, init=(1.0, 2.0), seed=0)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
    )
    if sequence_parallel == 4:
        checkpoint_layers(model)
    elif args.world_size > 1:
        shard_backbone(model, "full")
    trainer = RouterTrainer(
        model,
        args,
        objective,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        collator=Collator(objective.tasks, packed=True, reduction=reduction),
        multiplier_lr=0.01,
        sequence_parallel=sequence_parallel,
    )
    gradients: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        named = [*model.named_parameters(), *objective.named_parameters()]
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(note)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    return {
        "gradients": gradients,
        "logs": logs,
        "evaluated": trainer.evaluate()["eval_loss"],
        "noise": torch.rand(4),
    }


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    results = {name: trained(folder, *settings) for name, settings in RUNS.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes found."""
    folder = str(tmp_path_factory.mktemp("four"))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(process, (port, folder), nprocs=4)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(4)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process finds with both rows in a batch."""
    folder = str(tmp_path_factory.mktemp("one"))
    return {name: trained(folder, 1, 2, reduction) for name, (_, _, reduction) in RUNS.items()}


@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_those_of_one_process_with_the_whole_batch(
    run: str, one: dict[str, dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    assert len(one[run]["gradients"]) == STEPS
    for step, expected in enumerate(one[run]["gradients"]):
        assert {"lambda1", "lambda2"} < set(expected)
        for rank in four:
            own = rank[run]["gradients"][step]
            assert set(own) == set(expected)
            for name, gradient in expected.items():
                assert bool(gradient.any())
                bound = CLOSE * float(gradient.abs().max())
                torch.testing.assert_close(own[name], gradient, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("run", RUNS)
def test_logs_and_evaluation_are_those_of_one_process(
    run: str, one: dict[str, dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    expected = one[run]
    assert len(expected["logs"]) == STEPS
    for ours, theirs in zip(four[0][run]["logs"], expected["logs"], strict=True):
        for name in ("loss", "lm_loss", "penalty", "msr/a", "msr/b", "msr/c", "learnt_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    # The Trainer weighs batches that different processes evaluate at once by their learnt tokens.
    close = 1e-5 if run == "1 batch of 4 slices" else 1e-2
    for rank in four:
        assert rank[run]["evaluated"] == pytest.approx(expected["evaluated"], rel=close)


def test_each_process_draws_noise_of_its_own(four: list[dict[str, Any]]) -> None:
    draws = {tuple(rank["1 batch of 4 slices"]["noise"].tolist()) for rank in four}
    assert len(draws) == 4


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_learnt_token_is_in_one_slice_with_what_predicts_it(size: int) -> None:
    collator = Collator(("a", "b", "c"), packed=True)
    rows = [Rows()[0], Rows()[1]]
    whole = collator(rows)
    ids, predicting = whole["input_ids"][0], whole["predicting"]
    found = []
    for rank in range(size):
        part = SliceCollator(collator, rank, size)(rows)
        start, stop, first = part["slice"]
        own = predicting[start:stop]
        assert torch.equal(part["input_ids"][0][own - first], ids[own])
        assert torch.equal(part["position_ids"][0][own - first], whole["position_ids"][0][own])
        assert torch.equal(part["labels"], whole["labels"])
        assert torch.equal(part["cu_seq_lens_q"], whole["cu_seq_lens_q"])
        found.append(own)
    assert torch.equal(torch.cat(found), predicting)


@pytest.mark.parametrize(
    ("size", "processes", "packed", "message"),
    [
        (3, 4, True, r"sequence_parallel must divide.*got 3 with 4; sizes that work: 1, 2, 4"),
        (2, 1, True, r"got 2 with 1; sizes that work: 1.*torchrun"),
        (2, 4, False, r"splits packed batches only; set packed to True"),
        (0, 4, True, r"sequence_parallel must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    size: int, processes: int, packed: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_slices(size, processes, packed)


def test_a_stream_of_samples_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield 1

    with pytest.raises(ValueError, match="a dataset with a length; Stream is iterable"):
        share_batches(DataLoader(Stream()), SimpleNamespace(size=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_parallel": 2}, r"must divide the number of processes, got 2 with 1"),
        ({"sequence_parallel": 0}, r"sequence_parallel must be at least 1, got 0"),
    ],
)
def test_a_recipe_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {"targets": {"code": 1.0}, "data": {"kind": "offline"}, "packed": True} | changes
    with pytest.raises(ValueError, match=message):
        train(Recipe("tiny", **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
