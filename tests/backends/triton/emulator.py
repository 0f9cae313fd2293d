"""Runs the Hopper kernels' own source on a CPU: each warp group a thread, in a random order.

Emulated are barriers with phases and byte counts; copies that land at any later time, and leave NaN
until then; products that read shared memory at any time before the wait for them; two programs at
once. So a stage that is overwritten too early or read too late shows as NaN or as a wrong result,
and a wait for what never comes as a deadlock. Not emulated: layouts, fences between a warp's and
the copy engine's accesses, and what the compiler makes of it all.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch


def launch(function: Any, grid: Any, arguments: Any, key: Any, *, seed: int, skip: str = "",
           **options: Any) -> None:  # fmt: skip
    """Stands for the backend's ``launch``; ``skip`` names a function whose waits are left out."""
    global world
    world = World(seed, skip)
    kernel = plain(function, {})
    for _ in range(min(grid[0], 2)):
        kernel(*map(argument, arguments))
    world.run()


class Task(threading.Thread):
    """A warp group. Its products are computed in order, each at some time before the wait."""

    def __init__(self, body: Callable[..., None], arguments: Any) -> None:
        super().__init__(daemon=True)
        self.body, self.arguments = body, arguments
        self.turn, self.ready = threading.Semaphore(0), lambda: True
        self.products: list[SimpleNamespace] = []
        self.copies: list[Callable[[], None]] = []

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.body(*self.arguments)
        except BaseException as error:
            world.error = world.error or error
        world.tasks.remove(self)
        world.go_on()


class World:
    """Threads of which one runs at a time, and events that happen in between."""

    def __init__(self, seed: int, skip: str) -> None:
        self.random, self.skip = random.Random(seed), skip
        self.rate = self.random.choice([0.05, 0.3, 0.7])  # of events against threads
        self.tasks: list[Task] = []
        self.events: list[tuple[Callable[[], bool], Callable[[], None]]] = []  # may it, what
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        for task in self.tasks:
            task.start()
        self.go_on()
        self.done.wait()
        if self.error is not None:
            raise self.error
        assert not self.events, "something is still on its way"

    def go_on(self) -> None:
        while self.tasks and self.error is None:
            ready = [task for task in self.tasks if task.ready()]
            events = [event for event in self.events if event[0]()]
            if events and (not ready or self.random.random() < self.rate):
                event = self.random.choice(events)
                self.events.remove(event)
                event[1]()
            elif ready:
                return self.random.choice(ready).turn.release()
            else:
                self.error = AssertionError("deadlock: every thread waits")
        self.done.set()


world = World(0, "")


def pause(ready: Callable[[], Any] = lambda: True) -> Task:
    """Let others go on, and come back when ``ready``."""
    me = threading.current_thread()
    assert isinstance(me, Task)
    me.ready = ready
    world.go_on()
    me.turn.acquire()
    me.ready = lambda: True
    return me


class Array(np.ndarray):
    """A kernel's tensor or number, or a place in shared memory."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Array:
        return array(self.astype(dtype))

    def index(self, i: Any) -> Array:
        return self[int(i)]

    def slice(self, start: int, length: int) -> Array:
        return self[start : start + length]

    def permute(self, order: tuple[int, ...]) -> Array:
        return self.transpose(order)

    def load(self, layout: None) -> Array:
        pause()
        return self.copy()

    def store(self, x: Array) -> None:
        pause()
        self[...] = x


def array(x: Any) -> Array:
    return np.array(x).view(Array)


class Pointer:
    def __init__(self, memory: np.ndarray, at: Any) -> None:
        self.memory, self.at = memory, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, np.asarray(self.at) + np.asarray(offset, np.int64))

    def __sub__(self, offset: Any) -> Pointer:
        return self + -np.int64(offset)

    def places(self, *others: Any) -> Any:
        at, mask, *others = np.broadcast_arrays(self.at, *others)
        assert ((at >= 0) & (at < self.memory.size))[mask].all(), "outside of the tensor"
        return at, mask, *others


class Descriptor:
    dtype, layout = np.float16, None

    def __init__(self, given: Any) -> None:
        self.x = torch.as_strided(given.base.detach(), given.shape, given.strides).numpy()
        self.block_shape = given.block_shape
        self.block_type = SimpleNamespace(nbytes=2 * int(np.prod(given.block_shape)))


def argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        size = x.untyped_storage().nbytes() // x.element_size()
        return Pointer(x.detach().as_strided((size,), (1,), 0).numpy(), x.storage_offset())
    return Descriptor(x) if hasattr(x, "block_shape") else x


def load(p: Pointer, mask: Any = True, other: Any = 0) -> Array:
    pause()
    at, mask = p.places(mask)
    return array(np.where(mask, p.memory[np.where(mask, at, 0)], other)).to(p.memory.dtype)


def store(p: Pointer, x: Array, mask: Any) -> None:
    at, mask, x = p.places(mask, x)
    p.memory[at[mask]] = x[mask]


def atomic_add(p: Pointer, n: int) -> Array:
    pause()
    p.memory[p.at] += n
    return array(p.memory[p.at] - n)


def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barriers(Barrier() for _ in range(shape[0]))
    return array(np.full(shape, 77 if dtype == np.int32 else np.nan, dtype))


class Barriers(list["Barrier"]):
    def index(self, i: Any) -> Barrier:
        return self[int(i)]


class Barrier:
    phase = bytes = 0

    def change(self, arrivals: int, size: int) -> None:
        self.left -= arrivals
        self.bytes += size
        assert self.left >= 0, "more arrivals than a phase has"
        if self.left == self.bytes == 0:
            self.phase, self.left = self.phase + 1, self.count


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.left = count


def wait(barrier: Barrier, parity: Any) -> None:
    skipped = sys._getframe(1).f_code.co_name == world.skip
    pause(lambda: skipped or barrier.phase % 2 != parity)


def arrive(barrier: Barrier, count: int) -> None:
    pause()
    barrier.change(count, 0)


def expect(barrier: Barrier, size: int, pred: Any = True) -> None:
    pause()
    barrier.change(int(pred), size * int(pred))


def copy(of: Descriptor, place: Any, barrier: Barrier, to: Array, pred: Any = True) -> None:
    def land() -> None:
        box = np.zeros(of.block_shape, np.float16)
        token = first + np.arange(box.shape[2])
        inside = (token >= 0) & (token < of.x.shape[2])
        box[0, 0, inside] = of.x[batch, head, token[inside]]
        to[...] = box.reshape(to.shape)
        barrier.change(0, -of.block_type.nbytes)

    pause()
    batch, head, first = (int(i) for i in place[:3])
    if pred:
        to[...] = np.nan
        world.events.append((lambda: True, land))


def copy_masked(to: Array, p: Pointer, mask: Any) -> None:
    to[...] = np.nan
    pause().copies.append(lambda: to.store(load(p, mask)))


def wait_group(left: int) -> None:
    copies = pause().copies
    while copies:
        copies.pop(0)()


def mma(a: Any, b: Array, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    def compute() -> None:
        queue.remove(product)
        x = np.asarray(a, np.float32) @ np.asarray(b, np.float32)
        product.result = array(x + acc if use_acc else x)

    queue, product = pause().products, SimpleNamespace(result=None)
    queue.append(product)
    world.events.append((lambda: queue[0] is product, compute))
    return product if is_async else mma_wait(0, [product])


def mma_wait(left: int, deps: list[SimpleNamespace]) -> Any:
    queue = pause().products
    pause(lambda: len(queue) <= left)
    results = [product.result for product in deps]
    assert all(result is not None for result in results), "used before it was waited for"
    return results[0] if len(results) == 1 else tuple(results)


def on(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda *arguments: array(function(*(np.asarray(x) for x in arguments)))


LAYOUTS = ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout",
           "SwizzledSharedLayout", "DistributedLinearLayout")  # fmt: skip
FAKES: dict[str, Any] = {
    "gl": SimpleNamespace(
        int32=np.int32, int64=np.int64, float32=np.float32, static_range=range,
        num_warps=lambda: 4, convert_layout=lambda x, layout: x, allocate_shared_memory=allocate,
        load=load, store=store, atomic_add=atomic_add, where=on(np.where), log2=on(np.log2),
        zeros=lambda shape, dtype, layout: array(np.zeros(shape, dtype)),
        full=lambda shape, x, dtype, layout: array(np.full(shape, x, dtype)),
        arange=lambda start, end, layout: array(np.arange(start, end)),
        max=lambda x, axis: array(np.max(x, axis)), sum=lambda x, axis: array(np.sum(x, axis)),
        exp2=lambda x: array(np.exp2(np.float32(x))), cdiv=on(lambda a, b: -(-a // b)),
        maximum=on(np.maximum), minimum=on(np.minimum),
        warp_specialize=lambda parts, *_: world.tasks.extend(Task(*part) for part in parts),
        **dict.fromkeys(LAYOUTS, lambda *_, **__: None)),
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "barrier", init=init, wait=wait, arrive=arrive, expect=expect),
    "async_copy": SimpleNamespace(commit_group=lambda: None, wait_group=wait_group),
    "copy": copy, "copy_masked": copy_masked, "fence_async_shared": lambda: None,
    "warpgroup_mma": mma, "warpgroup_mma_wait": mma_wait,
    "_shrink": lambda o, factor: o * factor[:, None],
}  # fmt: skip


def plain(function: Any, done: dict[Any, Any]) -> Any:
    """A jitted function, and all that it calls, as Python functions that see the fakes."""
    code = function.fn
    if code not in done:
        names = dict(code.__globals__)
        done[code] = FunctionType(code.__code__, names, code.__name__, code.__defaults__)
        for name, x in list(names.items()):
            if name in FAKES:
                names[name] = FAKES[name]
            elif hasattr(x, "fn"):
                names[name] = plain(x, done)
            elif type(x).__name__ == "constexpr":
                names[name] = x.value
    return done[code]
