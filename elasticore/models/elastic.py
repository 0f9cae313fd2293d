"""A way to attend, and models that attend so: ``Elastic``, ``elasticize``, ``restore``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from elasticore.assets import ROUTERS
from elasticore.errors import RouterMismatch, UnsupportedModel
from elasticore.models.attach import attach, backbone_of, detach, state_of
from elasticore.models.card import model_card, write_card
from elasticore.models.files import read_files, upload_files, write_files
from elasticore.models.fingerprint import check_base_model, fingerprint
from elasticore.models.state import ROUTER, STATE, ModelState
from elasticore.patterns import BlockSelector, Full, HeadMode, Pattern, Streaming, XAttention
from elasticore.patterns.registry import pattern_from_dict, pattern_to_dict
from elasticore.plan import HeadPlan
from elasticore.router.policies import Policy, Router, as_policy
from elasticore.router.registry import policy_from_dict, policy_to_dict
from elasticore.router.router import AttentionRouter
from elasticore.router.routing import Routing

__all__ = ["PRESETS", "Elastic", "elasticize", "is_elastic", "restore", "routers", "way_of"]

Model = TypeVar("Model", bound=nn.Module)

_BLOCK_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class Elastic:
    """A way to attend: one policy that decides, and the two patterns it decides between.

    Parameters
    ----------
    policy
        What decides for every head: :class:`Router`, :class:`HeadTable`, :class:`AllSparse`,
        :class:`AllRetrieval`, or a list of modules of one's own, one per elastic layer.
    retrieval
        What a head reads that is routed to retrieval: :class:`Full`, or a selector.
    sparse
        What a head reads that is routed to sparse: :class:`Streaming`, or a selector.
    block_size
        Tokens per block: 16, 32, 64 or 128. None takes the largest that both patterns allow.
    prefill
        While a prompt is read: ``"routed"`` lets every head read its pattern, as it was trained;
        ``"full"`` lets all heads read everything, and the routing counts from the first token that
        is generated. Keys and values of a prompt then depend on no routing, which serving needs
        that shares them. Routers do not train so.
    decode
        Once a prompt is prefilled: ``"routed"`` keeps every head's pattern (heads with a selector
        read everything in passes shorter than a block, which no selector can score); ``"full"``
        lets all heads read everything, as the paper's released code does.
    turn
        A further prompt on a cache in which tokens were generated: ``"renew"`` decides anew, from
        the beginning of the whole text and its newest end; ``"keep"`` keeps what was decided.
    cache
        Once tokens are generated: ``"dense"`` keeps all keys and values; ``"elastic"`` keeps of
        streaming heads their sink and window alone, in a ``DynamicCache``, which then cannot be
        cropped far, nor be routed anew for a further prompt (``turn="keep"`` need not).
    base
        The fingerprint of the backbone that the policy was trained for; None if it is for any.

    Raises
    ------
    TypeError, ValueError
        If a setting is out of range; the message names it.

    Examples
    --------
    >>> import elasticore as el
    >>> way = el.Elastic(el.Router(boundary=100), sparse=el.Streaming(sink=128, local=2048))
    >>> way.block_size
    128
    >>> el.Elastic(el.AllSparse(), sparse=el.MoBA()).retrieval
    Full()
    """

    policy: Policy = field(default_factory=Router)
    retrieval: Pattern = Full()  # noqa: RUF009 - a frozen value
    sparse: Pattern = Streaming()  # noqa: RUF009
    _: KW_ONLY
    block_size: int = None  # type: ignore[assignment]  # settled below
    prefill: Literal["routed", "full"] = "routed"
    decode: Literal["routed", "full"] = "routed"
    turn: Literal["renew", "keep"] = "renew"
    cache: Literal["dense", "elastic"] = "dense"
    base: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))
        if self.block_size is None:
            object.__setattr__(self, "block_size", _largest(self.retrieval, self.sparse))
        choices = {
            "prefill": ("routed", "full"),
            "decode": ("routed", "full"),
            "turn": ("renew", "keep"),
            "cache": ("dense", "elastic"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}."
                )
        self.plan(torch.zeros(1, 1, dtype=torch.int8))  # the patterns, and that they go together

    @cached_property
    def gives_back(self) -> bool:
        """Whether streaming heads give memory back once tokens are generated."""
        if self.cache == "dense":
            return False
        lanes = self.plan(torch.zeros(1, 1, dtype=torch.int8), short=True).lanes
        return HeadMode.STREAMING in lanes and HeadMode.SELECTED not in lanes

    def plan(self, decisions: Tensor, *, short: bool = False) -> HeadPlan:
        """The plan of ``decisions`` (int8 ``[sequences, kv_heads]``, values not read).

        Parameters
        ----------
        short
            Whether it is for a pass shorter than a block that goes on after a prompt.
        """
        retrieval, sparse = self.retrieval, self.sparse
        if not short and self.prefill == "full":
            retrieval = sparse = Full()
        if short:
            every = self.decode == "full"
            # No selector can score a fraction of a row block.
            retrieval, sparse = (
                Full() if every or isinstance(pattern, BlockSelector) else pattern
                for pattern in (retrieval, sparse)
            )
        return HeadPlan(decisions, retrieval, sparse, block_size=self.block_size, check=False)

    def plan_of(self, routing: Routing) -> HeadPlan:
        """The plan of what a policy decided, with the gradient of its gate if it has one.

        Raises
        ------
        ValueError
            If there is a gradient, and prompts are read in full, where no gate is passed.
        """
        if routing.gate is None or not routing.gate.requires_grad:
            return self.plan(routing.decisions)
        if self.prefill == "full":
            raise ValueError(
                "prefill must be 'routed' while routers train: where prompts are read in full, "
                "they learn nothing from them."
            )
        return HeadPlan.from_gate(
            routing.gate, self.retrieval, self.sparse, block_size=self.block_size
        )

    @contextmanager
    def on(self, model: Model, *, check_base: bool = True) -> Iterator[Model]:
        """Let ``model`` attend so inside the ``with`` block; see :func:`elasticize`."""
        elasticize(model, self, check_base=check_base)
        try:
            yield model
        finally:
            restore(model)

    def save(
        self,
        path: str | Path,
        *,
        push_to_hub: str | None = None,
        private: bool = True,
        card: bool = True,
    ) -> Path:
        """Write ``router.json`` and ``router.safetensors`` to a directory; return it.

        A model card ``README.md``, with headings to be filled in, joins them if there is none.

        Parameters
        ----------
        path
            The directory; made if missing.
        push_to_hub
            ``"user/name"`` of a hub repository to upload the two files to, and the card if it has
            none.
        private
            Whether a repository that is created is private.
        card
            Whether to write a card. A ``README.md`` that is there stays as it is in any case.

        Raises
        ------
        ValueError
            If the policy, or a pattern, is one that no file can name.
        """
        tensors, settings = self.policy.tensors(), self.to_dict()
        folder = write_files(path, settings, tensors, self.base)
        if card:
            write_card(folder, model_card(settings, self.base, push_to_hub))
        if push_to_hub is not None:
            upload_files(folder, push_to_hub, private)
        return folder

    @classmethod
    def load(cls, name: str | Path, *, revision: str | None = None) -> Elastic:
        """The way called ``name``; never runs code from a hub.

        Parameters
        ----------
        name
            A directory, a hub id ``"user/name"``, the name of routers that ship with the package
            (``"tiny"``), or a preset with new routers: ``"fa-ssa"``, ``"fa-xa"`` or ``"xa-ssa"``.
        revision
            Branch, tag or commit of a hub repository.

        Raises
        ------
        RouterNotFound
            If there is nothing of that name.
        TypeError
            If it is no str or Path.
        ValueError
            If a file is damaged or of a newer format.
        """
        if isinstance(name, str) and name in PRESETS:
            return PRESETS[name]
        if isinstance(name, str) and name in ROUTERS:
            name = ROUTERS[name]
        folder, settings, tensors, base = read_files(name, revision)
        try:
            return cls.from_dict(settings, tensors, base)
        except (TypeError, ValueError) as error:
            raise ValueError(f"path {folder} does not fit together: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, without the policy's tensors."""
        return {
            "policy": policy_to_dict(self.policy),
            "retrieval": pattern_to_dict(self.retrieval),
            "sparse": pattern_to_dict(self.sparse),
            "block_size": self.block_size,
            "prefill": self.prefill,
            "decode": self.decode,
            "turn": self.turn,
            "cache": self.cache,
        }

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> Elastic:
        """The way of which :meth:`to_dict` wrote the settings; what is left out has its default.

        Raises
        ------
        TypeError, ValueError
            On settings that are unknown or out of range.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"data must be a mapping of settings, got {type(data).__name__}.")
        known = [f.name for f in dataclasses.fields(cls) if f.name not in ("base", "_")]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(
                f"data has unknown settings {', '.join(map(str, unknown))}; there are: "
                f"{', '.join(known)}."
            )
        settings = dict(data)
        for name in ("retrieval", "sparse"):
            if isinstance(settings.get(name), Mapping):
                settings[name] = pattern_from_dict(settings[name])
        policy = settings.pop("policy", {"name": "router"})
        if isinstance(policy, Mapping):
            policy = policy_from_dict(policy, tensors or {})
        return cls(policy, **settings, base=base)


def _largest(*patterns: Pattern) -> int:
    """The largest block size that all patterns allow; 16 if there is none, which says why."""
    for size in _BLOCK_SIZES:
        try:
            for pattern in patterns:
                pattern.check(size)
        except (ValueError, AttributeError):
            continue
        return size
    return _BLOCK_SIZES[-1]


PRESETS: dict[str, Elastic] = {
    "fa-ssa": Elastic(),
    "fa-xa": Elastic(sparse=XAttention()),
    "xa-ssa": Elastic(retrieval=XAttention()),
}
"""The paper's three ways, by its names for them."""


def elasticize(
    model: Model, way: Elastic | str | Path | None = None, *, check_base: bool = True
) -> Model:
    """Let every KV head of ``model`` choose its pattern per input.

    Nothing in the model is copied or patched: the model and its attention layers get hooks, a
    submodule ``attention_router``, and the attention implementation ``elasticore``. Layers that
    the model itself keeps inside a sliding window stay as they are. The model's parameters are not
    touched; freezing them is up to the trainer.

    Parameters
    ----------
    model
        A decoder of a supported family (``elasticore.FAMILIES``), or a PEFT model around one;
        changed in place.
    way
        An :class:`Elastic`, or what :meth:`Elastic.load` takes. None: new, untrained routers
        between full and streaming attention.
    check_base
        Whether to insist on the very weights that the way was trained for. False allows, say, a
        fine-tuned copy of the same sizes.

    Returns
    -------
    nn.Module
        ``model`` itself.

    Raises
    ------
    UnsupportedModel
        If the family, a layer of it or the version of transformers is none that is known.
    RouterMismatch
        If the way was trained for another model; the message says in what it differs.
    RouterNotFound
        If there is no way of that name.
    TypeError, ValueError
        If an argument is wrong, or the model is elastic already.
        Whatever is raised, the model is as it was.

    Examples
    --------
    >>> import elasticore, transformers
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, vocab_size=100)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> model = elasticore.elasticize(model, "fa-ssa")
    >>> model = elasticore.restore(model)
    """
    backbone = backbone_of(model)
    name = way if isinstance(way, (str, Path)) else None
    if name is not None:
        way = Elastic.load(name)
    elif way is None:
        way = Elastic()
    if not isinstance(way, Elastic):
        raise TypeError(f"way must be an Elastic, a path, a name or None, got {way!r}.")
    try:
        if way.base is not None:
            check_base_model(way.base, fingerprint(backbone), check_base)
        attach(backbone, way)
    except (RouterMismatch, UnsupportedModel) as error:
        raise error if name is None else type(error)(f"{name}: {error}") from None
    return model


def restore(model: Model) -> Model:
    """Undo :func:`elasticize`: config, state_dict and logits are what they were before.

    Raises
    ------
    ValueError
        If ``model`` is not elastic.
    """
    detach(backbone_of(model), state_of(model))
    return model


def is_elastic(model: nn.Module) -> bool:
    """Whether ``model`` has been through :func:`elasticize` and not through :func:`restore`."""
    try:
        backbone = backbone_of(model)
    except TypeError:
        return False
    return isinstance(getattr(backbone, STATE, None), ModelState)


def routers(model: nn.Module) -> list[nn.Module]:
    """The policy's modules in an elastic model, one per elastic layer."""
    return [getattr(layer, ROUTER) for layer in state_of(model).layers]


def way_of(model: nn.Module) -> Elastic:
    """How an elastic model attends, with its routers' weights as they are now: to be saved.

    Raises
    ------
    ValueError
        If ``model`` is not elastic.
    """
    way, found = state_of(model).way, routers(model)
    base = fingerprint(backbone_of(model))
    if isinstance(way.policy, Router) and all(isinstance(r, AttentionRouter) for r in found):
        weights = [{k: v.detach() for k, v in router.state_dict().items()} for router in found]
        way = dataclasses.replace(way, policy=dataclasses.replace(way.policy, weights=weights))
    return dataclasses.replace(way, base=base)
