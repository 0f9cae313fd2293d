"""The router, the trainer and the demo run over every backend, and none of them notices which."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

import elasticore as ec
from elasticore.backends import registry
from elasticore.backends.registry import BACKENDS
from elasticore.backends.typical import example_request
from elasticore.demo import run_demo
from elasticore.train import Collator, LagrangianObjective, RouterTrainer, TrainingSample

pytestmark = pytest.mark.usefixtures("example")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ec.Elastic(sparse=ec.Streaming(16, 32))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[*BACKENDS.built_in, "example"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that is available here; the others are skipped with their reason."""
    info = next(info for info in ec.list_backends() if info.name == request.param)
    if not info.available:
        pytest.skip(f"{info.name}: {info.reason}")
    return info.name


def dtype_of(backend: str, **needs: Any) -> torch.dtype:
    """The most exact dtype in which a backend supports what is needed; skips without one."""
    for dtype in DTYPES:
        request = example_request(
            device=torch.device(DEVICE), dtype=dtype, head_dim=32, block_size=16, **needs
        )
        verdict = registry.instance(backend).supports(request)
        if verdict.ok:
            return dtype
    pytest.skip(f"{backend}: {verdict.reason}")


def backbone(dtype: torch.dtype) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=128,
        max_position_embeddings=256,
    )
    return Qwen3ForCausalLM(config).eval().to(DEVICE, dtype)


def generate(backend: str, dtype: torch.dtype) -> ec.Trace:
    """Two prompts, one padded on the left, with routers of random weights that decide both ways."""
    model = ec.elasticize(backbone(dtype), SMALL)
    generator = torch.Generator().manual_seed(7)
    for router in ec.routers(model):
        for parameter in router.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.6
            parameter.data.copy_(drawn)
    prompt = torch.randint(3, 128, (2, 90), generator=generator).to(DEVICE)
    mask = torch.ones_like(prompt)
    mask[0, :30] = 0
    with ec.use_backend(backend), ec.record() as trace, torch.no_grad():
        model.generate(
            prompt, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0
        )
    return trace


def test_a_model_routes_and_generates_over_it(backend: str) -> None:
    dtype = dtype_of(backend, layout="padded", sequences=2)
    dtype_of(backend, layout="padded", sequences=2, queries=1)
    ours, reference = generate(backend, dtype), generate("serial", dtype)
    assert [one.backend for one in ours.passes] == [backend] * 2
    # The first layer's router has seen no attention yet. In 16 bits a later one may be close.
    layers = slice(None) if dtype is torch.float32 else slice(1)
    assert torch.equal(ours.decisions[layers], reference.decisions[layers])
    assert 0 < float(ours.decisions.double().mean()) < 1


class Noise(Dataset[TrainingSample]):
    """Two tasks of random tokens; the last eight are learnt."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> TrainingSample:
        ids = torch.randint(
            3, 128, (60 + 9 * index,), generator=torch.Generator().manual_seed(index)
        )
        labels = torch.full_like(ids, -100)
        labels[-8:] = ids[-8:]
        return TrainingSample(ids, labels, ("robust", "sensitive")[index % 2])


def train(backend: str, dtype: torch.dtype, folder: Path, packed: bool) -> tuple[float, Tensor]:
    """The loss of one step, and what it made of the routers' weights."""
    model = ec.elasticize(backbone(dtype), SMALL)
    objective = LagrangianObjective({"robust": 1.0, "sensitive": 0.3}, seed=0)
    trainer = RouterTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=5e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=DEVICE == "cpu",
        ),
        objective,
        train_dataset=Noise(),
        collator=Collator(objective.tasks, packed=packed),
        multiplier_lr=0.05,
    )
    before = weights(model)
    with ec.use_backend(backend):
        trainer.train()
    (loss,) = (entry["lm_loss"] for entry in trainer.state.log_history if "lm_loss" in entry)
    return loss, weights(model) - before


def weights(model: Any) -> Tensor:
    return torch.cat(
        [p.detach().float().flatten() for r in ec.routers(model) for p in r.parameters()]
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_routers_train_over_it(backend: str, packed: bool, tmp_path: Path) -> None:
    layout = "packed" if packed else "padded"
    dtype = dtype_of(backend, layout=layout, sequences=2, gradients=True)
    loss, step = train(backend, dtype, tmp_path / "ours", packed)
    assert bool(step.isfinite().all())
    assert bool((step != 0).any())
    expected, _ = train("serial", dtype, tmp_path / "serial", packed)
    # The loss of 128 equally likely tokens is 4.85; rounding moves it in its last digits.
    assert loss == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 1e-2)


def test_the_demo_runs_over_it(backend: str) -> None:
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton's interpreter takes minutes for it.")
    dtype_of(backend)
    with ec.use_backend(backend):
        (answer,) = run_demo(prompts=[("needle", 256, 0)])
    assert answer.backend == backend
    assert answer.right == (True, True)
