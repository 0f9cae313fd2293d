"""What a recipe would run, without running it: checks, and figures that are exact."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from elasticore.assets import backbone_path
from elasticore.models.families import attention_layers, family_of, is_local
from elasticore.models.loading import load_tokenizer
from elasticore.processes import launched
from elasticore.router.policies import LayerShape
from elasticore.train.content import check_samples
from elasticore.train.data import PackedSamples
from elasticore.train.recipe import Parts, Recipe, dataset_of, parts_of
from elasticore.train.sharding import check_sharding, shardable
from elasticore.train.slices import check_slices

__all__ = ["Preview", "preview"]


@dataclass
class Preview:
    """What would run.

    Attributes
    ----------
    figures
        By name, in an order to read them in.
    unchecked
        What could not be checked here, and why.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)


def preview(recipe: Recipe) -> Preview:
    """Check a recipe with its backbone's configuration and its data; no weights are loaded.

    The processes are those that a launcher has started, as ``WORLD_SIZE`` says.

    Raises
    ------
    ValueError
        If a setting is wrong, or does not fit the backbone or the data. A backbone or data that
        are not here are no error: they are in :attr:`Preview.unchecked`.
    """
    parts = parts_of(recipe)
    processes = launched().size
    check_sharding(recipe.sharding, processes)
    packed = recipe.packed or recipe.data.get("kind") == "packed"
    check_slices(recipe.sequence_parallel, processes, packed)
    result = Preview()
    result.figures |= {
        "backbone": recipe.backbone,
        "policy": recipe.policy,
        "retrieval": str(parts.way.retrieval),
        "sparse": str(parts.way.sparse),
        "tokens of a block": parts.way.block_size,
        "targets": parts.objective.config()["targets"],
        "steps": recipe.max_steps,
        "processes": processes,
        "sequence parallel": recipe.sequence_parallel,
        "rows per step": recipe.batch_size
        * recipe.accumulation
        * (processes // recipe.sequence_parallel),
    }
    try:
        path = backbone_path(recipe.backbone)
        _weigh(recipe, parts, path, processes, result)
    except OSError:
        result.unchecked.append(
            f"backbone {recipe.backbone} is no directory with a model, and the hub did not give "
            "it; so its sizes and the data."
        )
        return result
    try:
        _look(recipe, parts, result)
    except OSError as error:
        result.unchecked.append(f"data: {error}")
    return result


def _weigh(recipe: Recipe, parts: Parts, path: str, processes: int, result: Preview) -> None:
    """Add the sizes of the model, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, recipe.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        family_of(model)
        # No layer computes here, so the model is not made elastic: its policy alone says the sizes.
        layers = [layer for layer in attention_layers(model) if not is_local(layer)]
        heads = model.config.num_key_value_heads
        policies = parts.way.policy.modules(
            [LayerShape(heads, int(layer.head_dim), torch.device("meta")) for layer in layers]  # type: ignore[arg-type]
        )
    weights = sum(p.numel() for p in model.parameters())
    here = {"none": 1, "full": processes}.get(recipe.sharding) or int(
        os.environ["LOCAL_WORLD_SIZE"]
    )
    split = [p for layer in shardable(model) for p in layer]
    kept = weights - sum(p.numel() for p in split)
    # FSDP2 splits along the first axis and gives all the size of the largest part.
    kept += sum(-(-p.shape[0] // here) * (p.numel() // p.shape[0]) for p in split)
    trained = sum(p.numel() for policy in policies for p in policy.parameters())
    result.figures |= {
        "elastic layers": len(layers),
        "positions": model.config.max_position_embeddings,
        "KV heads": heads,
        "parameters that train": trained,
        "frozen parameters": weights,
        "sharding": recipe.sharding,
        "GB of weights per process": kept * dtype.itemsize / 1e9,
        # Weights, gradients and both of Adam's moments, in float32.
        "GB for what trains": trained * 16 / 1e9,
    }


def _look(recipe: Recipe, parts: Parts, result: Preview) -> None:
    """Add what the data hold."""
    tokenizer = load_tokenizer(recipe.backbone)
    positions = result.figures["positions"]
    if recipe.validation:
        held_out: Any = dataset_of(recipe, tokenizer, held_out=True)
        check_samples("validation", held_out, parts.objective.tasks, positions)
        result.figures["rows held out"] = len(held_out)
    dataset: Any = dataset_of(recipe, tokenizer)
    check_samples("data", dataset, parts.objective.tasks, positions)
    longest = dataset.longest
    if isinstance(dataset, PackedSamples):
        longest = dataset.data.header.capacity
    result.figures["rows of data"] = len(dataset)
    if longest is not None:
        result.figures["tokens of a row, at most"] = longest
        result.figures["tokens per step, at most"] = longest * result.figures["rows per step"]
