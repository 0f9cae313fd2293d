"""Static gates: what training mixes, which heads become sparse, and the published pattern files."""

from __future__ import annotations

import pytest
import torch

from elasticore import SequenceLayout
from elasticore.router import (
    AllSparse,
    DuoGate,
    HardConcreteGate,
    Routing,
    head_scores,
    model_msr,
    retrieval_only,
)

KEYS = torch.zeros(1, 10, 3, 8)
SEGMENTS = SequenceLayout.packed(torch.tensor([0, 4, 10])).segments(1, 10, 10, KEYS.device)


def duo(*alpha: float) -> DuoGate:
    gate = DuoGate(len(alpha))
    gate.alpha.data.copy_(torch.tensor(alpha))
    return gate


def test_a_training_gate_mixes_and_a_resting_one_decides():
    gate = duo(0.9, 0.5, 0.2)
    routing = gate.train()(KEYS, SEGMENTS)
    assert torch.allclose(routing.mix, torch.tensor([0.1, 0.5, 0.8]))
    assert routing.decisions.tolist() == [[0, 0, 1]] * 2
    routing.msr().sum().backward()
    assert torch.allclose(gate.alpha.grad, torch.full((3,), -2 / 3))  # two sequences
    resting = gate.eval()(KEYS, SEGMENTS)
    assert resting.mix is None and resting.decisions.tolist() == [[0, 0, 1]] * 2


def test_the_sparsity_of_a_model_is_the_mean_of_its_mixes():
    routings = [duo(1, 0.5, 0)(KEYS, SEGMENTS), duo(0, 0, 0)(KEYS, SEGMENTS)]
    assert model_msr(routings).tolist() == pytest.approx([(0.5 + 1 + 3) / 6] * 2)


def test_a_gate_is_left_out_of_the_way_for_the_teacher():
    gates = [duo(0, 0, 0).train(), HardConcreteGate(3, -4.0).train()]
    with retrieval_only(gates):
        routings = [gate(KEYS, SEGMENTS) for gate in gates]
    assert all(r.mix is None and not r.decisions.any() for r in routings)
    assert gates[0](KEYS, SEGMENTS).mix.tolist() == [1, 1, 1]


def test_gates_are_put_back_into_their_interval():
    gate = duo(-0.5, 0.25, 1.5)
    assert gate.scores().tolist() == [0, 0.25, 1]
    gate.clamp()
    assert gate.alpha.tolist() == [0, 0.25, 1]


@pytest.mark.parametrize("log_alpha", [-1.0, 0.0, 2.0])
def test_a_hard_concrete_gate_is_0_and_1_as_often_as_its_formula_says(log_alpha):
    gate = HardConcreteGate(100_000, log_alpha).train()
    torch.manual_seed(0)
    z = gate.sample()
    # P(z = 0) = sigmoid(T log(-γ / ζ) - log α), and 1 as often with log α of the other sign.
    edge = torch.tensor(2 / 3) * torch.log(torch.tensor(0.1 / 1.1))
    zero, one = torch.sigmoid(edge - log_alpha), torch.sigmoid(edge + log_alpha)
    # Four standard deviations of a share of 100,000 draws are below 0.0064.
    assert (z == 0).float().mean().item() == pytest.approx(zero.item(), abs=0.0064)
    assert (z == 1).float().mean().item() == pytest.approx(one.item(), abs=0.0064)
    z.sum().backward()
    slope = gate.log_alpha.grad
    assert (slope[(z > 0) & (z < 1)] > 0).all()
    # A gate that was cut has no slope, but for the few that meet a bound exactly.
    assert (slope[(z == 0) | (z == 1)] > 0).sum() < 10


def test_draws_come_from_the_global_generator():
    gate = HardConcreteGate(50, 0.0).train()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(gate.sample())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_scores_of_all_layers():
    scores = head_scores([duo(0.25, 2, -1), HardConcreteGate(3, 4.0)])
    assert scores.tolist() == [[0.25, 1, 0], [4, 4, 4]]
    with pytest.raises(TypeError, match="must be StaticGates, got AllSparse"):
        head_scores([AllSparse()])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DuoGate(0), ValueError, "kv_heads must be at least 1"),
        (lambda: DuoGate(2, 1.5), ValueError, "initial must be from 0 to 1"),
        (lambda: duo(1, 1)(KEYS, SEGMENTS), ValueError, "keys have 3 KV heads but there are gates"),
        (
            lambda: Routing(torch.zeros(1, 2, dtype=torch.int8), mix=torch.zeros(1, 2)),
            ValueError,
            r"mix must have shape \[2\]",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
