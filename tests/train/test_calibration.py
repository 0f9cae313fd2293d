"""Routers that start by seeing how a prompt differs from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elasticore as ec
from elasticore.layout import SequenceLayout
from elasticore.models.elastic import routers
from elasticore.models.loading import load_backbone
from elasticore.router import AttentionRouter, pool_boundary
from elasticore.train import OfflineTasks, Recipe, TrainingSample
from elasticore.train.calibration import pooled_keys
from elasticore.train.run import train

LENGTH = 384


def router(heads: int = 3, dim: int = 16) -> tuple[AttentionRouter, Tensor]:
    torch.manual_seed(0)
    means = 5 * torch.randn(1, heads, dim)
    return AttentionRouter(dim), means + 0.05 * torch.randn(40, heads, dim)


def test_inputs_differ_as_much_as_heads_once_calibrated() -> None:
    made, pooled = router()
    assert torch.equal(made.calibrated(pooled), pooled), "a router as the paper has it"
    made.calibrate(pooled)
    read = made.calibrated(pooled)
    torch.testing.assert_close(read.std(0), torch.ones(3, 16), rtol=1e-3, atol=0)
    mean = pooled.mean(0)
    torch.testing.assert_close(read.mean(0), mean / mean.std(), rtol=0, atol=2e-3)


def test_what_never_changes_stays_finite() -> None:
    made, pooled = router()
    made.calibrate(pooled[:1].expand(4, -1, -1))
    assert bool(made.calibrated(pooled).isfinite().all())


@pytest.mark.parametrize(
    ("pooled", "message"),
    [
        (torch.zeros(1, 3, 16), r"at least two inputs, got \[1, 3, 16\]"),
        (torch.zeros(4, 3, 8), r"\[inputs, kv_heads, 16\]"),
        (torch.full((4, 3, 16), torch.nan), "must be finite"),
    ],
)
def test_what_cannot_calibrate_is_refused(pooled: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router()[0].calibrate(pooled)


def test_a_part_of_the_heads_reads_its_own() -> None:
    made, pooled = router()
    made.calibrate(pooled)
    whole = made.logits(pooled)
    made.first_head = 1
    assert torch.equal(made.logits(pooled[:, 1:]), whole[:, 1:])


def test_pooled_keys_are_those_of_prompts_with_full_attention() -> None:
    model, _ = load_backbone("tiny")
    ids = torch.randint(5, 4000, (LENGTH,), generator=torch.Generator().manual_seed(0))
    samples: list[Any] = [
        TrainingSample(one, torch.where(torch.arange(LENGTH) < 300, -100, one), "a")
        for one in (ids, ids.flip(0))
    ]
    samples[1] = (samples[1],)
    found = pooled_keys(model, samples, 2, 20)
    assert not ec.is_elastic(model)
    seen: list[Tensor] = []

    def keep(norm: object, args: object, keys: Tensor) -> None:
        segments = SequenceLayout.dense().segments(1, 300, 300, keys.device)
        seen.append(pool_boundary(keys, segments, 20))

    handle = model.model.layers[0].self_attn.k_norm.register_forward_hook(keep)
    model(ids[None, :300].to(model.device))
    handle.remove()
    torch.testing.assert_close(found[0][:1], seen[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="wants 3 samples, but there are 2"):
        pooled_keys(model, samples, 3, 20)


def test_a_recipe_calibrates_and_its_file_holds_that(tmp_path: Path) -> None:
    recipe = Recipe(
        backbone="tiny",
        targets={"needle": 0.5, "code": 1.0},
        data={"kind": "offline", "tasks": {"needle": 1, "code": 1}, "length": LENGTH},
        elastic={
            "policy": {"name": "router", "boundary": 20},
            "sparse": {"name": "streaming", "sink": 32, "local": 64},
            "block_size": 32,
        },
        calibration=4,
        max_steps=1,
        accumulation=4,
        dtype="float32",
        save_steps=1,
        report_to=[],
    )
    folder = train(recipe, tmp_path / "run")
    model, tokenizer = load_backbone("tiny")
    data = OfflineTasks(tokenizer, recipe.data["tasks"], LENGTH, 4)
    pooled = pooled_keys(model, data, 4, 20)
    ec.elasticize(model, folder)
    for made, keys in zip(routers(model), pooled, strict=True):
        expected = AttentionRouter(made.head_dim, device=keys.device)  # type: ignore[arg-type]
        expected.calibrate(keys)
        torch.testing.assert_close(made.scale, expected.scale)
        torch.testing.assert_close(made.shift, expected.shift)
    again = train(recipe, tmp_path / "run", resume=tmp_path / "run" / "checkpoint-1")
    assert again == folder


def test_static_patterns_are_not_calibrated() -> None:
    with pytest.raises(
        ValueError, match="calibration takes at least 2 samples, and policy elastic"
    ):
        Recipe(backbone="tiny", targets={}, data={}, policy="duo", calibration=8)
