"""How a backbone attends in an evaluation: fully, by routers, or by a static method."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedModel

from elasticore.assets import ROUTERS
from elasticore.eval.baselines import PerQuery, attend_with, load_nsa
from elasticore.models.card import CARD
from elasticore.models.elastic import PRESETS, Elastic
from elasticore.models.families import attention_layers, is_local
from elasticore.models.files import read_files
from elasticore.patterns import Streaming
from elasticore.patterns.registry import pattern_from_dict
from elasticore.router.policies import AllSparse, Policy
from elasticore.router.tables import HeadTable

__all__ = ["Method", "published"]

FULL, ROUTER, PATTERN, NSA = "full", "router", "pattern", "nsa"
PATH = "path"
PER_QUERY = "-per-query"
_ROUTER = ("prefill", "decode")
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
        A pattern's name, as ``streaming`` or ``xattention``: every head reads what it says; with
        ``-per-query`` after it, as ``moba-per-query``, every query selects for itself, slowly.
        ``nsa``: its three branches.
    settings
        ``path`` of a router (``tiny`` is the one in the package), of a pattern or of NSA's parts;
        of a router its ``prefill`` and ``decode``, as in :class:`~elasticore.Elastic`;
        ``sparsity`` of a pattern, and its ``sink`` and ``local``; or those of the named pattern,
        with ``block_size`` and ``from_layer``, the first layer that is sparse.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read what ``--method`` takes: ``[NAME=]KIND[:key=value,...]``, with YAML values.

        A path is taken as it stands; a comma in it ends it only before another ``key=``.

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
        for part in filter(None, re.split(r",(?=\w+=)", tail)):
            key, found, value = part.partition("=")
            if not key or not found or ("," in value and key != PATH):
                raise ValueError(
                    f"method {text!r} must be KIND, KIND:key=value,... or NAME=KIND..., such as "
                    "xattention:threshold=0.9 or ours=router:path=runs/routers."
                )
            settings[key] = value if key == PATH else yaml.safe_load(value)
        if not kind or (named and not name):
            raise ValueError(f"method {text!r} names no kind; such as full, streaming, xattention.")
        return cls(name or _folder_name(kind, settings), kind, settings)

    def way(self, model: PreTrainedModel) -> Elastic | None:
        """The method as a value; None for ``full`` and for what no lane can run.

        Parameters
        ----------
        model
            The backbone, whose layers are counted; it is left as it is.

        Raises
        ------
        ValueError
            If a setting is unknown or wrong, or there is no method of this kind.
        """
        settings = dict(self.settings)
        if self.kind in (FULL, NSA) or self.kind.endswith(PER_QUERY):
            return None
        if self.kind == ROUTER:
            path = self._path(settings, "DIRECTORY of trained routers")
            own = {key: settings.pop(key) for key in _ROUTER if key in settings}
            self._none_left(settings)
            return replace(Elastic.load(path), **own)
        if self.kind == PATTERN:
            path = self._path(settings, "FILE.tsv or DIRECTORY of DuoAttention or PruLong")
            own = {key: settings.pop(key) for key in _PATTERN if key in settings}
            self._none_left(settings)
            return published(path, **own)
        block_size, first = settings.pop("block_size", None), settings.pop("from_layer", None)
        policy: Policy = AllSparse()
        if first is not None:
            layers = attention_layers(model)
            if not isinstance(first, int) or not 0 <= first < len(layers):
                raise ValueError(
                    f"method {self.kind}: from_layer must be from 0 to {len(layers) - 1}, got "
                    f"{first!r}."
                )
            heads = model.config.num_key_value_heads
            rows = (index >= first for index, one in enumerate(layers) if not is_local(one))
            policy = HeadTable([[int(sparse)] * heads for sparse in rows])
        pattern = pattern_from_dict({"name": self.kind, **settings})
        return Elastic(policy, sparse=pattern, block_size=block_size)

    @contextmanager
    def on(self, model: PreTrainedModel, *, check_base: bool = True) -> Iterator[None]:
        """Let ``model`` attend like this inside the ``with`` block; it must not be elastic.

        Parameters
        ----------
        model
            The backbone; as before afterwards.
        check_base
            See :func:`~elasticore.elasticize`.

        Raises
        ------
        ValueError
            As :meth:`way`.
        """
        way = self.way(model)
        if way is not None:
            with way.on(model, check_base=check_base):
                yield
        elif self.kind == FULL:
            self._none_left(self.settings)
            yield
        else:
            with attend_with(model, self._modules(model)):
                yield

    def digest(self) -> str | None:
        """SHA-256 of the files at ``path``, be it here or on a hub; None without any.

        A model card counts for nothing: it may be filled in after the evaluation.
        """
        if PATH not in self.settings:
            return None
        path = str(self.settings[PATH])
        place = Path(ROUTERS.get(path, path))
        if self.kind == ROUTER and not place.exists() and path not in PRESETS:
            place = read_files(path)[0]
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        found = [file.read_bytes() for file in files if file.is_file() and file.name != CARD]
        return sha256(b"".join(found)).hexdigest() if found else None

    def _modules(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """The attention of every layer, for methods that no lane can run."""
        settings = dict(self.settings)
        if self.kind == NSA:
            path = self._path(settings, "FILE.safetensors of its trained parts")
            self._none_left(settings)
            return list(load_nsa(model, path))
        selector: Any = pattern_from_dict({"name": self.kind.removesuffix(PER_QUERY), **settings})
        return [PerQuery(selector) for _ in attention_layers(model)]

    def _path(self, settings: dict[str, Any], what: str) -> str:
        path = settings.pop(PATH, None)
        if path is None:
            raise ValueError(f"method {self.kind} needs path={what}.")
        return str(path)

    def _none_left(self, settings: dict[str, Any]) -> None:
        if settings:
            raise ValueError(f"method {self.kind} has no settings {', '.join(settings)}.")


def published(
    path: str | Path,
    sparsity: float | None = None,
    sink: int | None = None,
    local: int | None = None,
) -> Elastic:
    """The way to attend that DuoAttention or PruLong published in a file.

    Parameters
    ----------
    path, sparsity
        See :meth:`HeadTable.read <elasticore.HeadTable.read>`, where the share is ``msr``.
    sink, local
        Tokens that a streaming head reads. None: those of DuoAttention's ``config.json``; for a
        file alone, PruLong's 128 and 1,024.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If it is damaged, or has a sink or window that no block size divides.
    """
    table = HeadTable.read(path, sparsity)
    given = {"sink": sink, "local": local}
    own = {name: size for name, size in given.items() if size is not None}
    return Elastic(table, sparse=replace(table.streaming or Streaming(128, 1024), **own))


def _folder_name(kind: str, settings: dict[str, Any]) -> str:
    parts = [kind, *(f"{key}={value}" for key, value in settings.items())]
    return "-".join(parts).replace("/", "_")
