"""A training run as a YAML file: what ``elasticore train --config`` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

from torch.utils.data import Dataset

from elasticore.checks import check_int, check_number, check_type
from elasticore.choice import use_backend
from elasticore.models.elastic import Elastic
from elasticore.patterns import Streaming
from elasticore.processes import launched
from elasticore.router.policies import Router
from elasticore.router.schedule import temperature_schedule
from elasticore.train.data import OfflineTasks, PackedSamples
from elasticore.train.jsonl import JsonLines
from elasticore.train.objective import LagrangianObjective

if TYPE_CHECKING:
    from elasticore.train.baselines import Baseline

__all__ = ["Parts", "Recipe", "dataset_of", "parts_of"]

_OLD = ("mode", "sink", "local", "selector", "boundary", "hidden_multiplier", "sampler")


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run; the defaults are those of the paper's Table 6.

    Parameters
    ----------
    backbone
        Directory or hub id of the model, or ``"tiny"`` for the one in the package.
    targets
        Ω_MSR wanted per task: a number, or bounds ``[low, high]``.
    data
        ``{kind: offline, tasks: {name: weight}, samples, length, module}``, where a module of one's
        own may say what tasks there are; ``{kind: jsonl, path,
        max_length}``, or ``{kind: packed, path, loss}`` for packed parquet, whose rows are the
        samples of ``batch_size`` and are always packed.
    elastic
        How the model attends: settings of :class:`Elastic`, as :meth:`Elastic.to_dict` writes them;
        or what :meth:`Elastic.load` takes, such as the preset ``fa-xa`` or a directory of routers,
        which then train on.
    policy, policy_settings
        What decides: routers (``elastic``), or a static pattern that is learnt as by DuoAttention
        (``duo``) or PruLong (``prulong``), with the settings of
        :class:`~elasticore.train.baselines.DuoAttention` or
        :class:`~elasticore.train.baselines.PruLong`. Those stand in for the router, targets,
        learning rates, multipliers, weight decay (none) and temperature.
    signed
        The paper's signed penalty (True) or the official code's absolute one (False).
    multiplier_init
        Range that the multipliers start in.
    calibration
        Training samples whose pooled keys say how each head's are centred and scaled
        (:meth:`AttentionRouter.calibrate`), before new routers train; 0: not at all, as in the
        paper.
    temperature
        ``{name: cosine | exponential, ...}``, see :mod:`elasticore.router.schedule`.
    max_steps, batch_size, accumulation
        Optimizer steps; samples per forward; forwards per step.
    router_lr, multiplier_lr, weight_decay, warmup_ratio, max_grad_norm
        AdamW with β (0.9, 0.95), linear warm-up, then a cosine to zero.
    reduction, packed
        See :class:`elasticore.train.Collator`.
    dtype
        Of the backbone, ``"bfloat16"`` or ``"float32"``; routers train in float32.
    checkpointing
        Whether layers are recomputed in the backward.
    sharding
        Whether the backbone is split over the processes (``full``), over those of a node
        (``hybrid``), or whole in each (``none``): see :mod:`elasticore.train.sharding`.
    sequence_parallel
        Processes that share the tokens of each batch, which must be packed: see
        :mod:`elasticore.models.parallel`. ``batch_size`` is then that of all of them.
    backend
        What runs the attention.
    seed, logging_steps, save_steps
        Save 0 keeps only the end.
    keep
        How many checkpoints stay, the newest ones; 0 for all. The best one stays beside them.
    validation, eval_steps, keep_best
        Held-out samples, given as ``data``; offline ones are of the held-out split. Every
        ``eval_steps`` the loss is taken on them, and the checkpoint with the lowest is kept: see
        :class:`~elasticore.train.validation.Measured`. With ``keep_best`` it is the result.
    workers
        Processes that make samples.
    report_to
        Where the log also goes: names that :class:`transformers.TrainingArguments` knows, such as
        ``[tensorboard, wandb]``. None: TensorBoard, if it is installed.
    """

    backbone: str
    targets: dict[str, Any]
    data: dict[str, Any]
    elastic: dict[str, Any] | str = field(default_factory=dict)
    policy: Literal["elastic", "duo", "prulong"] = "elastic"
    policy_settings: dict[str, Any] = field(default_factory=dict)
    signed: bool = False
    calibration: int = 0
    temperature: dict[str, Any] = field(default_factory=lambda: {"name": "cosine"})
    max_steps: int = 300
    batch_size: int = 1
    accumulation: int = 48
    router_lr: float = 5e-4
    multiplier_lr: float = 1e-3
    multiplier_init: tuple[float, float] = (0.0, 0.5)
    weight_decay: float = 0.1
    warmup_ratio: float = 0.2
    max_grad_norm: float = 5.0
    reduction: Literal["tokens", "samples"] = "tokens"
    packed: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    checkpointing: bool = False
    sharding: Literal["none", "full", "hybrid"] = "none"
    sequence_parallel: int = 1
    backend: str = "auto"
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    keep: int = 3
    validation: dict[str, Any] = field(default_factory=dict)
    eval_steps: int = 50
    keep_best: bool = False
    workers: int = 0
    report_to: str | list[str] | None = None

    def __post_init__(self) -> None:
        for name, accepted in get_type_hints(type(self)).items():
            check_type(name, getattr(self, name), accepted)
        for name in ("max_steps", "batch_size", "accumulation", "logging_steps", "eval_steps"):
            check_int(name, getattr(self, name), 1)
        if self.keep_best and not (self.validation and self.save_steps):
            raise ValueError("keep_best needs validation, to say what is best, and save_steps.")
        check_int("sequence_parallel", self.sequence_parallel, 1)
        check_int("calibration", self.calibration, 0)
        if self.calibration == 1 or (self.calibration and self.policy != "elastic"):
            raise ValueError("calibration takes at least 2 samples, and policy elastic.")
        for name in ("save_steps", "keep", "workers", "seed"):
            check_int(name, getattr(self, name), 0)
        for name in ("router_lr", "multiplier_lr", "weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), 0)
        check_number("warmup_ratio", self.warmup_ratio, 0, 1)

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = (), **overrides: Any) -> Recipe:
        """Read a YAML file.

        Parameters
        ----------
        path
            The file.
        changes
            ``"key=value"`` each, as ``elasticore train --set`` takes them: a YAML value, and dots
            into mappings, as in ``"elastic.policy.boundary=50"``. Tasks of ``targets`` must be
            there.
        **overrides
            Settings that win over both; None leaves one as it is.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no YAML mapping, or names settings that do not exist or misses some, a value is
            of another type or out of range, or a change leads nowhere.
        """
        from elasticore.train.settings import changed, read_settings

        defaults = {f.name: _default(f) for f in dataclasses.fields(cls)}
        data = changed(read_settings(path), changes, defaults=defaults, closed=("targets",))
        data |= {key: value for key, value in overrides.items() if value is not None}
        unknown = sorted(set(data) - set(defaults))
        missing = sorted({"backbone", "targets", "data"} - set(data))
        if unknown or missing:
            raise ValueError(
                f"config {path}: unknown settings {unknown}, missing settings {missing}; "
                f"there are: {', '.join(sorted(defaults))}."
            )
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config {path}: {error}") from None


def _default(setting: dataclasses.Field[Any]) -> Any:
    """What holds if a recipe leaves a setting out; an empty mapping if it must not."""
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return {} if setting.default is dataclasses.MISSING else setting.default


class Parts(NamedTuple):
    """What a recipe's settings are made into, before there is a model."""

    way: Elastic
    objective: LagrangianObjective
    temperature: Callable[[int, int], float]
    method: Baseline | None
    report_to: list[str]


def parts_of(recipe: Recipe) -> Parts:
    """Make what needs neither model nor data; raises ``ValueError`` on a setting that is wrong."""
    from elasticore.train.monitor import reporters

    with use_backend(recipe.backend):  # unknown or unavailable: said now, not after loading
        pass
    try:
        temperature = temperature_schedule(**recipe.temperature)
    except TypeError as error:
        raise ValueError(f"temperature does not take these settings: {_bare(error)}.") from None
    try:
        objective = LagrangianObjective(
            recipe.targets, recipe.signed, recipe.multiplier_init, seed=recipe.seed
        )
    except TypeError as error:
        raise ValueError(str(error)) from None
    method, report_to = _method(recipe), reporters(recipe.report_to)
    return Parts(_way(recipe, method), objective, temperature, method, report_to)


def _way(recipe: Recipe, method: Baseline | None) -> Elastic:
    """How the model attends in training."""
    settings = recipe.elastic
    old = [] if isinstance(settings, str) else [name for name in _OLD if name in settings]
    if old:
        raise ValueError(
            f"elastic has the settings {', '.join(old)} of an older form; write, each with its own "
            "settings: elastic: {policy: {name: router, boundary: 100, hidden_multiplier: 4}, "
            "retrieval: {name: full}, sparse: {name: streaming, sink: 128, local: 2048}, "
            "block_size: 128}. The mode fa-xa is now sparse: {name: xattention}, and xa-ssa is "
            "retrieval: {name: xattention}."
        )
    try:
        way = Elastic.load(settings) if isinstance(settings, str) else Elastic.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"elastic: {error}") from None
    if method is None:
        if not isinstance(way.policy, Router):
            raise ValueError(
                f"elastic.policy must be {{name: router, ...}}, which can be trained, got "
                f"{way.policy!r}; for a static pattern set policy to duo or prulong."
            )
        return way
    if not isinstance(way.sparse, Streaming):
        raise ValueError(
            f"elastic.sparse must be {{name: streaming, ...}} with policy {recipe.policy}, whose "
            f"files hold nothing else, got {way.sparse!r}."
        )
    return dataclasses.replace(way, policy=method)


def _method(recipe: Recipe) -> Baseline | None:
    """The method of a static pattern; None for routers."""
    from elasticore.train.baselines import baseline

    if recipe.policy != "elastic":
        return baseline(recipe.policy, recipe.policy_settings)
    if recipe.policy_settings:
        raise ValueError(
            f"policy_settings {sorted(recipe.policy_settings)} belong to policy duo or prulong; "
            "policy elastic has none."
        )
    return None


def dataset_of(recipe: Recipe, tokenizer: Any, *, held_out: bool = False) -> Dataset[Any]:
    """The samples of a recipe; raises ``ValueError`` if they are not as ``data`` says."""
    name = "validation" if held_out else "data"
    settings: dict[str, Any] = dict(getattr(recipe, name))
    kind = settings.pop("kind", None)
    try:
        if kind == "offline":
            processes = launched().size // recipe.sequence_parallel
            samples = recipe.max_steps * recipe.batch_size * recipe.accumulation * processes
            defaults: dict[str, Any] = {"samples": samples, "seed": recipe.seed}
            if held_out:
                defaults |= {"samples": 32, "split": "heldout"}
            return OfflineTasks(tokenizer, **{**defaults, **settings})
        if kind == "jsonl":
            return JsonLines(tokenizer=tokenizer, **settings)
        if kind == "packed":
            return PackedSamples(tokenizer=tokenizer, **settings)
    except TypeError as error:
        raise ValueError(f"{name} does not take these settings: {_bare(error)}.") from None
    raise ValueError(f"{name} needs kind: offline, jsonl or packed, got {kind!r}.")


def _bare(error: Exception) -> str:
    return str(error).rstrip(".")
