"""A frozen backbone in shards: processes keep a part of each layer and gather it to use it."""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from elasticore.models.elastic import is_elastic
from elasticore.models.state import ROUTER

__all__ = [
    "Sharding",
    "average_routers",
    "check_sharding",
    "is_sharded",
    "shard_backbone",
    "shardable",
]

Sharding = Literal["none", "full", "hybrid"]


def check_sharding(sharding: object, processes: int) -> None:
    """Raise ``ValueError`` unless ``sharding`` is a way to spread a model over ``processes``.

    ``"hybrid"`` reads the processes of a node from ``LOCAL_WORLD_SIZE``, which launchers set.
    """
    ways = get_args(Sharding)
    if sharding not in ways:
        raise ValueError(f"sharding must be one of {', '.join(ways)}, got {sharding!r}.")
    if sharding == "none":
        return
    if processes == 1:
        raise ValueError(
            f"sharding is {sharding!r}, but there is one process to hold the model; start several "
            "with torchrun or accelerate launch, or set sharding to none."
        )
    if sharding == "hybrid":
        here = os.environ.get("LOCAL_WORLD_SIZE", "")
        if not here.isdigit() or int(here) == 0 or processes % int(here):
            raise ValueError(
                "sharding is 'hybrid', which shards inside a node, but LOCAL_WORLD_SIZE is "
                f"{here!r} with {processes} processes; start equally many on every node with "
                "torchrun or accelerate launch, or set sharding to full."
            )


def shard_backbone(model: PreTrainedModel, sharding: Sharding = "full") -> None:
    """Split the weight matrices of the decoder layers over the processes of a distributed run.

    A process gathers a layer's matrices when it comes to the layer, forward and backward, and lets
    go of them afterwards (FSDP2). Routers stay whole in every process, and so do embeddings, head,
    norms and biases: the loss calls the head by itself, and a checkpoint needs no gathering.

    Parameters
    ----------
    model
        An elastic model, the same in all processes; changed in place. Its parts go to the
        processes' own devices.
    sharding
        ``"full"`` splits over all processes. ``"hybrid"`` splits over those of a node, and every
        node holds the whole model; then layers are gathered inside a node only. ``"none"`` leaves
        the model as it is.

    Raises
    ------
    ValueError
        If the model is not elastic or sharded already, or :func:`check_sharding` refuses.
    """
    if not is_elastic(model):
        raise ValueError("model is not elastic; call elasticore.elasticize(model, ...) first.")
    if is_sharded(model):
        raise ValueError("model is sharded already; load it again to shard it in another way.")
    check_sharding(sharding, dist.get_world_size() if dist.is_initialized() else 1)
    if sharding == "none":
        return
    mesh = _mesh(sharding)
    layers: Any = model.base_model.layers
    for layer, matrices in zip(layers, shardable(model), strict=True):
        fully_shard(layer, mesh=mesh, ignored_params=set(layer.parameters()) - set(matrices))
    # As their root the model manages nothing itself; it lets a layer be gathered while the one
    # before it computes.
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()))


def shardable(model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """What :func:`shard_backbone` splits of each decoder layer: matrices, but for a router's."""
    layers: Any = model.base_model.layers
    return [
        [p for name, p in layer.named_parameters() if p.ndim > 1 and ROUTER not in name.split(".")]
        for layer in layers
    ]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` has been through :func:`shard_backbone`."""
    return isinstance(model, FSDPModule)


def average_routers(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wrap a sharded model so that what trains is the same in all processes.

    That is DDP over the parameters that train; it never touches the frozen ones.

    Parameters
    ----------
    model
        A sharded model whose backbone is frozen.
    **options
        Of :class:`~torch.nn.parallel.DistributedDataParallel`.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(model, **options)


def _mesh(sharding: str) -> DeviceMesh:
    """All processes in a row; or a row per node."""
    device = "cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu"
    processes = dist.get_world_size()
    if sharding == "full":
        return init_device_mesh(device, (processes,), mesh_dim_names=("shard",))
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return init_device_mesh(
        device, (processes // here, here), mesh_dim_names=("replicate", "shard")
    )
