"""The real model, with the routers that ship: the same answers as in transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import elasticore
from elasticore import Elastic
from elasticore.assets import backbone_path
from elasticore.eval.chat_tasks import TASKS
from elasticore.eval.tasks import make_sample

from .engines import answers, engine

ASKED = (("needle", 4000), ("near-fact", 2500), ("two-values", 1200), ("next-line", 800))


@pytest.mark.slow
def test_the_real_model() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = backbone_path("smollm2")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        samples = [make_sample(task, tokenizer, n, 0, tasks=TASKS) for task, n in ASKED]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    asked = [[1], *([int(i) for i in x.input_ids[: x.start]] for x in samples)]
    backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    known = {}
    for prefill in ("full", "routed"):
        way = dataclasses.replace(Elastic.load("smollm2"), prefill=prefill)
        with way.on(backbone) as model:
            known[prefill] = answers(model, asked, 12)
    assert not elasticore.is_elastic(backbone)
    for prefill, (expected, decided) in known.items():
        settings = {"elasticore": {"prefill": prefill}, "max_model_len": 4096}
        with engine(folder, "smollm2", **settings) as served:
            assert served.answer(asked, 12) == expected
            by_length = {len(p): own for p, own in zip(asked, decided, strict=True)}
            for length, own in served.decided:
                for layer, decisions in own.items():
                    assert torch.equal(decisions, by_length[length][layer])
