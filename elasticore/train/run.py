"""A recipe from its start to its routers: what ``elasticore train`` runs."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elasticore.choice import use_backend
from elasticore.models.elastic import elasticize, routers, way_of
from elasticore.models.fingerprint import weights_hash
from elasticore.models.loading import load_backbone
from elasticore.places import free_bytes, held, whole_folder, write_text
from elasticore.router.policies import Router
from elasticore.train.checkpoints import find_checkpoint, newest
from elasticore.train.content import check_samples
from elasticore.train.data import Collator
from elasticore.train.recipe import Parts, Recipe, dataset_of, parts_of

__all__ = ["train"]

ROUTER = "router"
TIMEOUT = 600
"""Seconds that a process waits for the others before it gives up: one of them has died or hangs."""


def train(recipe: Recipe, output: str | Path, *, resume: str | Path | None = None) -> Path:
    """Run a recipe; return the directory of the trained routers, or of the static pattern.

    Parameters
    ----------
    recipe
        The settings.
    output
        Directory for checkpoints, TensorBoard logs and, in ``output/router``, the result, which
        appears there whole. A static pattern is also in ``output/pattern``, in the format of its
        method.
    resume
        A checkpoint of a run with the same recipe, backbone and data; or the folder of a run, for
        its newest whole checkpoint; or ``"auto"``: the newest in ``output``, and the start where
        there is none.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint to resume from.
    FileExistsError
        If ``output`` holds checkpoints of an earlier run, and ``resume`` is None; or the result of
        one that has left none.
    BlockingIOError
        If another run writes to ``output``.
    ValueError
        If a setting is wrong, or several GPUs are visible to a single process; nothing has been
        written then.
    OSError
        If the result cannot be written; the message says how much room it takes.
    """
    from elasticore.processes import from_first, launched
    from elasticore.train.launching import check_processes

    launched()  # before the Trainer believes the environment
    output, parts = Path(output), parts_of(recipe)
    args = _arguments(recipe, output, parts)
    check_processes(args)  # and each process now has its own device
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(held(output)))
        start = from_first(lambda: _start(output, resume))
        return _run(recipe, parts, args, output, start)


def _run(recipe: Recipe, parts: Parts, args: Any, output: Path, start: Path | None) -> Path:
    from transformers import PrinterCallback

    from elasticore.processes import together
    from elasticore.train.calibration import pooled_keys
    from elasticore.train.checkpointing import checkpoint_layers
    from elasticore.train.monitor import HistoryFile
    from elasticore.train.progress import Progress
    from elasticore.train.sharding import check_sharding, shard_backbone
    from elasticore.train.slices import check_slices
    from elasticore.train.trainer import RouterTrainer

    way, objective, temperature, method, _ = parts
    check_sharding(recipe.sharding, args.world_size)
    packed = recipe.packed or recipe.data.get("kind") == "packed"
    check_slices(recipe.sequence_parallel, args.world_size, packed)
    model, tokenizer = load_backbone(recipe.backbone, recipe.dtype)
    dataset = dataset_of(recipe, tokenizer)
    held_out = dataset_of(recipe, tokenizer, held_out=True) if recipe.validation else None
    positions = model.config.max_position_embeddings
    for name, samples in (("data", dataset), ("validation", held_out)):
        check_samples(name, samples, objective.tasks, positions)
    weights = weights_hash(model.parameters())  # before any is sharded
    pooled: list[Tensor] = []
    if recipe.calibration and isinstance(way.policy, Router) and way.policy.weights is None:
        with use_backend(recipe.backend):
            pooled = pooled_keys(model, dataset, recipe.calibration, way.policy.boundary)
    torch.manual_seed(recipe.seed)  # of the routers' start
    elasticize(model, way)
    for router, keys in zip(routers(model), pooled, strict=False):  # none where none are wanted
        router.calibrate(keys)  # type: ignore[operator]
    if recipe.checkpointing:
        checkpoint_layers(model)
    shard_backbone(model, recipe.sharding)

    collator = Collator(objective.tasks, tokenizer.pad_token_id or 0, packed, recipe.reduction)
    trained = objective if method is None else method.objective()
    trainer = (RouterTrainer if method is None else method.trainer)(
        model,
        args,
        trained,  # type: ignore[arg-type]
        train_dataset=dataset,
        eval_dataset=held_out,
        collator=collator,
        temperature=temperature,
        multiplier_lr=recipe.multiplier_lr if method is None else method.multiplier_lr,
        sequence_parallel=recipe.sequence_parallel,
        identity={"backbone": weights},
        callbacks=[Progress(trained.tasks), HistoryFile()],
    )
    if start is not None:
        trainer.check_resumable(start)
    if args.should_save:
        text = json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"
        write_text(output / "recipe.json", text)
    trainer.remove_callback(PrinterCallback)  # Progress speaks, and not on standard output
    with use_backend(recipe.backend):
        trainer.train(resume_from_checkpoint=start)
    if recipe.keep_best:
        trainer.load_best()
    together(lambda: _save(model, output, method) if args.should_save else None, args.device)
    return output / ROUTER


def _arguments(recipe: Recipe, output: Path, parts: Parts) -> Any:
    """What the Trainer takes."""
    from transformers import TrainingArguments

    method = parts.method
    return TrainingArguments(
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
        save_total_limit=recipe.keep or None,
        ddp_timeout=TIMEOUT,
        eval_strategy="steps" if recipe.validation else "no",
        eval_steps=recipe.eval_steps,
        per_device_eval_batch_size=recipe.batch_size,
        prediction_loss_only=True,
        metric_for_best_model="loss" if recipe.validation else None,
        greater_is_better=False if recipe.validation else None,
        report_to=parts.report_to,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def _start(output: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint to go on from; None for a new run."""
    if resume is not None and str(resume) != "auto":
        return find_checkpoint(resume)
    there = newest(output)
    if there is not None and resume is None:
        raise FileExistsError(
            f"output {output} holds {there.name} of an earlier run; pass resume auto to go on from "
            "it, or another output to start anew."
        )
    if there is None and (output / ROUTER).exists():
        raise FileExistsError(
            f"output {output} holds the {ROUTER} of an earlier run, and no checkpoint to go on "
            "from; choose another output to start anew, or move it away."
        )
    return there


def _save(model: Any, output: Path, method: Any) -> None:
    """Write the result, so that it is there whole or not at all."""
    from elasticore.train.baselines import settle_gates

    size = sum(p.numel() * p.element_size() for r in routers(model) for p in r.parameters())
    try:
        if method is not None:
            with whole_folder(output / "pattern") as folder:
                settle_gates(model, folder)
        with whole_folder(output / ROUTER) as folder:
            way_of(model).save(folder)
    except OSError as error:
        last = newest(output)
        then = f"with --resume auto goes on from {last.name}" if last else "trains anew"
        raise OSError(
            f"the result could not be written to {output}: {error}. It takes about "
            f"{size / 1e6:,.1f} MB, and {free_bytes(output)}. Free space; then the same command "
            f"{then}."
        ) from error
