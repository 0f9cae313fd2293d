"""Trains the routers of an elastic model on the Hugging Face Trainer; the backbone is frozen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from elasticore.checks import check_number
from elasticore.models.attach import state_of
from elasticore.models.elastic import is_elastic, routers, way_of
from elasticore.models.files import WEIGHTS
from elasticore.models.fingerprint import fingerprint
from elasticore.models.passes import PASS, Pass
from elasticore.router import AttentionRouter, CosineTemperature
from elasticore.router.routing import model_msr
from elasticore.train.content import check_samples
from elasticore.train.data import Collator, Learnt, TrainingSample
from elasticore.train.every_step import EveryStep
from elasticore.train.launching import check_processes
from elasticore.train.loss import Head, blocked_cross_entropy, hidden_states
from elasticore.train.monitor import Meter, decision_entropy, entropy_figures
from elasticore.train.objective import LagrangianObjective
from elasticore.train.resuming import ResumableTrainer, load_layers
from elasticore.train.sharding import average_routers, is_sharded
from elasticore.train.slices import SliceCollator, check_slices, form_groups, share_batches

__all__ = ["RouterTrainer"]

OBJECTIVE = "objective.json"
MULTIPLIERS = "multipliers.safetensors"


class RouterTrainer(ResumableTrainer):
    """A :class:`transformers.Trainer` whose only parameters are the routers and the multipliers.

    Checkpoints hold the routers (:meth:`Elastic.save`), the multipliers and the Trainer's own
    optimizer, schedule and random states; never the backbone. Beside the usual figures it logs,
    averaged since the last time: ``lm_loss``, ``penalty``, ``entropy`` (:func:`decision_entropy`;
    also per layer), and ``msr/`` per task; as they are now, ``temperature`` and, per task,
    ``lambda1/`` and ``lambda2/``; and what it cost (:meth:`Meter.read`).

    Several processes (``torchrun``, ``accelerate launch``) work on one batch together: the penalty
    is that of all their samples, and their multipliers stay the same. Their noise differs.

    Parameters
    ----------
    model
        An elastic model with :class:`AttentionRouter` routers. Its backbone is frozen here.
    args
        The Trainer's arguments. ``learning_rate`` and ``weight_decay`` are the routers'.
    objective
        Targets and multipliers.
    train_dataset, eval_dataset
        Datasets of :class:`TrainingSample`.
    collator
        Makes the batches; by default dense or padded ones with a token-mean loss.
    temperature
        ``(step, max_steps) -> τ`` of the routers' sampling.
    multiplier_lr
        Learning rate of the multipliers, which ascend.
    sequence_parallel
        Processes that share the tokens of each batch, which must be packed. The model is attached
        to them here: see :class:`~elasticore.models.parallel.SequenceParallel`.
    identity
        What else a resumed run must share with the one that it goes on from, as JSON values, such
        as a hash of the backbone's weights.
    callbacks
        Further Trainer callbacks.

    Raises
    ------
    TypeError, ValueError
        If the model is not elastic, runs other policies than this trainer's, or the multipliers
        are not finite; if several GPUs are visible to a single process.
    FloatingPointError
        In training, if a loss or a gradient is not finite, before the optimizer's step; the
        message names the step and the samples.
    """

    policy: ClassVar[type[nn.Module]] = AttentionRouter
    objective_type: ClassVar[type[nn.Module]] = LagrangianObjective
    fidelity_name: ClassVar[str] = "lm_loss"
    objective: Any
    step_samples: Tensor
    """Of each task, in the step under way, over all processes."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        objective: LagrangianObjective,
        *,
        train_dataset: Dataset[TrainingSample],
        eval_dataset: Dataset[TrainingSample] | None = None,
        collator: Collator | None = None,
        temperature: Callable[[int, int], float] | None = None,
        multiplier_lr: float = 1e-3,
        sequence_parallel: int = 1,
        identity: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if not isinstance(model, PreTrainedModel) or not is_elastic(model):
            raise ValueError("model is not elastic; call elasticore.elasticize(model, ...) first.")
        if not isinstance(objective, self.objective_type):
            raise TypeError(
                f"objective must be a {self.objective_type.__name__}, got {objective!r}."
            )
        for router in routers(model):
            if not isinstance(router, self.policy):
                raise ValueError(
                    f"model runs the policy {type(router).__name__}, but {type(self).__name__} "
                    f"trains {self.policy.__name__}s; elasticize it with those."
                )
        check_number("multiplier_lr", multiplier_lr, 0)
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"args must be transformers.TrainingArguments, got {args!r}.")
        if collator is not None and not isinstance(collator, Collator):
            raise TypeError(f"collator must be a Collator or None, got {collator!r}.")
        if temperature is not None and not callable(temperature):
            raise TypeError(f"temperature must be callable (step, max_steps), got {temperature!r}.")
        if identity is not None and not isinstance(identity, Mapping):
            raise TypeError(f"identity must be a mapping or None, got {identity!r}.")
        for name, samples in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_samples(name, samples, (collator or objective).tasks)
        if state_of(model).way.prefill != "routed":
            raise ValueError("model must attend with prefill='routed' to train its routers.")
        check_processes(args)
        objective.check()
        model.requires_grad_(False)
        for router in routers(model):
            router.requires_grad_(True)
        collator = collator or Collator(objective.tasks)
        check_slices(sequence_parallel, args.world_size, collator.packed)
        self.slices = form_groups(sequence_parallel)
        if self.slices is not None:
            self.slices.attach(model)
        # Our columns are not arguments of the model's forward, so the Trainer must not drop them.
        args.remove_unused_columns = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every forward asks every router
        self.objective = objective.to(args.device)
        self.temperature = CosineTemperature() if temperature is None else temperature
        self.multiplier_lr = multiplier_lr
        self.packed, self.reduction = collator.packed, collator.reduction
        self.identity = dict(identity or {})
        self.meter = Meter()
        super().__init__(
            model,
            args,
            data_collator=collator
            if self.slices is None
            else SliceCollator(collator, self.slices.rank, self.slices.size),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[EveryStep(self), *callbacks],
        )
        # So the Trainer counts the learnt tokens and leaves it to the loss to average over
        # micro-batches.
        self.model_accepts_loss_kwargs = True
        self.objective.share()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As ever, with the same batches for all processes that share a batch."""
        return share_batches(super().get_train_dataloader(), self.slices)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As :meth:`get_train_dataloader`."""
        return share_batches(super().get_eval_dataloader(eval_dataset), self.slices)

    def settings(self) -> dict[str, Any]:
        """As ever, with how the model attends, what it is, and what is made of the data."""
        model = self._elastic()
        way, temperature = state_of(model).way, self.temperature
        names = {field.name for field in fields(way)} - {"policy", "base", "_"}
        return super().settings() | {
            "sequence_parallel": 1 if self.slices is None else self.slices.size,
            "model": {k: v for k, v in fingerprint(model).items() if k != "name"},
            "dtype": str(model.dtype),
            "policy": [type(way.policy).__name__, repr(way.policy.settings())],
            "way": {name: str(getattr(way, name)) for name in sorted(names)},
            "temperature": repr(temperature) if is_dataclass(temperature) else None,
            "objective": self.objective.config(),
            "collator": {"packed": self.packed, "reduction": self.reduction},
        }

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW: the routers descend, the multipliers ascend."""
        if self.optimizer is None:
            args = self.args
            trained = [p for p in self._elastic().parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": trained,
                        "lr": args.learning_rate,
                        "weight_decay": args.weight_decay,
                    },
                    *self.objective.parameter_groups(self.multiplier_lr, args.weight_decay),
                ],
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step, whose samples are counted before the first one runs."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            task_ids = torch.cat([batch["task_ids"] for batch in batches]).to(device)
            self.step_samples = self.objective.count(task_ids, all_processes=True)
        return batches, tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Language modelling loss plus the Lagrangian penalty (Eq. 8).

        With ``num_items_in_batch``, as in training, it is this micro-batch's part of the loss
        of its step, which :meth:`get_batch_samples` has counted: the parts, and their gradients,
        add up to those of the step in one batch. The logits are never there as a whole; ``outputs``
        holds those of the last position.
        """
        inputs = dict(inputs)
        origins = inputs.pop("origins", [])
        task_ids, labels = inputs.pop("task_ids"), inputs.pop("labels")
        weights, predicting = inputs.pop("loss_weights"), inputs.pop("predicting")
        learnt = Learnt(
            labels.flatten()[predicting + 1], weights.flatten()[predicting + 1], predicting
        )
        here = learnt.part(*inputs.pop("slice")) if "slice" in inputs else learnt
        backbone = self._elastic()
        self.note_samples(origins, model.training)
        one = Pass(inputs.pop("prompt"))
        try:
            lm_loss, outputs = self.fidelity(model, backbone, {**inputs, PASS: one}, here)
        except ValueError as error:  # on a CPU, a gate that is NaN is refused
            if all(r.logits is None or bool(r.logits.isfinite().all()) for r in one.routings):
                raise
            raise self.not_finite("a router's logits", origins) from error
        decided = one.routings
        msr = model_msr(decided)
        if self.slices is not None:
            # From a slice's tokens and heads to the batch's, for gradients that DDP will average.
            lm_loss = self.slices.mean(lm_loss * self.slices.size)
            msr = self.slices.mean(msr)
        if not model.training:
            count = len(predicting) if self.reduction == "tokens" else len(task_ids)
            self.validation.add(lm_loss, count, msr, task_ids)
        # Processes may have different numbers of batches in evaluation: none waits for another.
        accumulating = model.training and num_items_in_batch is not None
        penalty, task_msr, count = self.objective(
            msr,
            task_ids,
            all_processes=model.training,
            step=self.step_samples if accumulating else None,
        )
        # In a step of several micro-batches, what this one adds to their sum.
        steps = self.current_gradient_accumulation_steps if accumulating else 1
        if accumulating:
            lm_loss = lm_loss * self._share(len(predicting), len(task_ids), num_items_in_batch)
        loss = lm_loss + penalty
        if not bool(torch.isfinite(loss)):
            raise self.not_finite(
                f"the loss ({self.fidelity_name} {lm_loss.item():g}, penalty {penalty.item():g})",
                origins,
            )
        if model.training:
            self.meter.add(self.fidelity_name, lm_loss, 1 / steps)
            self.meter.add("penalty", penalty, 1 / steps)
            self.meter.add("msr", task_msr.nan_to_num() * count, count)
            entropy = decision_entropy(decided)
            if entropy is not None:
                self.meter.add("entropy", entropy * len(task_ids), len(task_ids))
            self.meter.count(inputs, len(here.labels))
        return (loss, outputs) if return_outputs else loss

    def fidelity(
        self, model: nn.Module, backbone: PreTrainedModel, inputs: dict[str, Any], learnt: Learnt
    ) -> tuple[Tensor, Any]:
        """What sparse heads must not spoil: the language modelling loss, and the model's output.

        Parameters
        ----------
        model
            What to call; see :func:`hidden_states`.
        backbone
            The elastic model itself.
        inputs
            Its arguments, the :class:`Pass` that is to hold the routings among them.
        learnt
            What the loss is made of.
        """
        hidden, outputs = hidden_states(model, backbone, inputs)
        loss = blocked_cross_entropy(
            learnt.rows(hidden), learnt.labels, learnt.weights, Head.of(backbone)
        )
        return loss, outputs

    def before_step(self, step: int, max_steps: int) -> None:
        """Set what changes over a run: the temperature."""
        for router in routers(self._elastic()):
            router.temperature = self.temperature(step, max_steps)  # type: ignore[assignment]

    def figures(self) -> dict[str, float]:
        """What to log beside losses and Ω_MSR."""
        temperature: Any = routers(self._elastic())[0].temperature
        return {"temperature": temperature}

    def save_policies(self, folder: Path) -> None:
        """Write what was trained into a checkpoint."""
        # Without a card, which somebody might fill in: a checkpoint's files must stay as they are.
        way_of(self._elastic()).save(folder, card=False)

    def load_policies(self, folder: Path) -> None:
        """Copy what a checkpoint holds into the model's routers, which the optimizer has."""
        load_layers(self._elastic(), folder / WEIGHTS)

    def _share(self, tokens: int, samples: int, num_items_in_batch: Any) -> Tensor | float:
        """What a micro-batch's mean counts for in the mean over its optimizer step.

        Parameters
        ----------
        tokens, samples
            Learnt tokens, and samples, of the micro-batch.
        num_items_in_batch
            Learnt tokens of all its step's micro-batches, over all processes, as the Trainer counts
            them.
        """
        if tokens == 0:
            return 0.0
        # Processes average their gradients, but what is counted is that of all.
        processes = self.accelerator.num_processes
        if self.reduction == "samples":
            return samples * processes / self.step_samples.sum()
        averaged = self.args.average_tokens_across_devices
        return tokens * (processes if averaged else 1) / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our own figures to what the Trainer logs during training."""
        if "loss" in logs and self.meter:
            means, costs = self.meter.read(self.args.device, self.accelerator.reduce)
            shares = means.pop("msr").tolist()
            if "entropy" in means:
                logs |= entropy_figures(means.pop("entropy"))
            logs |= {name: float(mean) for name, mean in means.items()}
            logs |= self.figures() | self.objective.figures() | costs
            for task, share in zip(self.objective.tasks, shares, strict=True):
                if not math.isnan(share):  # 0 / 0 if the task was absent
                    logs[f"msr/{task}"] = share
        super().log(logs, start_time)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        wrapped = super()._wrap_model(model, training, dataloader)
        if training and wrapped is self.model and is_sharded(wrapped):
            # accelerate would: it does so for whole models, and refuses one in shards.
            return average_routers(wrapped, **self.accelerator.ddp_handler.to_kwargs())
        return wrapped

    def _elastic(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from safetensors.torch import save_file

        self.objective.check()
        if not self.args.should_save:  # newer Trainers ask every process
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        self.save_policies(folder)
        tensors = {n: p.detach().cpu() for n, p in self.objective.named_parameters()}
        save_file(tensors, folder / MULTIPLIERS)
        text = json.dumps(self.objective.config(), indent=2) + "\n"
        (folder / OBJECTIVE).write_text(text, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        folder = Path(resume_from_checkpoint)
        self.load_policies(folder)
        self.objective.load_state_dict(load_file(folder / MULTIPLIERS), strict=True)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self.load_policies(Path(self.state.best_model_checkpoint))
