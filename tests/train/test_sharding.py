"""Processes that share one frozen backbone train its routers as those with a whole one do."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import elasticore as ec
from elasticore.models.loading import load_backbone
from elasticore.router import FixedPolicy
from elasticore.train import Collator, LagrangianObjective, Recipe, RouterTrainer, checkpoint_layers
from elasticore.train.run import train
from elasticore.train.sharding import check_sharding, shard_backbone

from .test_processes import NoNoise, Samples

STEPS = 2
WAYS = ("none", "full", "hybrid")
RECIPE = Recipe(
    backbone="tiny",
    targets={"needle": 0.5},
    data={"kind": "offline", "tasks": {"needle": 1}, "length": 256},
    elastic={"sparse": {"name": "streaming", "sink": 32, "local": 64}},
    max_steps=1,
    accumulation=1,
    checkpointing=True,
    sharding="full",
)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=42,  # the halves of its matrices are not equally large
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def trained(
    folder: str, sharding: str, batch_size: int, *, resume: str | None = None
) -> dict[str, Any]:
    """Train some steps; return what they gave, and which parameters are split."""
    elastic = ec.elasticize(model(), ec.Elastic(sparse=ec.Streaming(16, 16)))
    for router in ec.routers(elastic):
        router.sampler = NoNoise()  # type: ignore[assignment]
        for parameter in router.parameters():
            parameter.data.normal_(0, 0.5)
    checkpoint_layers(elastic)
    objective = LagrangianObjective({"a": 0.3, "b": 1.0, "c": (0.1, 0.2)}, init=(1.0, 2.0), seed=0)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
    )
    assert args.device.type == "cpu"  # and the processes know of each other
    shard_backbone(elastic, sharding)  # type: ignore[arg-type]
    trainer = RouterTrainer(
        elastic,
        args,
        objective,
        train_dataset=Samples(),
        collator=Collator(objective.tasks),
        multiplier_lr=0.01,
    )
    gradients: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        named = [*elastic.named_parameters(), *objective.named_parameters()]
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(note)
    trainer.train(resume_from_checkpoint=resume)
    split = {n: p for n, p in elastic.named_parameters() if isinstance(p, DTensor)}
    return {
        "gradients": gradients,
        "routers": [p.detach().clone() for r in ec.routers(elastic) for p in r.parameters()],
        "lambdas": torch.stack([objective.lambda1.detach(), objective.lambda2.detach()]),
        "split": sorted(split),
        "kept": sum(p.to_local().numel() for p in split.values()),
    }


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",  # two processes on the CPU, also where there is a GPU
    }
    found = {}
    for way in WAYS:
        # For hybrid, as if each process were on a node of its own.
        os.environ["LOCAL_WORLD_SIZE"] = "1" if way == "hybrid" else "2"
        found[way] = trained(f"{folder}/{way}", way, 2)
    found["resumed"] = trained(f"{folder}/again", "full", 2, resume=f"{folder}/full/checkpoint-1")
    torch.save(found, f"{folder}/rank{rank}.pt")
    for policy in ("elastic", "duo"):
        train(replace(RECIPE, policy=policy), f"{folder}/{policy}")  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder; what one process found with the whole batch; and what two found, in every way."""
    folder = tmp_path_factory.mktemp("sharding")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    two = mp.spawn(process, (port, str(folder)), nprocs=2, join=False)
    one = trained(str(folder / "one"), "none", 4)
    while not two.join():
        pass
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))
    for way, found in first.items():
        for name in ("routers", "lambdas"):  # all processes end with the same
            assert all(map(torch.equal, found[name], second[way][name])), (way, name)
    return folder, one, first


@pytest.mark.parametrize("way", ["full", "hybrid"])
def test_sharded_steps_are_those_of_whole_models_bit_for_bit(runs: Any, way: str) -> None:
    _, one, two = runs
    assert len(one["gradients"]) == STEPS
    for step in range(STEPS):
        assert any(float(g.abs().max()) > 0 for g in one["gradients"][step].values())
        whole, sharded = two["none"]["gradients"][step], two[way]["gradients"][step]
        assert set(sharded) == set(whole) == set(one["gradients"][step])
        assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    assert all(map(torch.equal, two[way]["routers"], two["none"]["routers"]))
    assert torch.equal(two[way]["lambdas"], two["none"]["lambdas"])


def test_and_those_of_one_process_with_the_whole_batch(runs: Any) -> None:
    _, one, two = runs
    for name, gradient in one["gradients"][0].items():
        # A sample's own part may round otherwise in a batch of four than in one of two: 2⁻⁸ is
        # half a unit of bfloat16, in which the backbone computes.
        bound = 2**-8 * float(gradient.abs().max()) + 1e-9
        torch.testing.assert_close(
            two["full"]["gradients"][0][name], gradient, rtol=0, atol=bound, msg=name
        )


def test_matrices_of_layers_are_split_and_nothing_else(runs: Any) -> None:
    _, one, two = runs
    assert one["split"] == two["none"]["split"] == []
    parameters = dict(model().named_parameters())
    expected = sorted(n for n, p in parameters.items() if ".layers." in n and p.ndim == 2)
    assert two["full"]["split"] == two["hybrid"]["split"] == expected
    total = sum(parameters[name].numel() for name in expected)
    assert two["full"]["kept"] == total // 2
    assert two["hybrid"]["kept"] == total  # alone on its node


def test_a_sharded_runs_checkpoint_loads_into_a_whole_model(runs: Any) -> None:
    folder, _, two = runs
    checkpoint = folder / "full" / f"checkpoint-{STEPS}"
    assert not list(checkpoint.glob("model*")) + list(checkpoint.glob("pytorch_model*"))
    whole = ec.elasticize(model(), checkpoint)  # which compares the backbone's fingerprint
    loaded = [p for router in ec.routers(whole) for p in router.parameters()]
    assert all(map(torch.equal, loaded, two["full"]["routers"]))


def test_a_sharded_run_resumes_bit_for_bit(runs: Any) -> None:
    _, _, two = runs
    assert len(two["resumed"]["gradients"]) == STEPS - 1
    assert all(map(torch.equal, two["resumed"]["routers"], two["full"]["routers"]))
    assert torch.equal(two["resumed"]["lambdas"], two["full"]["lambdas"])


@pytest.mark.parametrize("policy", ["elastic", "duo"])
def test_a_recipe_shards(runs: Any, policy: str) -> None:
    folder, _, _ = runs
    whole, _ = load_backbone("tiny", "bfloat16")
    kind = ec.AttentionRouter if policy == "elastic" else FixedPolicy
    loaded = ec.routers(ec.elasticize(whole, folder / policy / "router"))
    assert all(isinstance(one, kind) for one in loaded)


@pytest.mark.parametrize(
    ("sharding", "processes", "here", "message"),
    [
        ("zero3", 2, "2", "sharding must be one of none, full, hybrid, got 'zero3'"),
        (True, 2, "2", "sharding must be one of none, full, hybrid, got True"),
        ("full", 1, "1", "there is one process"),
        ("hybrid", 4, "", "LOCAL_WORLD_SIZE is ''"),
        ("hybrid", 4, "3", "LOCAL_WORLD_SIZE is '3' with 4 processes"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    sharding: Any, processes: int, here: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    with pytest.raises(ValueError, match=message):
        check_sharding(sharding, processes)


def test_ways_that_fit_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for sharding, processes in (("none", 1), ("full", 3), ("hybrid", 4), ("hybrid", 8)):
        check_sharding(sharding, processes)


def test_a_model_that_is_not_elastic_or_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="model is not elastic"):
        shard_backbone(model())
    with pytest.raises(ValueError, match="there is one process"):
        shard_backbone(ec.elasticize(model()))
