"""Hundreds of requests that come and go in any order: nothing leaks, nothing differs."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from elasticore import Elastic
from elasticore.assets import tiny as assets

from .engines import SamplingParams, TokensPrompt, answers, engine, prompts

BACKBONE = assets() / "backbone"


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["full", "routed"])
def test_five_hundred_requests_with_aborts(prefill: str) -> None:
    from transformers import AutoModelForCausalLM

    rng = random.Random(0)
    lengths = [rng.randint(1, 30) for _ in range(10)] + [rng.randint(31, 400) for _ in range(30)]
    asked = [p for n, p in enumerate(prompts(lengths, 4000)) if lengths.index(lengths[n]) == n]
    backbone = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32).eval()
    way = dataclasses.replace(Elastic.load("tiny"), prefill=prefill)
    with way.on(backbone) as model:
        expected, decided = answers(model, asked, 20)
    known = {len(prompt): own for prompt, own in zip(asked, decided, strict=True)}
    settings = {"num_gpu_blocks_override": 60, "max_model_len": 512, "max_num_seqs": 8}
    with engine(BACKBONE, "tiny", elasticore={"prefill": prefill}, **settings) as served:
        llm = served.llm.llm_engine
        waiting = [rng.randrange(len(asked)) for _ in range(500)]
        running: dict[str, int] = {}
        finished = aborted = 0
        while waiting or running:
            while waiting and len(running) < 16 and rng.random() < 0.7:
                number, name = waiting.pop(), str(len(waiting))
                sampling = SamplingParams(
                    temperature=0, max_tokens=rng.randint(1, 20), ignore_eos=True
                )
                llm.add_request(name, TokensPrompt(prompt_token_ids=asked[number]), sampling)
                running[name] = number
            if running and rng.random() < 0.1:
                gone = rng.choice(sorted(running))
                llm.abort_request([gone])
                del running[gone]
                aborted += 1
            for output in llm.step():
                own = list(output.outputs[0].token_ids)
                number = running.get(output.request_id.split("-")[0])
                if output.finished and number is not None:
                    assert own == expected[number][: len(own)]
                    del running[output.request_id.split("-")[0]]
                    finished += 1
        assert finished + aborted == 500 and aborted > 20
        for length, own in served.decided:
            assert all(torch.equal(own[layer], known[length][layer]) for layer in own)
        scheduler = llm.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert not scheduler.running and not scheduler.waiting
        assert pool.get_num_free_blocks() == 60 - 1  # vLLM keeps one for padding
