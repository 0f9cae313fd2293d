import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore.train import LagrangianObjective

TASKS = {"qa": 0.7, "code": 1.0, "summary": (0.8, 0.9)}


def objective(targets=TASKS, lambda1=0.0, lambda2=0.0, **options):
    result = LagrangianObjective(targets, **options)
    with torch.no_grad():
        result.lambda1.copy_(torch.tensor(lambda1))
        result.lambda2.copy_(torch.tensor(lambda2))
    return result


def penalty(result, msr, ids):
    return result(torch.as_tensor(msr), torch.tensor(ids))


@pytest.mark.parametrize(
    ("signed", "expected"),
    [
        # λ1 d + λ2 d² = 0.4 · -0.2 + 0.5 · 0.04 = -0.06; with |d|, 0.08 + 0.02 = 0.10
        (True, -0.06),
        (False, 0.10),
    ],
)
def test_one_sample_by_hand(signed, expected):
    lagrangian = objective({"qa": 0.7}, [0.4], [0.5], signed=signed)
    assert penalty(lagrangian, [0.5], [0]).penalty.item() == pytest.approx(expected, abs=1e-6)


def test_means_within_a_task_then_over_the_tasks_present():
    lagrangian = objective(lambda1=[1.0, 0.5, 9.0], lambda2=[2.0, 1.0, 9.0])
    result = penalty(lagrangian, [0.5, 0.9, 0.6, 0.4], [0, 0, 1, 0])
    # qa: |d| = 0.2, 0.2, 0.3: mean 7/30; d² mean (0.04 + 0.04 + 0.09) / 3 = 17/300
    #     7/30 + 2 · 17/300 = 104/300
    # code: d = 0.4: 0.5 · 0.4 + 0.16 = 0.36. summary is absent: (104/300 + 0.36) / 2.
    assert result.penalty.item() == pytest.approx((104 / 300 + 0.36) / 2, abs=1e-6)
    assert result.task_count.tolist() == [3, 1, 0]
    assert result.task_msr[:2].tolist() == pytest.approx([0.6, 0.6])
    assert math.isnan(result.task_msr[2])
    assert not result.task_msr.requires_grad


@pytest.mark.parametrize(
    ("msr", "signed", "distance", "slope"),
    [
        (0.5, False, 0.3, -1.0),
        (0.5, True, -0.3, 1.0),
        (0.8, False, 0.0, 0.0),
        (0.8, True, 0.0, 0.0),
        (0.85, False, 0.0, 0.0),
        (0.85, True, 0.0, 0.0),
        (0.9, True, 0.0, 0.0),
        (1.0, False, 0.1, 1.0),
        (1.0, True, 0.1, 1.0),
    ],
)
def test_bounds(msr, signed, distance, slope):
    lagrangian = objective({"summary": (0.8, 0.9)}, [1.0], [0.0], signed=signed)
    msr = torch.tensor([msr], requires_grad=True)
    result = penalty(lagrangian, msr, [0]).penalty
    assert result.item() == pytest.approx(distance, abs=1e-6)
    result.backward()
    assert msr.grad.item() == slope


@pytest.mark.parametrize(("signed", "slope"), [(True, 1.0), (False, 0.0)])
def test_slope_on_a_point_target(signed, slope):
    # d = Ω - t has slope 1 everywhere, also where d = 0, which a router meets at t = 1 exactly.
    lagrangian = objective({"code": 1.0}, [1.0], [1.0], signed=signed)
    msr = torch.tensor([1.0], requires_grad=True)
    result = penalty(lagrangian, msr, [0]).penalty
    assert result.item() == 0.0
    result.backward()
    assert msr.grad.item() == slope


def test_gradients_by_hand():
    lagrangian = objective(lambda1=[0.4, 0.5, 0.1], lambda2=[0.5, 0.25, 0.1])
    msr = torch.tensor([0.5, 0.9], requires_grad=True)
    penalty(lagrangian, msr, [0, 1]).penalty.backward()
    # Half (two tasks) of sign(d) (λ1 + 2 λ2 |d|): -(0.4 + 0.2) / 2 and -(0.5 + 0.05) / 2.
    torch.testing.assert_close(msr.grad, torch.tensor([-0.3, -0.275]), rtol=0, atol=1e-6)
    # Half of |d| and of d²; nothing for the absent task.
    lambda1, lambda2 = torch.tensor([0.1, 0.05, 0.0]), torch.tensor([0.02, 0.005, 0.0])
    torch.testing.assert_close(lagrangian.lambda1.grad, lambda1, rtol=0, atol=1e-6)
    torch.testing.assert_close(lagrangian.lambda2.grad, lambda2, rtol=0, atol=1e-6)


@given(
    samples=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2)), min_size=1, max_size=12),
    signed=st.booleans(),
)
def test_matches_the_definition_in_plain_python(samples, signed):
    lambda1, lambda2 = [0.3, 0.1, 0.45], [0.2, 0.5, 0.05]
    means = []
    for task, (low, high) in enumerate([(0.7, 0.7), (1.0, 1.0), (0.8, 0.9)]):
        costs = []
        for msr in [m for m, t in samples if t == task]:
            d = min(msr - low, 0.0) + max(msr - high, 0.0)
            d = d if signed else abs(d)
            costs.append(lambda1[task] * d + lambda2[task] * d * d)
        if costs:
            means.append(sum(costs) / len(costs))
    lagrangian = objective(lambda1=lambda1, lambda2=lambda2, signed=signed)
    result = penalty(lagrangian, [m for m, _ in samples], [t for _, t in samples])
    assert result.penalty.item() == pytest.approx(sum(means) / len(means), abs=1e-6)


def test_the_parts_of_a_step_add_up_to_the_step():
    """However a step's samples are spread over micro-batches, the penalty and its gradients stay.

    All numbers are sums of powers of two, so the equality is exact.
    """
    msr, ids = [0.5, 0.25, 1.0, 0.0, 0.75, 0.5], [0, 1, 1, 0, 1, 1]
    found = []
    for parts in ([slice(0, 6)], [slice(i, i + 1) for i in range(6)], [slice(0, 4), slice(4, 6)]):
        lagrangian = objective({"a": 1.0, "b": 0.25, "c": 0.5}, [0.5] * 3, [0.25] * 3)
        own = torch.tensor(msr, requires_grad=True)
        step = lagrangian.count(torch.tensor(ids))
        assert step.tolist() == [2, 4, 0]
        results = [lagrangian(own[one], torch.tensor(ids[one]), step=step) for one in parts]
        total = sum(one.penalty for one in results)
        total.backward()
        found.append([total, own.grad, lagrangian.lambda1.grad, lagrangian.lambda2.grad])
    whole = objective({"a": 1.0, "b": 0.25, "c": 0.5}, [0.5] * 3, [0.25] * 3)
    found.append([penalty(whole, msr, ids).penalty])
    for values in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], values, strict=False))


def test_multipliers_ascend_for_as_long_as_the_target_is_missed():
    lagrangian = objective({"qa": 0.7, "code": 1.0}, [0.2, 0.2], [0.2, 0.2])
    (group,) = lagrangian.parameter_groups(lr=0.01, weight_decay=0.0)
    assert group["maximize"]
    router = torch.nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.AdamW([{"params": [router], "lr": 0.05}, group], weight_decay=0.0)
    before = router.sigmoid().item()
    for _ in range(5):
        optimizer.zero_grad()
        msr = router.sigmoid().expand(1)  # 0.5, below qa's 0.7
        penalty(lagrangian, msr, [0]).penalty.backward()
        optimizer.step()
    # Adam moves by about lr a step: 5 steps of 0.01 up.
    assert lagrangian.lambda1[0].item() == pytest.approx(0.25, abs=2e-3)
    assert lagrangian.lambda2[0].item() == pytest.approx(0.25, abs=2e-3)
    assert lagrangian.lambda1[1].item() == pytest.approx(0.2)  # absent task: no ascent
    assert router.sigmoid().item() > before  # and the router descends towards the target


def test_a_met_target_leaves_the_multipliers():
    lagrangian = objective({"qa": (0.6, 0.8)}, [0.2], [0.2])
    penalty(lagrangian, [0.7], [0]).penalty.backward()
    assert lagrangian.lambda1.grad.tolist() == [0.0]
    assert lagrangian.lambda2.grad.tolist() == [0.0]


def test_official_defaults():
    (group,) = objective().parameter_groups()
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    assert not LagrangianObjective(TASKS).signed


def test_start_is_uniform_and_seeded():
    many = LagrangianObjective({f"task {i}": 0.5 for i in range(500)}, seed=0)
    for values in (many.lambda1, many.lambda2):
        assert values.dtype == torch.float32
        assert bool(((values >= 0) & (values <= 0.5)).all())
        assert abs(values.mean().item() - 0.25) < 0.05  # 7.7 standard errors
    assert not torch.equal(many.lambda1, many.lambda2)
    again, other = (LagrangianObjective(TASKS, seed=s).lambda1 for s in (1, 2))
    assert torch.equal(again, LagrangianObjective(TASKS, seed=1).lambda1)
    assert not torch.equal(again, other)
    assert LagrangianObjective(TASKS, init=(0.3, 0.3)).lambda2.tolist() == pytest.approx([0.3] * 3)


def test_config_is_json_and_makes_the_same_objective():
    first = LagrangianObjective(TASKS, signed=True, init=(0.1, 0.2), seed=3)
    config = json.loads(json.dumps(first.config()))
    assert config["targets"] == {"qa": 0.7, "code": 1.0, "summary": [0.8, 0.9]}
    second = LagrangianObjective(**config)
    assert second.config() == first.config()
    assert torch.equal(second.lambda1, first.lambda1)
    assert "targets={'qa': 0.7, 'code': 1.0, 'summary': [0.8, 0.9]}, signed=True" in repr(first)


def test_state_dict_holds_the_multipliers_only():
    assert list(objective().state_dict()) == ["lambda1", "lambda2"]


def test_task_ids_from_names():
    lagrangian = objective()
    assert lagrangian.tasks == ("qa", "code", "summary")
    assert lagrangian.task_ids(["code", "qa", "code"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"unknown tasks \['maths'\]; the targets name \['qa'"):
        lagrangian.task_ids(["qa", "maths"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_multipliers_that_are_not_finite_are_found(value):
    lagrangian = objective()
    lagrangian.check()
    bad = {"lambda1": torch.zeros(3), "lambda2": torch.tensor([0.0, value, 0.0])}
    with pytest.raises(ValueError, match=r"lambda2 must be finite, got \{'code': (nan|inf)\}"):
        lagrangian.load_state_dict(bad)
    with pytest.raises(ValueError, match="lambda2 must be finite"):
        lagrangian.check()


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        ({}, {}, ValueError, "targets must name at least one task"),
        ({"qa": 1.2}, {}, ValueError, r"targets\['qa'\] must be from 0 to 1.*got 1.2"),
        ({"qa": math.nan}, {}, ValueError, r"targets\['qa'\] must be from 0 to 1"),
        ({"qa": (0.9, 0.8)}, {}, ValueError, "low <= high"),
        ({"qa": (0.1, 0.2, 0.3)}, {}, TypeError, "a number or a pair"),
        ({"qa": "0.7"}, {}, TypeError, "a number or a pair"),
        ({"qa": None}, {}, TypeError, "a number or a pair"),
        (TASKS, {"init": (0.5, 0.0)}, ValueError, "init must be a finite range"),
        (TASKS, {"init": (0.0, math.inf)}, ValueError, "init must be a finite range"),
    ],
)
def test_bad_settings_are_named(targets, options, error, message):
    with pytest.raises(error, match=message):
        LagrangianObjective(targets, **options)


@pytest.mark.parametrize(
    ("msr", "ids", "error", "message"),
    [
        (torch.tensor([1]), torch.tensor([0]), TypeError, "msr must be a float tensor"),
        (torch.tensor([0.5]), torch.tensor([0.0]), TypeError, "task_ids must be int64"),
        (torch.tensor([0.5]), torch.tensor([0, 1]), ValueError, r"got shapes \[1\] and \[2\]"),
        (torch.tensor(0.5), torch.tensor(0), ValueError, r"must both be \[samples\]"),
        (torch.ones(0), torch.ones(0).long(), ValueError, "at least one sample"),
        (torch.tensor([0.5]), torch.tensor([3]), ValueError, "from 0 to 2 .qa, code, summary."),
        (torch.tensor([0.5]), torch.tensor([-1]), ValueError, "got ids from -1 to -1"),
        (
            torch.ones(1, device="meta"),
            torch.tensor([0]),
            ValueError,
            "must be on one device, got meta, cpu and cpu",
        ),
    ],
)
def test_bad_batches_are_named(msr, ids, error, message):
    with pytest.raises(error, match=message):
        objective()(msr, ids)


def test_nothing_is_read_on_the_host_off_the_cpu():
    lagrangian = LagrangianObjective(TASKS).to("meta")  # has no values
    ids = torch.empty(4, dtype=torch.int64, device="meta")
    msr = torch.empty(4, device="meta", requires_grad=True)
    result = lagrangian(msr, ids)
    result.penalty.backward()
    assert result.penalty.shape == ()
    assert result.task_msr.shape == (3,)


def test_an_unknown_id_on_a_gpu_makes_the_penalty_nan(monkeypatch):
    # What a GPU runs: the same forward, without the values being read.
    lagrangian = objective()
    monkeypatch.setattr(lagrangian, "_check_batch", lambda msr, ids: None)
    assert math.isnan(penalty(lagrangian, [0.5, 0.5], [0, 3]).penalty.item())
    assert math.isnan(penalty(lagrangian, [0.5], [-1]).penalty.item())
    assert math.isfinite(penalty(lagrangian, [0.5, 0.5], [0, 2]).penalty.item())
