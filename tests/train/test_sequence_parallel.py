"""A model whose tokens lie on several processes computes what one process with all of them does."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import elasticore
from elasticore import Elastic, Pass, Router, Streaming
from elasticore.models.parallel import SequenceParallel, slice_tokens
from elasticore.router import model_msr
from elasticore.router.sampling import _straight_through
from elasticore.train import checkpoint_layers
from tests.models.tiny import HALF, elastic, spread, tiny, tokens

LENGTHS = (90, 301, 180)
"""The second spans the cut between two slices, and its first and last 100 tokens lie on either
side; the others are pooled whole. Together 571 tokens, an odd number."""
TOTAL = sum(LENGTHS)
CLOSE = 1e-6
"""Everything is in float64 but pooled keys and gates, which round at 6e-8; what they pass on is
added in another order. A gradient that misses a part, or counts one twice, is off by far more."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # family, settings of the model, settings of the routing
    "llama": ("llama", {}, {}),
    "checkpointed": ("llama", {}, {}),
    "phi3": ("phi3", {}, {}),  # keys are a slice of what is tapped
    "olmo2": ("olmo2", {}, {}),
    "whole sequences pooled": ("qwen3", {}, {"policy": Router(boundary=None)}),
    "selected heads": ("llama", {}, {"sparse": HALF}),
}


class NoNoise:
    """Decides by the logits alone: processes draw noise of their own."""

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        """Sample nothing."""
        return _straight_through(logits[..., 1] - logits[..., 0], temperature)


def made(family: str, settings: dict[str, Any], routing: dict[str, Any]) -> Any:
    way = Elastic(**{"sparse": Streaming(16, 32), "block_size": 16, **routing})
    model = spread(elasticore.elasticize(tiny(family, **settings).double(), way))
    for router in elasticore.routers(model):
        router.double().sampler = NoNoise()  # type: ignore[assignment]
    return model.train()


def batch() -> dict[str, Tensor]:
    cumulative = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return {
        "input_ids": tokens(1, TOTAL),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
    }


def weights() -> Tensor:
    """What each hidden state counts for in the loss, ``[T, hidden size]``: some tokens nothing."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(TOTAL, 64, generator=generator, dtype=torch.float64)
    return drawn * (torch.arange(TOTAL) % 3 == 0)[:, None]


def penalty(msr: Tensor) -> Tensor:
    return (torch.tensor([1.0, -2.0, 3.0]) * msr + msr**2).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alone(case: tuple[str, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """One process with all tokens and heads."""
    model, one = made(*case), Pass()
    hidden = model.base_model(**batch(), use_cache=False, elastic=one)[0][0]
    routings = one.routings
    loss = (hidden * weights()).sum()
    (loss + penalty(model_msr(routings))).backward()
    return {
        "hidden": hidden.detach(),
        "decisions": [routing.decisions for routing in routings],
        "msr": model_msr(routings).detach(),
        "loss": loss.detach(),
        "gradients": gradients(model),
    }


def together(
    case: tuple[str, dict[str, Any], dict[str, Any]], checkpointed: bool = False
) -> dict[str, Any]:
    """This process's slice; gradients are averaged, as DDP does."""
    model, parallel = made(*case), SequenceParallel()
    parallel.attach(model)
    if checkpointed:
        checkpoint_layers(model)
    inputs = batch()
    for name in ("input_ids", "position_ids"):
        inputs[name] = parallel.slice(inputs[name])
    one = Pass()
    hidden = model.base_model(**inputs, use_cache=False, elastic=one)[0][0]
    routings = one.routings
    own = (hidden * parallel.slice(weights().T).T).sum()
    loss, msr = parallel.mean(own * parallel.size), parallel.mean(model_msr(routings))
    (loss + penalty(msr)).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= parallel.size
    return {
        "hidden": hidden.detach(),
        "decisions": [routing.decisions for routing in routings],
        "msr": msr.detach(),
        "loss": loss.detach(),
        "gradients": gradients(model),
    }


def swapped(parallel: SequenceParallel) -> dict[str, Any]:
    """The exchange by itself, in every dtype that a backbone may have."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
        mine = parallel.slice(whole.transpose(2, 3)).transpose(2, 3).requires_grad_()
        heads = parallel.to_heads(mine)
        back = parallel.to_tokens(heads)
        (back * 2).sum().backward()
        expected = whole.chunk(parallel.size, 1)[parallel.rank]
        results[str(dtype)] = (
            torch.equal(heads, expected),
            torch.equal(back, mine),
            bool((mine.grad == 2).all()),
        )
    return results


def errors(parallel: SequenceParallel) -> dict[str, str]:
    """What is refused, before anything is sent."""

    def said(attempt: Callable[[], Any]) -> str:
        try:
            attempt()
        except ValueError as error:
            return str(error)
        return "nothing"

    model = made(*CASES["llama"])
    parallel.attach(model)
    inputs = batch() | {"use_cache": False}
    half = inputs | {n: parallel.slice(inputs[n]) for n in ("input_ids", "position_ids")}
    two = {n: half[n].expand(2, -1) for n in ("input_ids", "position_ids")}

    def recorded() -> None:
        with elasticore.record():
            model(**half)

    return {
        "cache": said(lambda: model(**half | {"use_cache": True})),
        "generate": said(lambda: model.generate(half["input_ids"], max_new_tokens=2)),
        "lengths": said(lambda: model(**half | {"cu_seq_lens_q": None})),
        "positions": said(lambda: model(**half | {"position_ids": None})),
        "rows": said(lambda: model(**half | two)),
        "record": said(recorded),
        "window": said(lambda: parallel.attach(made("gemma3_text", {}, {}))),
        "policy": said(lambda: parallel.attach(elastic(tiny()))),
        "not elastic": said(lambda: parallel.attach(tiny())),
        "heads": said(
            lambda: parallel.attach(
                made(
                    "llama",
                    {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
                    {},
                )
            )
        ),
    }


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results: dict[str, Any] = {n: together(c, n == "checkpointed") for n, c in CASES.items()}
    results |= {"swapped": swapped(SequenceParallel()), "errors": errors(SequenceParallel())}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(process, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def check(one: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Assert that processes computed what one with the whole batch did."""
    decided = torch.cat(one["decisions"])
    assert 0 < int(decided.sum()) < decided.numel()  # some heads are sparse, and some are not
    for layer, decisions in enumerate(one["decisions"]):
        shares = [part["decisions"][layer] for part in parts]
        assert torch.equal(torch.cat(shares, 1), decisions)
    hidden = torch.cat([part["hidden"] for part in parts])[:TOTAL]
    torch.testing.assert_close(hidden, one["hidden"], rtol=0, atol=1e-9)
    assert one["gradients"] and any(bool(g.any()) for g in one["gradients"].values())
    for part in parts:
        torch.testing.assert_close(part["loss"], one["loss"], rtol=1e-9, atol=0)
        torch.testing.assert_close(part["msr"], one["msr"], rtol=1e-6, atol=0)
        assert set(part["gradients"]) == set(one["gradients"])
        for name, gradient in one["gradients"].items():
            bound = CLOSE * float(gradient.abs().max())
            torch.testing.assert_close(
                part["gradients"][name], gradient, rtol=0, atol=bound, msg=name
            )


@pytest.mark.parametrize("case", CASES)
def test_two_slices_compute_what_one_process_does(case: str, two: list[dict[str, Any]]) -> None:
    check(alone(CASES[case]), [part[case] for part in two])


def test_recomputing_changes_no_bit(two: list[dict[str, Any]]) -> None:
    for part in two:
        plain, recomputed = part["llama"]["gradients"], part["checkpointed"]["gradients"]
        assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


def test_tokens_and_heads_change_places_and_come_back(two: list[dict[str, Any]]) -> None:
    for part in two:
        assert part["swapped"] == dict.fromkeys(part["swapped"], (True, True, True))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cache", "use_cache must be False"),
        ("generate", "use_cache must be False"),
        ("lengths", "cu_seq_lens_q is missing"),
        ("positions", "position_ids is missing"),
        ("rows", "a batch of 2 rows"),
        ("record", "record() sees the heads of its own process only"),
        ("window", "1 layers inside a sliding window"),
        ("policy", "policy ByContent"),
        ("not elastic", "model is not elastic"),
        ("heads", "3 KV heads; sizes that work: 1, 3."),
    ],
)
def test_what_cannot_work_is_refused(case: str, message: str, two: list[dict[str, Any]]) -> None:
    for part in two:
        assert message in part["errors"][case]


def test_processes_are_needed() -> None:
    with pytest.raises(ValueError, match=r"group needs torch\.distributed.*torchrun"):
        SequenceParallel()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_slices_are_equally_long_and_lose_nothing(size: int) -> None:
    ids = torch.arange(1, 12)[None]
    slices = [slice_tokens(ids, rank, size) for rank in range(size)]
    assert len({part.shape for part in slices}) == 1
    whole = torch.cat(slices, 1)
    assert torch.equal(whole[:, :11], ids) and not whole[:, 11:].any()
