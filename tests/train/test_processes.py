"""Two processes train as one does on the whole batch: other noise, but the same multipliers."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

import elasticore as ec
from elasticore.router import seed_noise
from elasticore.router.sampling import _straight_through
from elasticore.train import Collator, LagrangianObjective, RouterTrainer, TrainingSample

STEPS = 2


class Samples(torch.utils.data.Dataset[TrainingSample]):
    """Three tasks of random tokens, with answers of different lengths."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> TrainingSample:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 128, (80,), generator=generator)
        labels = torch.full_like(ids, -100)
        learnt = 2 + 3 * (index % 5)
        labels[-learnt:] = ids[-learnt:]
        return TrainingSample(ids, labels, ("a", "b", "c")[index % 7 % 3])


class NoNoise:
    """Decides by the logits alone, so that a sample is routed alike wherever it lies."""

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        """Sample nothing."""
        return _straight_through(logits[..., 1] - logits[..., 0], temperature)


def trained(folder: str, batch_size: int, accumulation: int) -> dict[str, Any]:
    """Train some steps; return every step's gradients, and the multipliers at the end."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=128,
    )
    model = ec.elasticize(Qwen3ForCausalLM(config).eval(), ec.Elastic(sparse=ec.Streaming(16, 16)))
    for router in ec.routers(model):
        router.sampler = NoNoise()  # type: ignore[assignment]
        for parameter in router.parameters():
            parameter.data.normal_(0, 0.5)
    objective = LagrangianObjective({"a": 0.3, "b": 1.0, "c": (0.1, 0.2)}, init=(1.0, 2.0), seed=0)
    if os.environ.get("RANK") == "1":
        objective.lambda1.data.add_(1)  # the first process's count
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
    )
    trainer = RouterTrainer(
        model,
        args,
        objective,
        train_dataset=Samples(),
        collator=Collator(objective.tasks),
        multiplier_lr=0.01,
    )
    gradients: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        named = [*model.named_parameters(), *objective.named_parameters()]
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(note)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    lambdas = torch.stack([objective.lambda1.detach(), objective.lambda2.detach()])
    return {"gradients": gradients, "lambdas": lambdas, "logs": logs, "noise": torch.rand(4)}


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.save(trained(folder, 2, 2), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process with batches of four, and two with batches of two."""
    folder = str(tmp_path_factory.mktemp("processes"))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    two = mp.spawn(process, (port, folder), nprocs=2, join=False)
    one = trained(folder, 4, 2)
    while not two.join():
        pass
    return [one, *(torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1))]


def test_gradients_are_those_of_one_process_with_the_whole_batch(
    runs: list[dict[str, Any]],
) -> None:
    one, *two = runs
    assert len(one["gradients"]) == STEPS
    for step in range(STEPS):
        assert any(float(g.abs().max()) > 0 for g in one["gradients"][step].values())
        for rank in two:
            assert set(rank["gradients"][step]) == set(one["gradients"][step])
            for name, gradient in one["gradients"][step].items():
                # The same terms in another order; float32 rounds at 6e-8 of the largest.
                bound = 2e-5 * float(gradient.abs().max()) + 1e-9
                torch.testing.assert_close(
                    rank["gradients"][step][name], gradient, rtol=0, atol=bound, msg=name
                )


def test_multipliers_stay_the_same_bit_for_bit(runs: list[dict[str, Any]]) -> None:
    one, first, second = runs
    assert torch.equal(first["lambdas"], second["lambdas"])
    torch.testing.assert_close(first["lambdas"], one["lambdas"])


def test_logs_are_of_all_processes(runs: list[dict[str, Any]]) -> None:
    one, first, second = (run["logs"] for run in runs)
    assert first and len(first) == len(one)
    for a, b in zip(one, first, strict=True):
        names = [n for n in a if n in ("lm_loss", "penalty") or n.startswith(("msr/", "lambda"))]
        assert {n: b[n] for n in names} == pytest.approx({n: a[n] for n in names}, rel=1e-4)
    assert second == [] or second[0]["lm_loss"] == first[0]["lm_loss"]


def test_each_process_draws_noise_of_its_own(runs: list[dict[str, Any]]) -> None:
    assert not torch.equal(runs[1]["noise"], runs[2]["noise"])


def test_the_first_rank_draws_what_a_single_process_does() -> None:
    draws = []
    for seed, rank in ((7, 0), (7, 1), (8, 0), (7, 0)):
        seed_noise(seed, rank)
        draws.append(torch.rand(8).tolist())
    torch.manual_seed(7)
    assert draws[0] == draws[3] == torch.rand(8).tolist()
    assert draws[1] != draws[0] and draws[1] != draws[2]


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    from .test_trainer import SMALL, Noise, backbone

    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 2
    model = ec.elasticize(backbone(), SMALL)
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*torchrun --nproc-per-node 2"):
        RouterTrainer(model, args, LagrangianObjective({"robust": 1.0}), train_dataset=Noise())


def test_processes_that_do_not_know_of_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .test_trainer import SMALL, Noise, backbone

    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    assert args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = ec.elasticize(backbone(), SMALL)
    with pytest.raises(ValueError, match=r"launcher has started 2 processes.*ACCELERATE_USE_CPU"):
        RouterTrainer(model, args, LagrangianObjective({"robust": 1.0}), train_dataset=Noise())
