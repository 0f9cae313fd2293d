"""What the processes of a run agree on. With one process, nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Launched", "check_processes", "from_first", "highest", "launched", "together"]

if TYPE_CHECKING:
    from transformers import TrainingArguments

Made = TypeVar("Made")


class Launched(NamedTuple):
    """What a launcher says to a process that it has started."""

    rank: int
    size: int


def launched() -> Launched:
    """This process's number and how many there are, as ``RANK`` and ``WORLD_SIZE`` say.

    Raises
    ------
    ValueError
        If they say nothing that can be, as what an earlier job has left in the environment.
    """
    numbers = []
    for name, least, default in (("WORLD_SIZE", 1, "1"), ("RANK", 0, "0")):
        text = os.environ.get(name, default)
        if not text.isdecimal() or int(text) < least:
            raise ValueError(
                f"{name} in the environment is {text!r}, and must be a number from {least} up; "
                "unset it, or start the processes with torchrun."
            )
        numbers.append(int(text))
    size, rank = numbers
    if rank >= size:
        raise ValueError(
            f"RANK in the environment is {rank}, but WORLD_SIZE says that there are {size} "
            "processes; unset RANK if no launcher has set it, or start with torchrun."
        )
    return Launched(rank, size)


def check_processes(args: TrainingArguments) -> None:
    """Raise unless every process has one device, and knows of the others.

    Raises
    ------
    ValueError
        If the Trainer would copy the model to several GPUs of this one process, or a launcher has
        started processes that each would train alone; the message says what to do.
    """
    size = launched().size
    if args.world_size != size:
        raise ValueError(
            f"args has world_size {args.world_size}, but a launcher has started {size} "
            "processes, which would all train alone. Without GPUs, pass use_cpu=True and set "
            "ACCELERATE_USE_CPU=true."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"args sees {args.n_gpu} GPUs in one process, for which the Trainer uses "
            "nn.DataParallel; its copies of the model lose the routing. Start a process per GPU, "
            f"with torchrun --nproc-per-node {args.n_gpu} or accelerate launch, or show this one a "
            "single GPU with CUDA_VISIBLE_DEVICES=0."
        )


def highest(number: int, device: torch.device) -> int:
    """The highest of all processes' numbers: a reduction of four bytes, and a wait for it."""
    if not _several():
        return number
    found = torch.tensor(number, dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_first(make: Callable[[], Made]) -> Made:
    """What ``make`` returns in the first process, given to all; or what it raises, raised in all.

    Whatever is read from a file system that nodes share may look different to another node.
    """
    if not _several():
        return make()
    made: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except (ValueError, OSError) as error:
            made[1] = error
    dist.broadcast_object_list(made, 0)
    if made[1] is not None:
        raise made[1]
    return made[0]


def together(action: Callable[[], None], device: torch.device) -> None:
    """Run ``action`` in every process; where it fails in one, raise in all, so that none waits.

    Raises
    ------
    RuntimeError
        In a process where it went well, if it failed in another, which tells why.
    """
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    if highest(failure is not None, device):
        raise failure or RuntimeError("another process failed at the same; see what it says.")


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
