"""A training run as a YAML file: what ``elasticore train --config`` reads."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import Dataset

from elasticore.backends.registry import use_backend
from elasticore.models.config import ElasticConfig
from elasticore.models.elastic import elasticize
from elasticore.models.files import save_router
from elasticore.models.loading import load_backbone
from elasticore.router.schedule import temperature_schedule
from elasticore.train.data import Collator, JsonLines, OfflineTasks, PackedSamples
from elasticore.train.objective import LagrangianObjective

if TYPE_CHECKING:
    from elasticore.train.baselines import Baseline

__all__ = ["Recipe", "train"]


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run; the defaults are those of the paper's Table 6.

    Parameters
    ----------
    backbone
        Directory or hub id of the model, or ``"tiny"`` for the one in the package.
    targets
        Ω_MSR wanted per task: a number, or bounds ``[low, high]``.
    data
        ``{kind: offline, tasks: {name: weight}, samples, length}``, ``{kind: jsonl, path,
        max_length}``, or ``{kind: packed, path, loss}`` for packed parquet, whose rows are the
        samples of ``batch_size`` and are always packed.
    elastic
        Settings of :class:`ElasticConfig`.
    policy, policy_settings
        What decides: routers (``elastic``), or a static pattern that is learnt as by DuoAttention
        (``duo``) or PruLong (``prulong``), with the settings of
        :class:`~elasticore.train.baselines.DuoAttention` or
        :class:`~elasticore.train.baselines.PruLong`. Those stand in for targets, learning rates,
        multipliers, weight decay (none) and temperature.
    signed
        The paper's signed penalty (True) or the official code's absolute one (False).
    multiplier_init
        Range that the multipliers start in.
    temperature
        ``{name: cosine | exponential, ...}``, see :mod:`elasticore.router.schedule`.
    max_steps, batch_size, accumulation
        Optimizer steps; samples per forward; forwards per step.
    router_lr, multiplier_lr, weight_decay, warmup_ratio, max_grad_norm
        AdamW with β (0.9, 0.95), linear warm-up, then a cosine to zero.
    reduction, packed
        See :class:`elasticore.train.Collator`.
    dtype
        Of the backbone, ``"bfloat16"`` or ``"float32"``; routers train in float32.
    checkpointing
        Whether layers are recomputed in the backward.
    backend
        What runs the attention.
    seed, logging_steps, save_steps
        Save 0 keeps only the end.
    workers
        Processes that make samples.
    """

    backbone: str
    targets: dict[str, Any]
    data: dict[str, Any]
    elastic: dict[str, Any] = field(default_factory=dict)
    policy: Literal["elastic", "duo", "prulong"] = "elastic"
    policy_settings: dict[str, Any] = field(default_factory=dict)
    signed: bool = False
    temperature: dict[str, Any] = field(default_factory=lambda: {"name": "cosine"})
    max_steps: int = 300
    batch_size: int = 1
    accumulation: int = 48
    router_lr: float = 5e-4
    multiplier_lr: float = 1e-3
    multiplier_init: tuple[float, float] = (0.0, 0.5)
    weight_decay: float = 0.1
    warmup_ratio: float = 0.2
    max_grad_norm: float = 5.0
    reduction: Literal["tokens", "samples"] = "tokens"
    packed: bool = False
    dtype: str = "bfloat16"
    checkpointing: bool = False
    backend: str = "auto"
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    workers: int = 0

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Recipe:
        """Read a YAML file; ``overrides`` that are not None win over it.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no YAML mapping, or names settings that do not exist or misses some.
        """
        import yaml

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"config {path} is no file.")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"config {path} is no YAML: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"config {path} must be a mapping of settings.")
        data |= {key: value for key, value in overrides.items() if value is not None}
        known = {f.name for f in dataclasses.fields(cls)}
        unknown, missing = sorted(set(data) - known), {"backbone", "targets", "data"} - set(data)
        if unknown or missing:
            raise ValueError(
                f"config {path}: unknown settings {unknown}, missing settings {sorted(missing)}; "
                f"there are: {', '.join(sorted(known))}."
            )
        return cls(**data)


def train(recipe: Recipe, output: str | Path, *, resume: str | Path | None = None) -> Path:
    """Run a recipe; return the directory of the trained routers, or of the static pattern.

    Parameters
    ----------
    recipe
        The settings.
    output
        Directory for checkpoints, TensorBoard logs and, in ``output/router``, the result. A static
        pattern is also in ``output/pattern``, in the format of its method.
    resume
        A checkpoint directory of a run with the same recipe.

    Raises
    ------
    ValueError
        If a setting is wrong, or several GPUs are visible to a single process; nothing has been
        written then.
    """
    from transformers import TrainingArguments

    from elasticore.train.baselines import attach_gates, settle_gates
    from elasticore.train.checkpointing import checkpoint_layers
    from elasticore.train.progress import Progress
    from elasticore.train.trainer import RouterTrainer, check_processes

    output = Path(output)
    with use_backend(recipe.backend):  # unknown or unavailable: said now, not after loading
        pass
    config = ElasticConfig.from_dict(recipe.elastic)
    objective = LagrangianObjective(
        recipe.targets, recipe.signed, recipe.multiplier_init, seed=recipe.seed
    )
    temperature = temperature_schedule(**recipe.temperature)
    method = _method(recipe)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.router_lr if method is None else method.lr,
        weight_decay=recipe.weight_decay if method is None else 0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_ratio,
        bf16=False,  # the backbone's dtype decides; routers stay in float32
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or recipe.max_steps,
        report_to=["tensorboard"],
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    check_processes(args)  # and each process now has its own device
    model, tokenizer = load_backbone(recipe.backbone, recipe.dtype)
    dataset = _dataset(recipe, tokenizer)
    if isinstance(dataset, PackedSamples) and (
        without := sorted(set(dataset.tasks) - set(objective.tasks))
    ):
        raise ValueError(
            f"data {dataset.data.path} holds the tasks {', '.join(without)}, which have no target; "
            f"targets name {', '.join(objective.tasks)}."
        )
    torch.manual_seed(recipe.seed)  # of the routers' start
    if method is None:
        elasticize(model, config)
    else:
        attach_gates(model, config, method)
    if recipe.checkpointing:
        checkpoint_layers(model)

    if args.should_save:
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.json").write_text(
            json.dumps(dataclasses.asdict(recipe), indent=2) + "\n", encoding="utf-8"
        )
    collator = Collator(
        objective.tasks,
        tokenizer.pad_token_id or 0,
        recipe.packed or isinstance(dataset, PackedSamples),
        recipe.reduction,
    )
    trained = objective if method is None else method.objective()
    trainer = (RouterTrainer if method is None else method.trainer)(
        model,
        args,
        trained,  # type: ignore[arg-type]
        train_dataset=dataset,
        collator=collator,
        temperature=temperature,
        multiplier_lr=recipe.multiplier_lr if method is None else method.multiplier_lr,
        callbacks=[Progress(trained.tasks)],
    )
    with use_backend(recipe.backend):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if args.should_save:
        history = [entry for entry in trainer.state.log_history if "penalty" in entry]
        (output / "history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        if method is not None:
            settle_gates(model, config, method, output / "pattern")
        save_router(model.eval(), output / "router")
    trainer.accelerator.wait_for_everyone()
    return output / "router"


def _method(recipe: Recipe) -> Baseline | None:
    """The method of a static pattern; None for routers."""
    from elasticore.train.baselines import baseline

    if recipe.policy != "elastic":
        return baseline(recipe.policy, recipe.policy_settings)
    if recipe.policy_settings:
        raise ValueError(
            f"policy_settings {sorted(recipe.policy_settings)} belong to policy duo or prulong; "
            "policy elastic has none."
        )
    return None


def _dataset(recipe: Recipe, tokenizer: Any) -> Dataset[Any]:
    settings = dict(recipe.data)
    kind = settings.pop("kind", None)
    try:
        if kind == "offline":
            processes = int(os.environ.get("WORLD_SIZE", 1))
            samples = recipe.max_steps * recipe.batch_size * recipe.accumulation * processes
            return OfflineTasks(tokenizer, **{"samples": samples, "seed": recipe.seed, **settings})
        if kind == "jsonl":
            return JsonLines(tokenizer=tokenizer, **settings)
        if kind == "packed":
            return PackedSamples(tokenizer=tokenizer, **settings)
    except TypeError as error:
        raise ValueError(f"data does not take these settings: {error}.") from None
    raise ValueError(f"data needs kind: offline, jsonl or packed, got {kind!r}.")
