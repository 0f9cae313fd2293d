"""Scores are those of greedy generation, and routing never sees the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import elasticore as ec
from elasticore.eval.tasks import Sample
from elasticore.eval.teacher_forced import score


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def sample(model: LlamaForCausalLM, seed: int, right: bool, length: int = 90) -> Sample:
    """A prompt whose answer is what the model itself would write, or that with a wrong end."""
    prompt = torch.randint(1, 64, (1, length), generator=torch.Generator().manual_seed(seed))
    ids = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].numpy()
    if not right:
        ids = ids.copy()
        ids[-1] = (ids[-1] + 1) % 64
    return Sample("task", ids.astype(np.int64), length, length + 6, "", True)


def test_correct_is_what_greedy_decoding_writes(model: LlamaForCausalLM) -> None:
    right, wrong = score(model, [sample(model, 1, True), sample(model, 1, False)], batch_size=2)
    assert right.correct
    assert right.accuracy == 1
    assert not wrong.correct
    assert wrong.accuracy == pytest.approx(5 / 6)
    assert right.msr == 0  # no routers, nothing sparse


@pytest.mark.parametrize("elastic", [True, False])
def test_batches_and_order_change_nothing(model: LlamaForCausalLM, elastic: bool) -> None:
    whole = [sample(model, seed, seed % 2 == 0, 80 + seed % 3) for seed in range(9)]
    samples = [  # answers of one to six tokens, beside each other
        replace(one, input_ids=one.input_ids[: one.stop - cut], stop=one.stop - cut)
        for one, cut in zip(whole, [0, 2, 5, 0, 1, 3, 4, 0, 5], strict=True)
    ]
    if elastic:
        ec.elasticize(model, ec.Elastic(ec.Router(boundary=20), sparse=ec.Streaming(16, 16)))
    alone = [score(model, [one])[0] for one in samples]
    batches: list[int] = []
    together = score(
        model, samples, batch_size=4, progress=lambda b: [*b, batches.append(len(b))][:-1]
    )
    assert batches[0] == (3 if elastic else 7)  # shapes, without a mask
    for a, b in zip(alone, together, strict=True):
        assert (a.correct, a.accuracy, a.msr, a.esr) == (b.correct, b.accuracy, b.msr, b.esr)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)


def test_what_is_given_of_an_answer_does_not_count(model: LlamaForCausalLM) -> None:
    right = sample(model, 4, True)
    cut = replace(right, start=right.start - 3, given=3)
    alone, with_given = score(model, [right])[0], score(model, [right, cut], batch_size=2)[1]
    assert (with_given.correct, with_given.accuracy) == (alone.correct, alone.accuracy)
    assert with_given.loss == pytest.approx(alone.loss, rel=1e-5)
    assert not score(model, [replace(cut, given=0)])[0].correct  # random tokens


def test_loss_is_the_cross_entropy_of_the_answer(model: LlamaForCausalLM) -> None:
    one = sample(model, 3, False)
    ids = torch.as_tensor(one.input_ids)[None]
    labels = ids.clone()
    labels[:, : one.start] = -100
    with torch.no_grad():
        expected = float(model(ids, labels=labels).loss)
    assert score(model, [one])[0].loss == pytest.approx(expected, rel=1e-5)


def test_routing_does_not_depend_on_the_answer(model: LlamaForCausalLM) -> None:
    right, wrong = sample(model, 5, True), sample(model, 5, False)
    ec.elasticize(model, ec.Elastic(ec.Router(boundary=4), sparse=ec.Streaming(16, 16)))
    with ec.record() as trace:
        a, b = score(model, [right, wrong], batch_size=1)
    assert a.msr == b.msr
    # The prompt's pass decides, the answer's goes on with that.
    assert [one.decided for one in trace.passes] == [True, False] * 2
    length = right.stop - right.start
    assert [one.queries.item() for one in trace.passes] == [right.start, length - 1] * 2
    assert torch.equal(trace.passes[1].decisions, trace.passes[0].decisions)


def test_an_answer_of_one_token(model: LlamaForCausalLM) -> None:
    one = sample(model, 7, True)
    short = Sample("task", one.input_ids[: one.start + 1], one.start, one.start + 1, "", True)
    result = score(model, [short])[0]
    assert (result.correct, result.accuracy) == (True, 1.0)
