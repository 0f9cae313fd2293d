"""The server: concurrent streams, and clients that behave badly."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from elasticore import Elastic
from elasticore.assets import tiny as assets

from .engines import answers, prompts  # first: without vLLM the rest is skipped

# isort: split
from recipes.serving.demo import ask_all
from recipes.serving.server import Server, serve

BACKBONE = assets() / "backbone"
LENGTHS = (40, 900, 333, 64, 1500, 700, 65, 210)
TOKENS = 24


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = {"router": "tiny", "log_requests": True}
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    with serve(BACKBONE, settings, [*arguments, "--max-num-seqs", "4"]) as made:
        yield made


def post(server: Server, body: Any, path: str = "/v1/completions") -> tuple[int, str]:
    """Status and text that a request gets."""
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=120)
    text = body if isinstance(body, str) else json.dumps(body)
    connection.request("POST", path, text, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_eight_streams_at_once(server: Server) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = prompts(LENGTHS, 4000)
    backbone = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32).eval()
    with dataclasses.replace(Elastic.load("tiny"), prefill="full").on(backbone) as model:
        expected, decided = answers(model, asked, TOKENS)
    before = server.metric("elasticore_sparse_share_count")
    done = asyncio.run(ask_all(server, [("", prompt) for prompt in asked], TOKENS))
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    # Text, as a stream brings it; what is between two tokens may wait for the next.
    for one, tokens in zip(done, expected, strict=True):
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        assert one.text and whole.startswith(one.text.rstrip("\ufffd"))
        assert len(one.text) >= len(whole) - 4
    shares = server.shares()
    for prompt, own in zip(asked, decided, strict=True):
        share = torch.stack(list(own.values())).float().mean()
        assert shares[len(prompt)] == pytest.approx(float(share), abs=0.0006)
    assert server.metric("elasticore_sparse_share_count") == before + len(asked)
    assert server.metric("elasticore_prompt_tokens_total") >= sum(LENGTHS)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "model", "prompt": list(range(3, 103)) * 30, "max_tokens": 4}, 400),
        ({"model": "model", "prompt": [], "max_tokens": 4}, 400),
        ({"model": "model", "prompt": "", "max_tokens": 4}, 400),
        ({"model": "model", "prompt": {"no": "text"}}, 400),
        ({"model": "model", "prompt": "a", "max_tokens": -3}, 400),
        ({"model": "another", "prompt": "a"}, 404),
        ('{"model": "model", "prompt": ', 400),
    ],
    ids=["too-long", "no-tokens", "empty", "no-text", "negative", "other-model", "half"],
)
def test_requests_that_are_wrong(server: Server, body: Any, status: int) -> None:
    got, text = post(server, body)
    assert got in (status, 422) and "error" in text.lower(), text
    assert server.lives
    assert post(server, {"model": "model", "prompt": "A word", "max_tokens": 2})[0] == 200


def test_a_client_that_goes_away(server: Server) -> None:
    host = server.url.removeprefix("http://")
    for _ in range(3):
        connection = http.client.HTTPConnection(host, timeout=60)
        body = {"model": "model", "prompt": list(range(3, 903)), "max_tokens": 1000,
                "ignore_eos": True, "stream": True}  # fmt: skip
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.read(20)
        connection.close()
    assert post(server, {"model": "model", "prompt": "A word", "max_tokens": 2})[0] == 200
    for _ in range(100):
        if not server.metric("vllm:num_requests_running"):
            break
        asyncio.run(asyncio.sleep(0.1))
    assert server.metric("vllm:num_requests_running") == 0
    assert server.lives


def test_a_server_with_wrong_settings_says_so_and_ends() -> None:
    with (
        pytest.raises(RuntimeError, match=r"elasticore: .*unknown policy"),
        serve(BACKBONE, {"router": "tiny", "policy": "whole"}),
    ):
        pass
