"""What the processes of a run agree on. With one process, nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Launched", "current", "from_first", "highest", "joined", "launched", "together"]

Made = TypeVar("Made")


class Launched(NamedTuple):
    """A process among those that a launcher has started: its number, and how many there are."""

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


@contextmanager
def joined() -> Iterator[Launched]:
    """Let the processes that a launcher has started send each other objects, in the block.

    Each has a GPU of its own, where there are any. One that ends with an error is noticed by the
    launcher, which ends the others. Where they can already, as in a training, nothing is done.

    Raises
    ------
    ValueError
        If there are fewer GPUs than processes on this machine; or see :func:`launched`.
    """
    here = current()
    if here.size > 1 or launched().size == 1:
        yield here
        return
    here = launched()
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", here.rank)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"{local + 1} processes or more want a GPU each; there are {gpus}.")
        torch.cuda.set_device(local)
    # One may be hours behind another.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield here
    finally:
        dist.destroy_process_group()


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


def current() -> Launched:
    """This process among those that can send each other something just now."""
    if dist.is_available() and dist.is_initialized():
        return Launched(dist.get_rank(), dist.get_world_size())
    return Launched(0, 1)


def _several() -> bool:
    return current().size > 1
