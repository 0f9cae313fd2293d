"""The analyses: known scores on models made by hand, rows that survive a CSV file, pictures."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import elasticore as ec
from elasticore.eval.analysis import (
    ALL_TASKS,
    Activations,
    frequency_rows,
    progressive_sparsification,
    ranked_table,
    retrieval_scores,
    router_activations,
    routing_frequency,
    similarity_rows,
    task_similarity,
    write_csv,
)
from elasticore.eval.analysis import sparsification as sparsification_module
from elasticore.eval.analysis.plots import (
    retrieval_picture,
    similarity_picture,
    sparsification_picture,
)
from elasticore.eval.ruler_like import make_ruler_sample
from elasticore.eval.tasks import Sample, make_sample
from elasticore.models.elastic import is_elastic, routers
from elasticore.models.loading import load_backbone

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def small(family=LlamaForCausalLM, config=LlamaConfig, **settings):
    torch.manual_seed(0)
    model = family(config(**SIZES, **settings)).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 20  # random attention is flat otherwise
    return model


def sample(length=40, start=35, evidence=((3, 7), (20, 22)), task="made"):
    ids = np.random.default_rng(1).integers(0, 64, length)
    return Sample(task, ids, start, length, "", True, evidence)


@pytest.fixture(scope="module")
def shipped():
    return load_backbone("tiny")


# ---- Retrieval scores ----


@pytest.mark.parametrize("rows", ["last", "answer"])
def test_flat_attention_scores_the_evidences_share_of_the_prompt(rows):
    model = small()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    scores = retrieval_scores(model, [sample(), sample(evidence=((0, 1),))], rows)
    seen = [35] if rows == "last" else [35, 36, 37, 38, 39]  # tokens that each row attends to
    share = np.mean([np.mean([n / row for row in seen]) for n in (6, 1)])
    # A row is a sum of at most 40 rounded quotients of about 1/40: 40 roundings of 2⁻²⁴.
    torch.testing.assert_close(
        scores.heads, torch.full((2, 4), float(share)).double(), rtol=0, atol=40 * 2**-24
    )


@pytest.mark.parametrize(
    ("family", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)]
)
def test_scores_are_those_of_the_whole_attention_matrix(family, config):
    model = small(family, config, attn_implementation="eager")
    one = sample()
    prompt = torch.from_numpy(one.input_ids[None, : one.start])
    with torch.no_grad():
        attentions = model(prompt, output_attentions=True).attentions
    wanted = torch.stack([a[0, :, -1, [3, 4, 5, 6, 20, 21]].sum(-1) for a in attentions])
    scores = retrieval_scores(model, [one])
    assert wanted.max() - wanted.min() > 0.1
    # Both are float32 softmaxes of the same scores, which differ by the order of their sums.
    torch.testing.assert_close(scores.heads.float(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.kv_heads, scores.heads.unflatten(1, (2, 2)).mean(2))
    assert scores.layers == (0, 1)


def test_layers_inside_a_window_are_left_out():
    model = small(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    scores = retrieval_scores(model, [sample()])
    assert scores.layers == (1,)
    assert scores.heads.shape == (1, 4)


def test_the_model_is_as_it_was():
    model = small()
    one = sample()
    ids = torch.from_numpy(one.input_ids[None])
    with torch.no_grad():
        before, implementation = model(ids).logits, model.config._attn_implementation
        retrieval_scores(model, [one])
        with pytest.raises(ValueError, match="'bare' has no evidence"):
            retrieval_scores(model, [one, sample(evidence=(), task="bare")])
        assert model.config._attn_implementation == implementation
        assert torch.equal(model(ids).logits, before)


def test_retrieval_errors_say_what_to_do():
    model = small()
    with pytest.raises(ValueError, match="rows must be 'last' or 'answer', got 'all'"):
        retrieval_scores(model, [sample()], "all")
    with pytest.raises(ValueError, match="at least one sample"):
        retrieval_scores(model, [])
    ec.elasticize(model)
    with pytest.raises(ValueError, match=r"restore\(model\) first"):
        retrieval_scores(model, [sample()])


# ---- Progressive sparsification ----


def test_ranked_table_keeps_the_highest_scores():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.0, 0.2], [0.4, 0.5, 0.5, 0.05, 0.01]])
    for msr in range(11):
        table = ranked_table(scores, msr / 10)
        assert int(table.sum()) == msr  # floor((1 - 0.9) * 10) has to be 1
        if msr < 10:
            assert not (table & (scores > scores[~table].min())).any()
    assert ranked_table(scores, 0.9).tolist() == [[1, 0, 1, 1, 1], [1] * 5]
    assert ranked_table(scores, 0.8).tolist() == [[1, 0, 1, 1, 1], [1, 0, 1, 1, 1]]  # first of two
    assert int(ranked_table(scores, 0.15).sum()) == 2  # the kept number is rounded down
    with pytest.raises(ValueError, match="msr"):
        ranked_table(scores, 1.5)


def test_answers_live_in_the_heads_that_score_high(shipped):
    model, tokenizer = shipped
    samples = [make_sample("needle", tokenizer, 384, seed) for seed in range(4)]
    samples.append(make_sample("code", tokenizer, 384, 0))
    scores = retrieval_scores(model, samples[:4]).kv_heads
    way = ec.Elastic(sparse=ec.Streaming(sink=32, local=32))
    said: list[str] = []
    steps = progressive_sparsification(
        model, samples, scores, ratios=[0.75, 1], way=way, batch_size=4, step=said.append
    )
    assert not is_elastic(model)
    assert [(s.msr, s.sparse_heads, s.task) for s in steps] == [
        (msr, heads, task)
        for msr, heads in [(0, 0), (0.75, 24), (1, 32)]
        for task in ("needle", "code")
    ]
    needle = {step.msr: step for step in steps if step.task == "needle"}
    assert needle[0].score == needle[0.75].score == 1
    assert needle[0].retention == needle[0.75].retention == 100
    assert needle[1].retention < 50
    assert said[1] == "Ω_MSR = 0.75: 24 of 32 heads sparse"
    wrong = progressive_sparsification(model, samples[:4], -scores, ratios=[0.75], way=way)
    assert wrong[-1].score < 0.5


def test_a_failing_step_leaves_the_model_restored(monkeypatch):
    model = small()

    def fail(*args, **settings):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sparsification_module, "score", fail)
    with pytest.raises(RuntimeError):
        progressive_sparsification(model, [sample()], torch.zeros(2, 2))
    assert not is_elastic(model)


# ---- Routing frequency ----


def test_frequency_is_the_share_of_a_tasks_prompts():
    first, second = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, 0]])
    decisions = [("a", first.to(torch.int8)), ("a", second), ("b", ("11", "00"))]
    found = routing_frequency(decisions)
    assert list(found) == ["a", "b", ALL_TASKS]
    assert found["a"].tolist() == [[0, 0.5], [1, 0.5]]
    assert found["b"].tolist() == [[1, 1], [0, 0]]
    assert found[ALL_TASKS].tolist() == [[0.5, 0.75], [0.5, 0.25]]
    assert list(routing_frequency(decisions[:2])) == ["a"]
    assert frequency_rows(found, layer_offset=3)[1] == {
        "task": "a",
        "layer": 3,
        "kv_head": 1,
        "sparse": 0.5,
    }
    with pytest.raises(ValueError, match="one model"):
        routing_frequency([*decisions, ("c", ("111", "000"))])
    with pytest.raises(ValueError, match="one model"):
        routing_frequency([])


# ---- Task similarity ----


def test_similarity_by_hand():
    vectors = {"u": torch.tensor([[10.0, 1.0]]), "v": torch.tensor([[10.0, -1.0]])}
    plain = task_similarity(vectors, rescaled=False)
    assert plain[0, 1] == pytest.approx(99 / 101, rel=1e-12)
    # Both features have the same size after rescaling: (1, 1) and (1, -1).
    rescaled = task_similarity(vectors, epsilon=0)
    assert rescaled.tolist() == [[1, pytest.approx(0, abs=1e-15)], [pytest.approx(0, abs=1e-15), 1]]
    # The centroid counts, whatever the number of prompts of a task.
    more = {"u": torch.tensor([[10.0, 3.0], [10.0, -1.0]]), "v": vectors["v"]}
    assert task_similarity(more, rescaled=False)[1, 0] == pytest.approx(99 / 101, rel=1e-12)


def test_activations_are_what_the_router_decides_by(shipped):
    model, tokenizer = shipped
    samples = [make_sample("needle", tokenizer, 300, 0), make_sample("code", tokenizer, 300, 0)]
    samples.append(make_ruler_sample("niah_single_2", tokenizer, 400, 0))
    samples.append(make_sample("code", tokenizer, 310, 1))
    ec.elasticize(model, "tiny")
    try:
        found = router_activations(model, samples, layer=4)
        router = routers(model)[4]
        assert list(found.before) == ["needle", "code", "niah_single_2"]
        assert found.before["code"].shape == found.after["code"].shape == (2, 4 * 32)
        for task, row, one in [("needle", 0, 0), ("code", 0, 1), ("code", 1, 3)]:
            ids = torch.from_numpy(samples[one].input_ids[None, : samples[one].start]).to(
                model.device
            )
            with ec.record() as trace, torch.no_grad():
                model(ids, use_cache=False)
                logits = router.router_mlp(found.after[task][row].view(4, 32).to(model.device))
            decided = (logits[:, 1] >= logits[:, 0]).cpu()
            assert torch.equal(decided, trace.decisions[4, 0].bool().cpu())
        assert not router._forward_pre_hooks
        with pytest.raises(ValueError, match="layer must be from 0 to 7, got 8"):
            router_activations(model, samples, layer=8)
    finally:
        ec.restore(model)
    ec.elasticize(model, ec.Elastic(ec.HeadTable(torch.ones(8, 4, dtype=torch.bool))))
    try:
        with pytest.raises(TypeError, match="got a FixedPolicy"):
            router_activations(model, samples)
    finally:
        ec.restore(model)


# ---- Rows and pictures ----


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_survive_a_csv_file(tmp_path):
    scores = retrieval_scores(small(), [sample()])
    rows = read(write_csv(scores.rows(), tmp_path / "deep" / "scores.csv"))
    assert [(r["layer"], r["head"], r["kv_head"]) for r in rows[:4]] == [
        ("0", "0", "0"),
        ("0", "1", "0"),
        ("0", "2", "1"),
        ("0", "3", "1"),
    ]
    assert [float(r["score"]) for r in rows] == scores.heads.flatten().tolist()
    step = sparsification_module.Step(0.5, 2, "a, b", 0.25, 1 / 3, math.nan)
    (row,) = read(write_csv([step.row()], tmp_path / "steps.csv"))
    assert (row["task"], float(row["loss"])) == ("a, b", 1 / 3)
    assert math.isnan(float(row["retention"]))
    vectors = {"u": torch.ones(1, 2), "v": -torch.ones(2, 2)}
    rows = read(write_csv(similarity_rows(Activations(vectors, vectors)), tmp_path / "sim.csv"))
    assert len(rows) == 2 * 2 * 4
    assert list(rows[1].values())[:4] == ["before", "rescaled", "u", "v"]
    matrix = task_similarity(vectors).flatten().tolist()
    assert [float(r["similarity"]) for r in rows[:4]] == matrix
    with pytest.raises(ValueError, match="at least one row"):
        write_csv([], tmp_path / "none.csv")
    with pytest.raises(ValueError, match="must have the keys"):
        write_csv([{"a": 1}, {"b": 2}], tmp_path / "none.csv")


def test_pictures(tmp_path):
    scores = retrieval_scores(small(), [sample()])
    steps = [
        sparsification_module.Step(msr, 0, task, 0.5, 1.0, 100 * (1 - msr) if task == "a" else 90.0)
        for msr in (0.0, 0.5, 1.0)
        for task in ("a", "b")
    ]
    vectors = {"u": torch.ones(1, 2), "v": -torch.ones(2, 2)}
    axes = {
        retrieval_picture(scores, tmp_path / "deep" / "r.svg", title="scores"): 3,
        sparsification_picture(steps, tmp_path / "s.svg", sensitive={"a": True, "b": False}): 1,
        similarity_picture(Activations(vectors, vectors), tmp_path / "t.svg"): 5,
    }
    for path, count in axes.items():
        assert path.read_text("utf-8").count('id="axes_') == count
    lost = [sparsification_module.Step(0.0, 0, "a", 0.0, 1.0, math.nan)]
    with pytest.raises(ValueError, match="steps must hold a task"):
        sparsification_picture(lost, tmp_path / "none.png")
