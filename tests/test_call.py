"""What a call is checked for once must hold of every call like it, and of no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import elasticore as ec

Call = dict[str, Any]


def good() -> Call:
    """A fresh call; its tensors lie as those of the one before."""
    q, k = torch.randn(1, 4, 40, 32), torch.randn(1, 2, 40, 32)
    plan = ec.HeadPlan(torch.tensor([[0, 1]], dtype=torch.int8))
    return {"q": q, "k": k, "v": k.clone(), "plan": plan, "backend": "serial"}


def with_decisions(call: Call, *rows: list[int]) -> Call:
    return {"plan": call["plan"].with_decisions(torch.tensor(rows, dtype=torch.int8))}


BAD: dict[str, tuple[Callable[[Call], Call], type[Exception], str]] = {
    "axes": (lambda c: {"q": c["q"][0]}, ValueError, "q must have 4 axes"),
    "type": (lambda c: {"v": c["v"].numpy()}, TypeError, "v must be a torch.Tensor"),
    "dtype": (lambda c: {"k": c["k"].half()}, TypeError, "k is torch.float16"),
    "integers": (lambda c: {"v": c["v"].long()}, TypeError, "v must be floating point"),
    "device": (lambda c: {"v": c["v"].to("meta")}, ValueError, "v is on meta"),
    "empty": (lambda c: {"q": c["q"][:, :, :0]}, ValueError, "q is empty"),
    "strides": (lambda c: {"k": c["k"].mT.contiguous().mT}, ValueError, "k must be contiguous"),
    "shape": (lambda c: {"v": c["v"][:, :, :39]}, ValueError, "v must have the shape of k"),
    "heads": (lambda c: {"q": c["q"][:, :3]}, ValueError, "no multiple"),
    "keys": (
        lambda c: {"k": c["k"][:, :, :9], "v": c["v"][:, :, :9]},
        ValueError,
        "k needs at least as many",
    ),
    "decisions": (lambda c: with_decisions(c, [0, 1, 0]), ValueError, "plan.decisions must be"),
    "sequences": (lambda c: with_decisions(c, [0, 1], [0, 1]), ValueError, "plan.decisions must"),
    "plan": (lambda c: {"plan": c["plan"].decisions}, TypeError, "plan must be a HeadPlan"),
    "layout": (lambda c: {"layout": "dense"}, TypeError, "layout must be"),
    "layout's end": (
        lambda c: {"layout": ec.SequenceLayout.packed(torch.tensor([0, 41]))},
        ValueError,
        "layout ends at query 41",
    ),
    "scale": (lambda c: {"scale": float("inf")}, ValueError, "scale must be finite"),
    "backend": (lambda c: {"backend": "seriel"}, ec.UnknownBackend, "'seriel' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_refused_each_time_after_a_good_one_like_it(name: str) -> None:
    change, kind, message = BAD[name]
    for _ in range(2):
        ec.hybrid_head_attention(**good())
        call = good()
        with pytest.raises(kind, match=message):
            ec.hybrid_head_attention(**(call | change(call)))


def test_a_layout_is_checked_by_its_values_each_time() -> None:
    call, end = good(), torch.tensor([0, 40])
    layout = ec.SequenceLayout.packed(end)
    ec.hybrid_head_attention(**call, layout=layout)
    end[1] = 41
    with pytest.raises(ValueError, match="layout ends at query 41"):
        ec.hybrid_head_attention(**call, layout=layout)


def test_a_gradient_is_not_lost_after_the_same_call_without_one() -> None:
    def run(grad: bool) -> Tensor:
        call = good()
        call["q"].requires_grad_(grad)
        return ec.hybrid_head_attention(**call)

    assert [run(grad).requires_grad for grad in (False, True, False, True)] == [
        False,
        True,
        False,
        True,
    ]
