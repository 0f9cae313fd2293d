"""The trainer moves routers and multipliers, nothing else, and resumes bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

import elasticore as ec
from elasticore.router.sampling import _straight_through
from elasticore.train import Collator, LagrangianObjective, RouterTrainer, TrainingSample

SMALL = ec.Elastic(sparse=ec.Streaming(16, 32))


class Noise(Dataset[TrainingSample]):
    """Two tasks of random tokens; the last eight are learnt."""

    def __init__(self, poisoned: bool = False) -> None:
        self.poisoned = poisoned

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> TrainingSample:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 128, (80 if index % 3 else 96,), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[-8:] = ids[-8:]
        return TrainingSample(ids, labels, ("robust", "sensitive")[index % 2])


class NoNoise:
    """Decides by the logits alone, so that a sample is routed alike whenever it comes."""

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        """Sample nothing."""
        return _straight_through(logits[..., 1] - logits[..., 0], temperature)


def backbone() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=256,
    )
    return Qwen3ForCausalLM(config).eval()


def trainer_in(
    folder: Path, *, steps: int = 4, packed: bool = False, **changes: Any
) -> RouterTrainer:
    model = ec.elasticize(backbone(), SMALL)
    objective = LagrangianObjective({"robust": 1.0, "sensitive": 0.3}, seed=0)
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
    }
    return RouterTrainer(
        model,
        TrainingArguments(**{**settings, **changes}),
        objective,
        train_dataset=Noise(),
        collator=Collator(objective.tasks, packed=packed),
        multiplier_lr=0.05,
    )


def weights(trainer: RouterTrainer) -> list[Tensor]:
    model = trainer.model
    assert isinstance(model, nn.Module)
    routers = [p.detach().clone() for r in ec.routers(model) for p in r.parameters()]
    return routers + [p.detach().clone() for p in trainer.objective.parameters()]


def losses(trainer: RouterTrainer) -> list[float]:
    return [entry["lm_loss"] for entry in trainer.state.log_history if "lm_loss" in entry]


def test_only_routers_and_multipliers_move(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    assert trainer.model is not None
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    multipliers = weights(trainer)[-2:]
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved == ("attention_router" in name), name
        assert parameter.requires_grad == ("attention_router" in name), name
    assert all(
        not torch.equal(a, b) for a, b in zip(multipliers, weights(trainer)[-2:], strict=True)
    )


def test_multipliers_ascend_while_a_target_is_missed(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, steps=1, weight_decay=0.0)
    before = trainer.objective.lambda1.detach().clone()
    trainer.train()
    # |d| > 0 for both tasks (three sequences of four heads cannot give 0.3): AdamW's first step
    # is the learning rate itself, upwards.
    assert torch.allclose(trainer.objective.lambda1, before + 0.05, atol=1e-6)


def test_multiplier_gradients_do_not_pile_up_over_steps(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, steps=3)
    seen: list[float] = []

    def note(*_: Any) -> None:
        gradient = trainer.objective.lambda1.grad
        assert gradient is not None
        seen.append(float(gradient.sum()))

    trainer.create_optimizer().register_step_pre_hook(note)
    trainer.train()
    # The gradient of λ1 is the mean |d| over the tasks present: never above 1 in sum.
    assert len(seen) == 3
    assert max(seen) <= 1


@pytest.mark.parametrize("reduction", ["tokens", "samples"])
def test_a_step_is_the_same_in_one_batch_and_in_several(
    tmp_path: Path, reduction: Literal["tokens", "samples"]
) -> None:
    """A step of four samples, and the last of the epoch with two; packed rows of unequal counts."""
    rows = [Noise()[i] for i in range(6)]
    seen = []
    for data, batch, accumulation in (
        (rows, 4, 1),
        (rows, 1, 4),
        ([tuple(rows[:1]), tuple(rows[1:4]), tuple(rows[4:6])], 1, 2),  # one sample, then three
    ):
        model = ec.elasticize(backbone().double(), SMALL)
        torch.manual_seed(1)
        for router in ec.routers(model):
            router.double().sampler = NoNoise()  # type: ignore[assignment]
            for parameter in router.parameters():
                parameter.data.normal_(0, 0.5)
        objective = LagrangianObjective({"robust": 1.0, "sensitive": 0.3}, init=(1, 2), seed=0)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
            max_grad_norm=0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
        )
        trainer = RouterTrainer(
            model,
            args,
            objective,
            train_dataset=data,  # type: ignore[arg-type]
            collator=Collator(objective.tasks, packed=True, reduction=reduction),
            multiplier_lr=0.0,
        )
        steps: list[dict[str, Tensor]] = []

        def note(*_: Any, model: Any = model, own: Any = objective, steps: Any = steps) -> None:
            named = [*model.named_parameters(), *own.named_parameters()]
            steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})

        trainer.create_optimizer().register_step_pre_hook(note)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "penalty" in entry]
        seen.append((steps, [(entry["lm_loss"], entry["penalty"]) for entry in logs]))
    (whole, figures), *others = seen
    assert len(whole) == 2
    for steps, own in others:
        for first, second in zip(whole, steps, strict=True):
            for name, gradient in first.items():
                # The same terms in another order, some of them in float32.
                bound = 1e-6 * float(gradient.abs().max())
                torch.testing.assert_close(second[name], gradient, rtol=0, atol=bound, msg=name)
        for one, other in zip(figures, own, strict=True):
            assert other == pytest.approx(one, rel=1e-5)


def test_packed_batches_train_as_padded_ones_do(tmp_path: Path) -> None:
    padded = trainer_in(tmp_path / "a")
    padded.train()
    packed = trainer_in(tmp_path / "b", packed=True)  # a new trainer seeds the noise anew
    packed.train()
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-4)


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer_in(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_in(tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for ours, theirs in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_holds_no_backbone_and_loads_as_routers(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    size = sum(p.numel() * 4 for p in weights(trainer))
    assert (folder / "router.safetensors").stat().st_size < 1.2 * size + 10_000
    assert not list(folder.glob("model*.safetensors"))
    fresh = ec.elasticize(backbone(), folder)
    assert trainer.model is not None
    for ours, theirs in zip(ec.routers(fresh), ec.routers(trainer.model), strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_resuming_with_another_objective_is_refused(tmp_path: Path) -> None:
    trainer_in(tmp_path, steps=2, save_strategy="steps", save_steps=2).train()
    other = trainer_in(tmp_path, steps=2)
    other.objective = LagrangianObjective({"robust": 0.9, "sensitive": 0.3}, seed=0)
    with pytest.raises(ValueError, match=r"objective\.targets\.robust 1\.0 \(now 0\.9\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_logs_hold_every_figure(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    names = {"lm_loss", "penalty", "temperature", "lambda1/robust", "lambda2/sensitive"}
    assert names <= set(entry)
    assert 0 <= entry["msr/robust"] <= 1
    assert entry["temperature"] == 1.5
    assert entry["loss"] == pytest.approx(entry["lm_loss"] + entry["penalty"], rel=1e-5)


def test_checkpointing_gives_the_same_bits(tmp_path: Path) -> None:
    plain = trainer_in(tmp_path / "a")
    plain.train()
    saving = trainer_in(tmp_path / "b")
    assert saving.model is not None
    enable = getattr(saving.model, "activation_checkpointing_enable", None)
    (enable or saving.model.gradient_checkpointing_enable)({"use_reentrant": False})  # type: ignore[operator]
    saving.train()
    for a, b in zip(weights(plain), weights(saving), strict=True):
        assert torch.equal(a, b)


def test_broken_multipliers_stop_the_run_before_any_work(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    with torch.no_grad():
        trainer.objective.lambda1[0] = torch.nan
    before = weights(trainer)[:-2]
    with pytest.raises(ValueError, match=r"lambda1 must be finite.*robust"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer)[:-2], strict=True))


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    assert trainer.model is not None
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(FloatingPointError, match="not finite in step 1"):
        trainer.train()


def test_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    objective = LagrangianObjective({"robust": 1.0})
    model = backbone()
    with pytest.raises(ValueError, match="model is not elastic"):
        RouterTrainer(model, args, objective, train_dataset=Noise())
    ec.elasticize(model, replace(SMALL, policy=ec.AllSparse()))
    with pytest.raises(ValueError, match="policy _Constant"):
        RouterTrainer(model, args, objective, train_dataset=Noise())
