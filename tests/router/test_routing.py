import pytest
import torch

from elasticore.router import Routing, model_msr


def decisions(*rows):
    return torch.tensor(rows, dtype=torch.int8)


def test_msr_by_hand():
    routing = Routing(decisions([1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]))
    assert routing.msr().tolist() == [0.25, 0.75, 0.0]
    assert routing.msr().dtype == torch.float32


def test_model_msr_counts_heads_not_layers():
    # Eq. 4 over layers of 4 and 1 heads: (1 + 1) / 5 and (0 + 1) / 5.
    layers = [Routing(decisions([1, 0, 0, 0], [0, 0, 0, 0])), Routing(decisions([1], [1]))]
    assert torch.equal(model_msr(layers), torch.tensor([2 / 5, 1 / 5]))
    with pytest.raises(ValueError, match="at least one layer"):
        model_msr([])


def test_msr_carries_the_gate_s_gradient():
    gate = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 1]], requires_grad=True)
    routing = Routing(gate.detach().to(torch.int8), gate=gate)
    msr = routing.msr()
    assert msr.tolist() == [0.75, 0.25]
    (msr * torch.tensor([1.0, 10.0])).sum().backward()
    assert torch.equal(gate.grad, torch.tensor([[0.25] * 4, [2.5] * 4]))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"decisions": torch.zeros(1, 2)}, TypeError, "decisions must be int8"),
        ({"decisions": torch.zeros(2, dtype=torch.int8)}, ValueError, "decisions must be"),
        ({"gate": torch.zeros(1, 3)}, ValueError, r"gate must have shape \[1, 2\]"),
        ({"gate": torch.zeros(1, 2).half()}, TypeError, "gate must be float32"),
        ({"logits": torch.zeros(1, 2)}, ValueError, r"logits must have shape \[1, 2, 2\]"),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        Routing(**{"decisions": decisions([0, 1]), **fields})
