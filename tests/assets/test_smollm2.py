"""The real model with the routers that ship, where it was fetched."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import elasticore as ec
from elasticore.assets.fetched import smollm2
from elasticore.data.prompting import chat_tokens
from elasticore.eval.chat_tasks import TASKS
from elasticore.eval.tasks import make_sample
from elasticore.eval.teacher_forced import score
from elasticore.eval.texts import speeches
from elasticore.models.generating import greedy
from elasticore.models.loading import load_backbone

LENGTH = 2048


@pytest.fixture(scope="module")
def model_and_tokenizer() -> Any:
    try:
        smollm2()
        speeches("heldout")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return load_backbone("smollm2", "float32")


def test_it_answers_elastic_as_well(model_and_tokenizer: Any) -> None:
    model, tokenizer = model_and_tokenizer
    ids = torch.tensor([chat_tokens(tokenizer, "What is the capital of France?")])
    ids = ids.to(model.device)
    for on in (nullcontext(), ec.Elastic.load("smollm2").on(model)):
        with on, torch.no_grad(), greedy(model):
            answer = model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
        assert "Paris" in tokenizer.decode(answer)


def test_the_routers_tell_far_from_near(model_and_tokenizer: Any) -> None:
    """The same question, and its answer far back or close by."""
    model, tokenizer = model_and_tokenizer
    samples = [
        make_sample(task, tokenizer, LENGTH, seed, tasks=TASKS)
        for task in ("needle", "near-needle")
        for seed in range(2)
    ]
    with ec.Elastic.load("smollm2").on(model):
        far, near = (score(model, samples[at : at + 2], batch_size=2) for at in (0, 2))
    assert all(one.correct for one in (*far, *near))
    # At 4,096 tokens the means over 200 samples are .50 and .88.
    assert min(one.msr for one in near) - max(one.msr for one in far) > 0.1
