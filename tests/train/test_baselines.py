"""DuoAttention and PruLong on the routers' trainer: losses, schedules, and the patterns made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import elasticore as ec
from elasticore.train import Collator, Recipe, train
from elasticore.train.baselines import (
    DuoAttention,
    GatePrice,
    PruLong,
    RisingTarget,
    settle_gates,
)
from elasticore.train.loss import hidden_states

from .test_recipe import backbone as backbone  # a fixture
from .test_recipe import settings, write
from .test_trainer import SMALL, Noise, losses
from .test_trainer import backbone as small_model

TASKS = ("robust", "sensitive")


def trainer_in(folder: Path, method: DuoAttention | PruLong, **changes: Any) -> Any:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": method.lr,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
    }
    return method.trainer(
        with_gates(method),
        TrainingArguments(**{**arguments, **changes}),
        method.objective(),  # type: ignore[arg-type]
        train_dataset=Noise(),
        collator=Collator(TASKS),
        multiplier_lr=method.multiplier_lr,
    )


def with_gates(method: DuoAttention | PruLong) -> Any:
    return ec.elasticize(small_model(), replace(SMALL, policy=method))


def gates(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for gate in ec.routers(trainer.model) for p in gate.parameters()]


def batch(collator: Collator) -> dict[str, Any]:
    data = Noise()
    return collator([data[i] for i in range(3)])


def hidden_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    arguments = {k: inputs[k] for k in ("input_ids", "attention_mask") if k in inputs}
    with torch.no_grad():
        return hidden_states(model, model, arguments)[0]


@pytest.mark.parametrize("objective", [GatePrice(0.5), RisingTarget(0.5)])
def test_the_parts_of_a_step_add_up_to_the_step(objective: Any) -> None:
    """However its samples are spread over micro-batches, and whatever their tasks are."""
    ids = torch.tensor([0, 2, 1, 1])
    if isinstance(objective, RisingTarget):
        objective.lambda1.data.fill_(2.0)
    step = objective.count(ids)
    assert step.tolist() == [4]
    gradients = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        share = torch.tensor(0.25, requires_grad=True)
        total = sum(objective(share.expand(4)[p], ids[p], step=step).penalty for p in parts)
        total.backward()
        gradients.append((total.item(), share.grad.item()))
    whole = objective(torch.full((4,), 0.25), ids).penalty.item()
    assert gradients[0] == gradients[1]
    assert gradients[0][0] == whole != 0


@pytest.mark.parametrize(("alpha", "policy"), [(1.0, ec.AllRetrieval), (0.0, ec.AllSparse)])
def test_gates_at_their_ends_are_the_modes_themselves(alpha: float, policy: type) -> None:
    inputs = batch(Collator(TASKS))
    mixed = with_gates(DuoAttention(initial=alpha)).train()
    pure = ec.elasticize(small_model(), replace(SMALL, policy=policy())).train()
    assert torch.equal(hidden_of(mixed, inputs), hidden_of(pure, inputs))


def test_the_output_is_the_blend_of_both_modes() -> None:
    # One layer, so that the hidden states before the last norm are linear in its gates.
    inputs = batch(Collator(TASKS))
    out = []
    for alpha in (0.0, 0.25, 1.0):
        model = with_gates(DuoAttention(initial=alpha)).train()
        found: list[Tensor] = []
        model.model.layers[0].self_attn.register_forward_hook(
            lambda *call, found=found: found.append(call[-1][0])
        )
        hidden_of(model, inputs)
        out.append(found[0])
    torch.testing.assert_close(out[1], 0.75 * out[0] + 0.25 * out[2], rtol=0, atol=1e-6)


def test_the_gradient_of_a_gate_is_that_of_the_loss(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, DuoAttention(initial=0.5, reg_weight=0.0))
    model = trainer.model.train()
    inputs = batch(trainer.data_collator)
    model.zero_grad()
    trainer.compute_loss(model, inputs).backward()
    alpha = ec.routers(model)[0].alpha
    step = 1e-2
    with torch.no_grad():
        alpha[1] += step
        above = trainer.compute_loss(model, inputs)
        alpha[1] -= 2 * step
        below = trainer.compute_loss(model, inputs)
        alpha[1] += step
    slope = (above - below) / (2 * step)
    assert alpha.grad[1] != 0
    assert alpha.grad[1].item() == pytest.approx(slope.item(), rel=2e-2)


def test_distillation_by_hand(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, DuoAttention(initial=0.5, reg_weight=0.4))
    inputs = batch(trainer.data_collator)
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    full, mixed = hidden_of(small_model(), inputs), hidden_of(trainer.model, inputs)
    squares = []
    for row, label in enumerate(inputs["labels"].tolist()):
        for place, token in enumerate(label):
            if token != -100:
                difference = full[row, place - 1] - mixed[row, place - 1]
                squares.append(difference.square().mean())
    expected = torch.stack(squares).mean() + 0.4 * 0.5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_packed_and_padded_batches_are_distilled_alike(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, DuoAttention(initial=0.5))
    model = trainer.model.train()
    padded, packed = (
        trainer.compute_loss(model, batch(Collator(TASKS, packed=p))).item() for p in (False, True)
    )
    assert packed == pytest.approx(padded, rel=1e-5)


def test_full_attention_distils_to_nothing_but_the_price(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, DuoAttention())
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["distillation"] == 0
    assert first["penalty"] == pytest.approx(0.05)
    assert first["msr/all"] == 0
    assert all(bool((a < 1).all()) for a in gates(trainer))  # only the price had a slope


def test_only_gates_move_and_stay_in_their_interval(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, DuoAttention(lr=0.6, reg_weight=5.0))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], parameter) == ("attention_router" not in name), name
    trainer.before_step(0, 1)
    assert all(bool(((a >= 0) & (a <= 1)).all()) for a in gates(trainer))


def test_the_target_rises_and_then_stays() -> None:
    target = RisingTarget(0.6, ramp=0.5)
    found = []
    for step in (0, 25, 50, 75):
        target.rise(step, 100)
        found.append((target.low.item(), target.high.item()))
    assert found == [pytest.approx((t, t)) for t in (0, 0.3, 0.6, 0.6)]
    RisingTarget(0.6, ramp=0.0).rise(0, 100)


def test_the_lagrangian_by_hand() -> None:
    target = RisingTarget(0.6)
    target.rise(8, 10)
    with torch.no_grad():
        target.lambda1.fill_(2.0)
        target.lambda2.fill_(3.0)
    msr = torch.full((4,), 0.5, requires_grad=True)
    result = target(msr, torch.tensor([0, 1, 1, 4]))  # whatever the data's tasks are
    assert result.penalty.item() == pytest.approx(2 * -0.1 + 3 * 0.01)
    result.penalty.backward()
    assert msr.grad.sum().item() == pytest.approx(2 + 2 * 3 * -0.1)


def test_prulong_reaches_its_target(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, PruLong(sparsity=0.5, ramp=0.5), max_steps=24)
    trainer.train()
    shares = [entry["msr/all"] for entry in trainer.state.log_history if "msr/all" in entry]
    assert shares[0] < 0.1  # P(z = 1) is 0.92 at the start, and most others are close to 1
    assert sum(shares[-8:]) / 8 > 0.25
    assert losses(trainer) and "lambda1/all" in trainer.state.log_history[0]


@pytest.mark.parametrize("method", [DuoAttention(), PruLong()])
def test_resume_is_bit_for_bit(method: DuoAttention | PruLong, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_in(tmp_path, method, **saving)
    whole.train()
    resumed = trainer_in(tmp_path, method, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, theirs in zip(gates(resumed), gates(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpointing_gives_the_same_bits(tmp_path: Path) -> None:
    from elasticore.train import checkpoint_layers

    plain = trainer_in(tmp_path / "a", PruLong())
    plain.train()
    saving = trainer_in(tmp_path / "b", PruLong())  # a new trainer seeds the noise anew
    checkpoint_layers(saving.model)
    saving.train()
    for a, b in zip(gates(plain), gates(saving), strict=True):
        assert torch.equal(a, b)


def test_settled_gates_are_saved_loaded_and_published(tmp_path: Path) -> None:
    method = DuoAttention(sparsity=0.5)
    model = with_gates(method).eval()
    for gate, alpha in zip(ec.routers(model), ([0.1, 0.9], [0.3, 0.2]), strict=True):
        gate.alpha.data.copy_(torch.tensor(alpha))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"gates in training.* settle_gates"):
        ec.way_of(model).save(tmp_path / "router")
    settle_gates(model, tmp_path / "pattern")
    assert [p.decisions.tolist() for p in ec.routers(model)] == [[1, 0], [0, 1]]  # type: ignore[union-attr]
    assert ec.HeadTable.read(tmp_path / "pattern").streaming == ec.Streaming(16, 32)
    inputs = batch(Collator(TASKS))
    loaded = ec.elasticize(small_model(), ec.way_of(model).save(tmp_path / "router"))
    assert torch.equal(hidden_of(loaded, inputs), hidden_of(model, inputs))
    assert [p.decisions.tolist() for p in ec.routers(loaded)] == [[1, 0], [0, 1]]  # type: ignore[union-attr]


def test_gates_that_nothing_can_hold_are_not_settled(tmp_path: Path) -> None:
    selecting = replace(SMALL, policy=PruLong(), sparse=ec.XAttention())
    for way in (SMALL, selecting):
        with pytest.raises(ValueError, match=r"sparse=Streaming.*DuoAttention or PruLong"):
            settle_gates(ec.elasticize(small_model(), way), tmp_path / "pattern")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["duo", "prulong"])
def test_a_recipe_trains_a_static_pattern(policy: str, backbone: Path, tmp_path: Path) -> None:
    chosen = {"policy": policy, "policy_settings": {"sparsity": 0.5}}
    recipe = Recipe.load(write(tmp_path, settings(backbone, **chosen)))
    folder = train(recipe, tmp_path / "run")
    from transformers import LlamaForCausalLM

    model = ec.elasticize(LlamaForCausalLM.from_pretrained(backbone), folder)
    table = torch.stack([policy.decisions for policy in ec.routers(model)])  # type: ignore[misc]
    assert int(table.sum()) == 2
    pattern = tmp_path / "run" / "pattern"
    if policy == "prulong":
        read = ec.HeadTable.read(pattern / "masks_sp0.5.tsv")
    else:
        read = ec.HeadTable.read(pattern, msr=0.5)
    assert torch.equal(torch.as_tensor(read.sparse), table.bool())
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "magic"}, "policy must be one of elastic, duo, prulong"),
        ({"policy": "duo", "policy_settings": {"ramp": 1}}, "policy_settings do not fit"),
        ({"policy": "duo", "policy_settings": {"sparsity": 2}}, "sparsity must be from 0 to 1"),
        ({"policy": "prulong", "policy_settings": {"ramp": 2}}, "ramp must be from 0 to 1"),
        ({"policy_settings": {"lr": 1}}, "belong to policy duo or prulong"),
        (
            {"policy": "duo", "elastic": {"sparse": {"name": "xattention"}}},
            r"elastic.sparse must be \{name: streaming, ...\} with policy duo",
        ),
    ],
)
def test_bad_settings_end_before_anything_is_written(
    backbone: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(Recipe.load(write(tmp_path, settings(backbone, **change))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_trainer_refuses_another_methods_gates_and_objective(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    model = with_gates(PruLong())
    with pytest.raises(ValueError, match="policy HardConcreteGate, but DuoTrainer trains DuoGates"):
        DuoAttention.trainer(model, args, GatePrice(0.1), train_dataset=Noise())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="objective must be a RisingTarget"):
        PruLong.trainer(model, args, GatePrice(0.1), train_dataset=Noise())  # type: ignore[arg-type]
