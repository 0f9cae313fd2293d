"""A published static pattern becomes routers that a model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import elasticore
from elasticore.models.static import convert_pattern
from elasticore.router import write_duo, write_prulong

from .tiny import tiny, tokens

SCORES = torch.tensor([[0.1, 0.9], [0.4, 0.2], [1.0, 0.6]])


def decisions(model: Any) -> list[list[int]]:
    return [policy.decisions.tolist() for policy in elasticore.routers(model)]


def test_a_duoattention_pattern_runs(tmp_path: Path) -> None:
    pattern = write_duo(tmp_path / "pattern", SCORES, 16, 32)
    backbone = tiny()
    before = backbone(tokens(2, 80)).logits
    done = convert_pattern(pattern, tmp_path / "router", backbone, sparsity=1 / 3)
    assert torch.equal(backbone(tokens(2, 80)).logits, before)
    assert (done.config.sink, done.config.local, done.config.block_size) == (16, 32, 16)
    model = elasticore.load_router(tiny(), done.path)
    assert decisions(model) == [[1, 0], [0, 1], [0, 0]]
    with elasticore.record() as trace:
        model.generate(tokens(1, 80), max_new_tokens=2, do_sample=False)
    assert trace.msr.tolist() == pytest.approx([1 / 3])


def test_without_a_share_gates_below_one_half_stream(tmp_path: Path) -> None:
    pattern = write_duo(tmp_path / "pattern", SCORES, 128, 256)
    done = convert_pattern(pattern, tmp_path / "router", tiny())
    assert done.sparse.tolist() == [[True, False], [True, True], [False, False]]
    assert done.config.block_size == 128


def test_a_prulong_mask_has_the_sizes_of_its_paper(tmp_path: Path) -> None:
    mask = write_prulong(tmp_path / "masks_sp0.5.tsv", SCORES < 0.5)
    done = convert_pattern(mask, tmp_path / "router", tiny())
    assert torch.equal(done.sparse, SCORES < 0.5)
    assert (done.config.sink, done.config.local) == (128, 1024)
    other = convert_pattern(mask, tmp_path / "router", tiny(), sink=64, local=192)
    assert (other.config.local, other.config.block_size) == (192, 64)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (SCORES[:, :1], {}, "1 KV heads per layer; model has 2"),
        (SCORES[:2], {}, r"one module per elastic layer \(3\), got 2"),
        (SCORES, {"local": 100}, "must be multiples of 16"),
        (SCORES, {"sparsity": 1.5}, "msr must be from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    scores: torch.Tensor, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pattern = write_duo(tmp_path / "pattern", scores, 16, 32)
    backbone = tiny()
    with pytest.raises(ValueError, match=message):
        convert_pattern(pattern, tmp_path / "router", backbone, **options)
    assert not elasticore.is_elastic(backbone)
    assert not (tmp_path / "router").exists()
