"""Threads that run one elastic model at the same time do not see each other's prompts."""

from __future__ import annotations

import sys
import threading

import torch

import elasticore

from .tiny import elastic, tiny, tokens


def test_threads_share_a_model() -> None:
    model = elastic(tiny())
    prompts = [tokens(1, 60, seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(prompt).logits for prompt in prompts]
    assert not torch.equal(expected[0], expected[1])
    failures: list[object] = []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                with torch.no_grad(), elasticore.record() as trace:
                    logits = model(prompts[index]).logits
                if not torch.equal(logits, expected[index]) or len(trace.passes) != 1:
                    failures.append(index)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds: threads take turns inside every pass
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
