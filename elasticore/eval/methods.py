"""How a backbone attends in an evaluation: fully, by routers, or by a static method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedModel

from elasticore.assets import tiny
from elasticore.eval.baselines import PerQuery, attend_with, load_nsa
from elasticore.models.config import ElasticConfig
from elasticore.models.elastic import elasticize, restore
from elasticore.models.families import attention_layers
from elasticore.models.files import load_router
from elasticore.models.loading import TINY
from elasticore.models.static import apply_pattern
from elasticore.patterns.registry import selector_from_dict
from elasticore.router.policies import fixed_policies

__all__ = ["Method"]

FULL, STREAMING, ROUTER, PATTERN, NSA = "full", "streaming", "router", "pattern", "nsa"
PER_QUERY = "-per-query"
_STREAMING = ("sink", "local", "block_size")
_PATTERN = ("sparsity", "sink", "local")


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes
    ----------
    name
        As it is shown, and the name of its folder.
    kind
        ``full``: the backbone itself. ``router``: trained routers, or a static head table that was
        saved as such. ``pattern``: a head table as DuoAttention or PruLong publish it.
        ``streaming``: every head streams. A selector's name, such as
        ``xattention``: every head reads the blocks that it selects; with ``-per-query`` after it,
        as ``moba-per-query``, every query selects for itself, slowly. ``nsa``: its three branches.
    settings
        ``path`` of a router (``tiny`` is the one in the package), of a pattern or of NSA's parts;
        ``sparsity`` of a pattern; ``sink`` and ``local`` of it or of streaming; the selector's own;
        ``block_size``; and ``from_layer``, the first layer that is sparse.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read what ``--method`` takes: ``[NAME=]KIND[:key=value,...]``.

        Raises
        ------
        ValueError
            If it reads otherwise.

        Examples
        --------
        >>> Method.parse("xattention:threshold=0.95")
        Method(name='xattention-threshold=0.95', kind='xattention', settings={'threshold': 0.95})
        >>> Method.parse("ours=router:path=runs/routers").name
        'ours'
        """
        head, _, tail = text.partition(":")
        name, named, kind = head.rpartition("=")
        settings: dict[str, Any] = {}
        for part in filter(None, tail.split(",")):
            key, found, value = part.partition("=")
            if not key or not found:
                raise ValueError(
                    f"method {text!r} must be KIND, KIND:key=value,... or NAME=KIND..., such as "
                    "xattention:threshold=0.9 or ours=router:path=runs/routers."
                )
            settings[key] = yaml.safe_load(value)
        if not kind or (named and not name):
            raise ValueError(f"method {text!r} names no kind; such as full, streaming, xattention.")
        return cls(name or _folder_name(kind, settings), kind, settings)

    @contextmanager
    def on(self, model: PreTrainedModel, *, check_base: bool = True) -> Iterator[None]:
        """Let ``model`` attend like this inside the ``with`` block; it must not be elastic.

        Parameters
        ----------
        model
            The backbone; as before afterwards.
        check_base
            See :func:`~elasticore.load_router`.

        Raises
        ------
        ValueError
            If a setting is unknown or wrong, or there is no method of this kind.
        """
        settings = dict(self.settings)
        if self.kind == FULL:
            _none_left(self.kind, settings)
            yield
            return
        if self.kind == NSA or self.kind.endswith(PER_QUERY):
            with attend_with(model, self._modules(model, settings)):
                yield
            return
        if self.kind == ROUTER:
            path = self._path(settings, "DIRECTORY of trained routers")
            _none_left(self.kind, settings)
            load_router(model, path, check_base=check_base)
        elif self.kind == PATTERN:
            path = self._path(settings, "FILE.tsv or DIRECTORY of DuoAttention or PruLong")
            own = {key: settings.pop(key) for key in list(settings) if key in _PATTERN}
            _none_left(self.kind, settings)
            apply_pattern(model, path, **own)
        else:
            layers = len(attention_layers(model))
            first = settings.pop("from_layer", 0)
            if not isinstance(first, int) or not 0 <= first < layers:
                raise ValueError(
                    f"method {self.kind}: from_layer must be from 0 to {layers - 1}, got {first!r}."
                )
            heads = model.config.num_key_value_heads
            table = [[int(layer >= first)] * heads for layer in range(layers)]
            elasticize(model, self._config(settings), policies=fixed_policies(table))
        try:
            yield
        finally:
            restore(model)

    def digest(self) -> str | None:
        """SHA-256 of the files at ``path``; None without any on this machine."""
        if "path" not in self.settings:
            return None
        place = Path(_place(self.settings["path"]))
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        found = [file.read_bytes() for file in files if file.is_file()]
        return sha256(b"".join(found)).hexdigest() if found else None

    def _path(self, settings: dict[str, Any], what: str) -> str:
        path = settings.pop("path", None)
        if path is None:
            raise ValueError(f"method {self.kind} needs path={what}.")
        return _place(path)

    def _config(self, settings: dict[str, Any]) -> ElasticConfig:
        """What every head of a static method reads."""
        if self.kind == STREAMING:
            own = {key: settings.pop(key) for key in list(settings) if key in _STREAMING}
            _none_left(self.kind, settings)
            return ElasticConfig("fa-ssa", **own)
        block = {key: settings.pop(key) for key in list(settings) if key == "block_size"}
        selector = selector_from_dict({"name": self.kind, **settings})
        return ElasticConfig("fa-xa", selector=selector, **block)

    def _modules(self, model: PreTrainedModel, settings: dict[str, Any]) -> Sequence[nn.Module]:
        """The attention of every layer, for methods that no lane can run."""
        if self.kind == NSA:
            path = self._path(settings, "FILE.safetensors of its trained parts")
            _none_left(self.kind, settings)
            return list(load_nsa(model, path))
        selector: Any = selector_from_dict({"name": self.kind.removesuffix(PER_QUERY), **settings})
        return [PerQuery(selector) for _ in attention_layers(model)]


def _place(path: Any) -> str:
    """Where a path leads; ``tiny`` is a name for the routers in the package."""
    return str(tiny() / "router") if path == TINY else str(path)


def _none_left(kind: str, settings: dict[str, Any]) -> None:
    if settings:
        raise ValueError(f"method {kind} has no settings {', '.join(settings)}.")


def _folder_name(kind: str, settings: dict[str, Any]) -> str:
    parts = [kind, *(f"{key}={value}" for key, value in settings.items())]
    return "-".join(parts).replace("/", "_")
