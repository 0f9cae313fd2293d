"""What heads would lose: against dense masks in float64, and modes that lose nothing."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import elasticore as ec
from elasticore.backends.serial import SerialAttention
from elasticore.errors import UnsupportedRequest
from elasticore.eval.analysis import HeadFidelity, head_fidelity, write_csv
from elasticore.eval.analysis.plots import fidelity_picture
from elasticore.eval.tasks import Sample
from elasticore.models.elastic import is_elastic
from elasticore.testing.problems import ScatteredBlocks

LAYERS, HEADS, KV_HEADS, DIM, TOKENS, BLOCK = 2, 4, 2, 8, 90, 16
STREAMING = ec.Elastic(sparse=ec.Streaming(16, 32), block_size=BLOCK)
SELECTED = ec.Elastic(sparse=ScatteredBlocks(0.4), block_size=BLOCK)


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        attn_implementation="eager",
    )
    made = LlamaForCausalLM(config).double().eval()
    for name, parameter in made.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 20  # random attention is flat otherwise
    return made


def sample(length: int = TOKENS, task: str = "made", seed: int = 0) -> Sample:
    ids = np.random.default_rng(seed).integers(0, 64, length + 1)
    return Sample(task, ids, length, length + 1, "", True)


def mask(way: ec.Elastic) -> Tensor:
    """The sparse mode's dense mask, bool [heads, T, T]."""
    token = torch.arange(TOKENS)
    row, key = token[:, None] // BLOCK, token // BLOCK
    if isinstance(way.sparse, ec.Streaming):
        read = ((key < 1) | (key > row - 2)).expand(HEADS, -1, -1)
    else:
        assert isinstance(way.sparse, ec.BlockSelector)
        q = torch.zeros(1, HEADS, TOKENS, DIM)
        segments = ec.SequenceLayout.dense().segments(1, TOKENS, TOKENS, q.device)
        lists = way.sparse.select(q, q, segments, block_size=BLOCK, scale=1)
        blocks = lists.to_mask(-(-TOKENS // BLOCK))[0]
        read = blocks[:, token // BLOCK][..., token // BLOCK]
    return read & (token <= token[:, None])


@pytest.mark.parametrize("way", [STREAMING, SELECTED], ids=["streaming", "selected"])
def test_mass_and_error_are_those_of_dense_masks(way: ec.Elastic) -> None:
    made, one = model(), sample()
    values: list[Tensor] = []
    for layer in made.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda *x: values.append(x[2][0]))
    with torch.no_grad():
        prompt = torch.from_numpy(one.input_ids[None, : one.start])
        attentions = made(prompt, output_attentions=True).attentions
    found = head_fidelity(made, [one], way, rows=TOKENS)
    assert [(f.layer, f.head, f.kv_head) for f in found] == [
        (layer, head, head // 2) for layer in range(LAYERS) for head in range(HEADS)
    ]
    read = mask(way)
    # The pass is the model's own, in float64; rows are computed in float32. A probability is off
    # by what its score is off: a sum of DIM + 3 roundings, where |q·k| is some 30 at most, and by
    # the roundings of a softmax. Outputs are sums of TOKENS such, twice, and are no smaller than
    # a tenth of the values here.
    unit = 2.0**-24
    probability = 2 * (DIM + 3) * 30 * unit + (TOKENS + 4) * unit
    lost = 0.0
    for f in found:
        full = attentions[f.layer][0, f.head]
        v = values[f.layer][:, f.kv_head * DIM : (f.kv_head + 1) * DIM]
        part = full.where(read[f.head], 0)
        assert f.kept_mass == pytest.approx(float(part.sum(-1).mean()), rel=0, abs=probability)
        sparse = part / part.sum(-1, keepdim=True)
        error = ((sparse - full) @ v).norm() / (full @ v).norm()
        assert (full @ v).norm() > 0.1 * v.norm()
        assert f.output_error == pytest.approx(
            float(error), rel=0, abs=2 * 10 * (probability + TOKENS * unit) * (1 + float(error))
        )
        assert math.isnan(f.sparse)
        lost = max(lost, 1 - f.kept_mass)
    assert lost > 0.1
    assert not is_elastic(made)


@pytest.mark.parametrize(
    "way",
    [
        ec.Elastic(sparse=ec.Streaming(16, 96), block_size=BLOCK),
        ec.Elastic(sparse=ScatteredBlocks(1.0), block_size=BLOCK),
    ],
    ids=["streaming", "selected"],
)
def test_a_mode_that_reads_everything_loses_exactly_nothing(way: ec.Elastic) -> None:
    for f in head_fidelity(model(), [sample(), sample(50, seed=1)], way):
        assert (f.kept_mass, f.output_error) == (1.0, 0.0)


def test_the_routers_choice_stands_beside_and_acts_on_later_layers() -> None:
    made, one = model(), sample()
    plain = head_fidelity(made, [one], STREAMING, rows=TOKENS)
    table = [[1, 0], [0, 1]]
    ec.elasticize(made, replace(STREAMING, policy=ec.HeadTable(table)))
    routed = head_fidelity(made, [one], rows=TOKENS)
    assert [f.sparse for f in routed] == [1, 1, 0, 0, 0, 0, 1, 1]
    pairs = list(zip(plain, routed, strict=True))
    assert all(a.kept_mass == b.kept_mass for a, b in pairs[:HEADS])  # the first layer's input
    assert all(a.kept_mass != b.kept_mass for a, b in pairs[HEADS:])
    assert is_elastic(made)
    with pytest.raises(ValueError, match="way must be None for an elastic model"):
        head_fidelity(made, [one], STREAMING)


def test_layers_that_the_model_keeps_inside_a_window_are_left_out() -> None:
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    found = head_fidelity(Gemma3ForCausalLM(config).eval(), [sample()], STREAMING)
    assert [(f.layer, f.head) for f in found] == [(1, head) for head in range(HEADS)]


def test_rows_are_drawn_by_the_seed_and_tasks_kept_apart() -> None:
    made = model()
    samples = [sample(seed=0), sample(seed=1), sample(40, "other", 2)]
    found, again, other = (
        head_fidelity(made, samples, STREAMING, rows=5, seed=seed) for seed in (1, 1, 2)
    )
    numbers = [[(f.kept_mass, f.output_error) for f in run] for run in (found, again, other)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert [f.task for f in found] == ["made"] * 8 + ["other"] * 8
    assert all(f.kept_mass == 1 for f in found[8:]), "40 tokens are inside sink and window"
    every = head_fidelity(made, samples[:2], STREAMING, rows=TOKENS)
    parts = [head_fidelity(made, [one], STREAMING, rows=TOKENS) for one in samples[:2]]
    for both, first, second in zip(every, *parts, strict=True):
        assert both.kept_mass == (first.kept_mass + second.kept_mass) / 2


def test_the_backend_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    made, known = model(), [info.name for info in ec.list_backends()]
    calls = []
    attend = SerialAttention.attend
    monkeypatch.setattr(
        SerialAttention, "attend", lambda *x, **y: calls.append(1) or attend(*x, **y)
    )
    with ec.use_backend("serial"):
        head_fidelity(made, [sample()], STREAMING)
        assert ec.current_backend() == "serial"
    assert len(calls) == LAYERS
    monkeypatch.setattr(SerialAttention, "supports", lambda *x: (False, "not today."))
    ec.list_backends()  # so that it is asked again
    with ec.use_backend("serial"), pytest.raises(UnsupportedRequest, match="not today"):
        head_fidelity(made, [sample()], STREAMING)
    assert ec.current_backend() == "auto"
    assert [info.name for info in ec.list_backends()] == known
    assert not is_elastic(made)


def test_errors_say_what_to_do() -> None:
    made = model()
    with pytest.raises(ValueError, match="at least one sample"):
        head_fidelity(made, [])
    with pytest.raises(ValueError, match="rows must be"):
        head_fidelity(made, [sample()], rows=0)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        head_fidelity(made.train(), [sample()])


def test_rows_survive_a_csv_file_and_are_drawn(tmp_path: Path) -> None:
    found = head_fidelity(model(), [sample(), sample(task="b")], STREAMING)
    path = write_csv([f.row() for f in found], tmp_path / "fidelity.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(HeadFidelity.__dataclass_fields__)
    assert [float(row["output_error"]) for row in rows] == [f.output_error for f in found]
    assert [int(row["kv_head"]) for row in rows[:4]] == [0, 0, 1, 1]
    pytest.importorskip("matplotlib")
    picture = fidelity_picture(found, tmp_path / "fidelity.svg", title="What sparse heads lose")
    assert picture.read_text("utf-8").count('id="axes_') == 2 * 2 + 2  # with two colour bars
