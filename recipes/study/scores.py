"""Scores of ways to attend, each kept in a file so that none is measured twice."""

from __future__ import annotations

import copy
import importlib
import json
import os
import platform
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

import elasticore as ec
from elasticore.eval.corpus import Split
from elasticore.eval.methods import Method
from elasticore.eval.tasks import TASKS, Sample, Task, make_sample
from elasticore.eval.teacher_forced import Score, score
from elasticore.models.loading import TINY, load_backbone
from recipes.study.replay import Replayed, packed
from recipes.study.runs import console

__all__ = [
    "UNSEEN",
    "Cut",
    "Static",
    "Scorer",
    "Stretched",
    "Way",
    "identity",
    "means",
    "mean_msr",
    "streaming",
    "value",
    "window",
]

Figures = dict[str, dict[str, Any]]
"""Per task, figures by name."""

ROUTER = "router.safetensors"
LAST_BIAS = "router_mlp.4.bias"
UNSEEN = 900_000_000
"""Seeds of the training split from here on are reached by no training."""


class Way(Protocol):
    """How a model attends, with a name: a :class:`Method` of the library, or a head table."""

    name: str

    def on(self, model: Any) -> Any:
        """A context in which the model attends like this."""


@dataclass(frozen=True)
class Static:
    """The same heads stream for every input.

    Attributes
    ----------
    name
        As it is shown, and of its file.
    table
        Which ones.
    streams
        What they read, as :func:`streaming` returns it.
    """

    name: str
    table: ec.HeadTable
    streams: ec.Elastic = field(repr=False)

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """See :class:`Way`."""
        return replace(self.streams, policy=self.table).on(model)


@dataclass(frozen=True)
class Stretched:
    """Another way on positions that are stretched by YaRN, for prompts beyond the trained length.

    Attributes
    ----------
    way
        What attends.
    factor
        Length over trained length.
    """

    way: Way
    factor: float

    @property
    def name(self) -> str:
        """As it is shown, and of its file."""
        return f"{self.way.name}+yarn"

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """See :class:`Way`."""
        base = model.base_model
        config = copy.deepcopy(model.config)
        config.rope_parameters = {
            "rope_type": "yarn",
            "rope_theta": config.rope_parameters["rope_theta"],
            "factor": self.factor,
            "original_max_position_embeddings": config.max_position_embeddings,
        }
        plain = base.rotary_emb
        base.rotary_emb = type(plain)(config).to(model.device)
        try:
            with self.way.on(model):
                yield
        finally:
            base.rotary_emb = plain


@dataclass(frozen=True)
class Cut:
    """Trained routers that find every head more, or less, often sparse.

    So routers can be compared with others at any share of sparse heads, as gates of static methods
    are: by where they are cut.

    Attributes
    ----------
    name
        As it is shown, and of its file.
    folder
        Of the routers.
    amount
        What is added to every head's logit of being sparse.
    """

    name: str
    folder: Path
    amount: float

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """See :class:`Way`."""
        way = ec.Elastic.load(self.folder)
        assert isinstance(way.policy, ec.Router) and way.policy.weights is not None
        weights = []
        for layer in way.policy.weights:
            last = layer[LAST_BIAS].clone()
            last[1] += self.amount
            weights.append({**layer, LAST_BIAS: last})
        return replace(way, policy=replace(way.policy, weights=weights)).on(model)


class Scorer:
    """The backbone and its samples, with what was measured before.

    Parameters
    ----------
    folder
        Holds a file per way and length; None keeps nothing.
    backbone
        A name or folder that :func:`~elasticore.models.loading.load_backbone` takes.
    dtype
        Of the backbone; ``auto`` is bfloat16 on a GPU, as in training, and float32 on a CPU.
    batch_tokens
        Tokens of a batch; by default 200K on a GPU and 8K on a CPU.
    backend
        What runs the attention.
    module
        Name of the module whose ``TASKS`` there are.
    split, first
        Whose samples are scored, and their first seed.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        backbone: str = TINY,
        dtype: str = "auto",
        batch_tokens: int | None = None,
        backend: str = "auto",
        module: str = "elasticore.eval.tasks",
        split: Split = "heldout",
        first: int = 0,
    ) -> None:
        cuda = torch.cuda.is_available()
        self.folder, self.backend = folder, backend
        self.dtype = dtype if dtype != "auto" else "bfloat16" if cuda else "float32"
        self.batch_tokens = batch_tokens or (204_800 if cuda else 8_192)
        self.model, self.tokenizer = load_backbone(backbone, self.dtype)
        self.weights = ec.fingerprint(self.model)["weights"]
        self.shape = self.model.config.num_hidden_layers, self.model.config.num_key_value_heads
        self.module = module
        self.split, self.first, self.chat = split, first, False
        self.tasks: Mapping[str, Task] = importlib.import_module(module).TASKS
        self._samples: dict[tuple[str, int], list[Sample]] = {}

    def of(self, split: Split, first: int) -> Scorer:
        """The same, of other samples."""
        other = copy.copy(self)
        other.split, other.first, other._samples = split, first, {}
        other.folder = self.folder and self.folder / split
        return other

    def in_chat(self) -> Scorer:
        """The same samples, with prompts that end before the start of the answer."""
        other = copy.copy(self)
        other.chat, other._samples = True, {}
        other.folder = self.folder and self.folder / "chat"
        return other

    def samples(self, task: str, length: int, count: int) -> list[Sample]:
        """The first ``count`` samples of a task."""
        there = self._samples.setdefault((task, length), [])
        known: Any = importlib.import_module(self.module)
        for seed in range(self.first + len(there), self.first + count):
            sample = make_sample(task, self.tokenizer, length, seed, self.split, known.TASKS)
            there.append(known.as_in_chat(sample, self.tokenizer) if self.chat else sample)
        return there[:count]

    def score(
        self, way: Way, length: int, count: int, tasks: Iterable[str] | None = None
    ) -> Figures:
        """Figures per task: :func:`means`, and ``each``, the :func:`value` of every sample.

        Of a router also ``sparse``, how often each head was, and ``decisions``, which
        :func:`~recipes.study.replay.unpacked` reads. All are read from the file of an earlier call,
        if its way was the same.
        """
        tasks = list(self.tasks if tasks is None else tasks)
        about = {
            "way": identity(way),
            "backbone": self.weights,
            "tasks": tasks,
            "length": length,
            "samples": count,
            "dtype": self.dtype,
            "text": f"standard library of Python {platform.python_version()}",
        }
        if self.chat:
            about["prompts"] = "end before the start of the answer"
        if (self.split, self.first) != ("heldout", 0):
            about["of"] = [self.split, self.first]
        file = self.folder and self.folder / f"{way.name}-{length}.json"
        if file and file.is_file():
            there = json.loads(file.read_text(encoding="utf-8"))
            if there["about"] == about:
                return there["figures"]
        for task in tasks:
            self.samples(task, length, count)
        since = time.perf_counter()
        with way.on(self.model), ec.use_backend(self.backend):
            figures = {task: self._score(way, self.samples(task, length, count)) for task in tasks}
        seconds = round(time.perf_counter() - since, 1)
        console.print(f"{way.name}: scored at {length:,} in {seconds} s", highlight=False)
        if file:
            found = {"about": about, "seconds": seconds, "figures": figures}
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_suffix(f".{os.getpid()}.tmp")  # another process may write it, too
            beside.write_text(json.dumps(found), encoding="utf-8")
            beside.replace(file)
        return figures

    def _score(self, way: Way, samples: list[Sample]) -> dict[str, Any]:
        label = f"{way.name}: {samples[0].task}"

        def bar(batches: Iterable[Any]) -> Iterable[Any]:
            shown = {"console": console, "transient": True, "disable": not console.is_terminal}
            return track(list(batches), label, **shown)

        size = max(1, self.batch_tokens // samples[0].stop)
        found = score(self.model, samples, batch_size=size, progress=bar)
        task = samples[0].task
        figures: dict[str, Any] = means(found)[task]
        tokens = self.tasks[task].tokens
        each = [one.accuracy if tokens else float(one.correct) for one in found]
        figures["each"] = [round(x, 4) for x in each]  # so that two ways can be compared in pairs
        if isinstance(way, Cut) or (isinstance(way, Method) and way.kind == "router"):
            decisions = torch.stack([cast(Tensor, one.decisions) for one in found])
            figures["sparse"] = decisions.double().mean(0).tolist()
            figures["decisions"] = packed(decisions)
        return figures


def identity(way: Way) -> dict[str, Any]:
    """What must be the same for two ways to be the same one; routers count by their weights."""
    if isinstance(way, Stretched):
        return {"yarn": way.factor, "way": identity(way.way)}
    if isinstance(way, Replayed):
        return {"replayed": zlib.crc32(way.queue.numpy().tobytes()), "way": way.streams.to_dict()}
    if isinstance(way, Static):
        table = torch.as_tensor(way.table.sparse).int().tolist()
        return {"table": table, "way": way.streams.to_dict()}
    if isinstance(way, Cut):
        return {"cut": round(way.amount, 6), "crc32": _digest(way.folder)}
    assert isinstance(way, Method)
    settings = dict(way.settings)
    if "path" in settings:
        settings["crc32"] = _digest(Path(settings.pop("path")))
    return {"kind": way.kind, "settings": settings}


def _digest(folder: Path) -> int:
    return zlib.crc32((folder / ROUTER).read_bytes())


def means(scores: list[Score]) -> Figures:
    """Per task: accuracy (exact answers), loss and the sparsity ratios."""
    table = {}
    for task in dict.fromkeys(s.task for s in scores):
        own = [s for s in scores if s.task == task]
        table[task] = {
            "samples": len(own),
            "accuracy": float(np.mean([s.correct for s in own])),
            "token_accuracy": float(np.mean([s.accuracy for s in own])),
            "loss": float(np.mean([s.loss for s in own])),
            "msr": float(np.mean([s.msr for s in own])),
            "esr": float(np.mean([s.esr for s in own])),
            "esr_last_query": float(np.mean([s.esr_last_query for s in own])),
        }
    return table


def value(task: str, figures: dict[str, Any], tasks: Mapping[str, Task] = TASKS) -> float:
    """The score of a task: the share of exact answers, or of right tokens where those count."""
    return float(figures["token_accuracy" if tasks[task].tokens else "accuracy"])


def mean_msr(figures: Figures) -> float:
    """Ω_MSR over all tasks, each of the same weight."""
    return float(np.mean([one["msr"] for one in figures.values()]))


def streaming(way: ec.Elastic) -> ec.Elastic:
    """Every head as the sparse ones of ``way``, which stream."""
    if not isinstance(way.sparse, ec.Streaming):
        raise ValueError(f"way must have sparse=Streaming(...), got {way.sparse!r}.")
    return ec.Elastic(ec.AllSparse(), sparse=way.sparse, block_size=way.block_size)


def window(way: ec.Elastic) -> dict[str, int]:
    """Settings of the method ``streaming`` that reads what the sparse heads of ``way`` do."""
    read: Any = streaming(way).sparse
    return {"sink": read.sink, "local": read.local, "block_size": way.block_size}
