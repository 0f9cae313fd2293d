"""What the reproduction trains and scores, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from elasticore import HeadTable
from elasticore.eval.methods import Method
from elasticore.eval.tasks import TASKS
from elasticore.train import BASELINES, Recipe
from elasticore.train.recipe import parts_of
from recipes.study.runs import Run, Trainings, gate_scores
from recipes.study.scores import Scorer, Static, Stretched, Way, mean_msr, streaming, window

__all__ = [
    "FULL",
    "QUICK",
    "QUICK_RECIPE",
    "SELECTORS",
    "SENSITIVE",
    "Size",
    "Subject",
    "ablations",
    "elastic",
    "main_target",
    "router",
    "static",
    "ways",
]

SENSITIVE = tuple(name for name, task in TASKS.items() if task.sensitive)

QUICK_RECIPE = (
    *("max_steps=2", "batch_size=2", "logging_steps=1", "dtype=float32"),
    *("data.length=256", "workers=0"),
)
"""Changes that leave next to no training."""

# The sizes of the paper's Table 6 divided by 16, as the tiny model has 4,096 tokens for its 65,536.
_WINDOW = {"block": 32, "sink": 32, "local": 128}
STEP_SIZES = {"prulong": ("policy_settings.lr=0.1", "policy_settings.multiplier_lr=0.1")}
"""Where a static method needs others than it was published with.

PruLong's is 1, for 1,000 steps. In a few hundred its gates settle before they have learnt.
"""

SELECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"xattention-{t}": ("xattention", {"threshold": t}) for t in (0.7, 0.8, 0.9, 0.95)},
    "moba": ("moba", {"block": 64, "top_k": 8}),
    "infllm-v2": ("infllm-v2", {**_WINDOW, "top_k": 8, "dense": 512}),
    "infllm-v2-small": ("infllm-v2", {**_WINDOW, "top_k": 4, "dense": 0}),
    "nsa-selected": ("nsa-selected", {"block": 32, "top_k": 16, "sink": 32, "local": 64}),
    **{
        f"trianglemix-{layer}": (
            "trianglemix",
            {"sink": 32, "local": 128, "last": 128, "from_layer": layer},
        )
        for layer in (0, 2, 4)
    },
}
"""Methods without training, by name: every head selects, in trianglemix from a layer on."""


@dataclass(frozen=True)
class Size:
    """How much is trained and scored.

    Attributes
    ----------
    seeds, ablation_seeds
        Of the methods, and of each ablation.
    targets
        Ω_MSR wanted on sensitive tasks, beside the recipe's.
    samples, length
        Held-out samples per task, and their tokens.
    lengths, length_samples
        What else the main methods are scored on.
    shares
        Ω_MSR that the static methods' gates are cut at, beside elastic attention's own.
    tables, table_samples
        Random head tables per share, and samples per sensitive task that score them.
    selectors
        The methods without training, of ``SELECTORS``.
    analysis_samples
        Samples per task of each analysis.
    ratios
        Ω_MSR at which the progressive sparsification is scored.
    methods
        The static methods that are trained.
    """

    seeds: int = 3
    ablation_seeds: int = 1
    methods: tuple[str, ...] = tuple(BASELINES)
    targets: tuple[float, ...] = (0.6, 0.9)
    samples: int = 200
    length: int = 4096
    lengths: tuple[int, ...] = (1024, 2048, 8192, 16384)
    length_samples: int = 50
    shares: tuple[float, ...] = (0.5, 0.7, 0.9, 0.95, 0.975)
    tables: int = 20
    table_samples: int = 50
    selectors: tuple[str, ...] = tuple(SELECTORS)
    analysis_samples: int = 50
    ratios: tuple[float, ...] = tuple(i / 10 for i in range(11))


FULL = Size()
QUICK = Size(
    seeds=1,
    ablation_seeds=0,
    methods=("duo",),
    targets=(),
    samples=2,
    length=256,
    lengths=(512,),
    length_samples=1,
    shares=(0.5,),
    tables=2,
    table_samples=1,
    selectors=("xattention-0.9", "moba"),
    analysis_samples=2,
    ratios=(0.0, 0.5, 1.0),
)


def main_target(recipe: Recipe) -> float:
    """The Ω_MSR that the recipe wants on sensitive tasks."""
    found = {float(recipe.targets[task]) for task in SENSITIVE}
    if len(found) != 1:
        raise ValueError(f"config must have one target for {', '.join(SENSITIVE)}, got {found}.")
    return found.pop()


def elastic(target: float, seeds: int) -> list[Run]:
    """Routers that want ``target`` on sensitive tasks."""
    changes = tuple(f"targets.{task}={target:g}" for task in SENSITIVE)
    return [Run(f"elastic-t{target:g}", seed, changes) for seed in range(seeds)]


def ablations(seeds: int) -> list[Run]:
    """Other patterns (Tables 1 and 4), sizes of the router (Table 3) and pooling (Figure 14)."""
    changes = {
        "fa-xa": "elastic.sparse={name: xattention}",
        "xa-ssa": "elastic.retrieval={name: xattention}",
        "hidden2": "elastic.policy.hidden_multiplier=2",
        "hidden6": "elastic.policy.hidden_multiplier=6",
        "hidden8": "elastic.policy.hidden_multiplier=8",
        "boundary50": "elastic.policy.boundary=50",
        "boundaryall": "elastic.policy.boundary=null",
    }
    return [
        Run(group, seed, (change,)) for group, change in changes.items() for seed in range(seeds)
    ]


def router(trainings: Trainings, run: Run) -> Method:
    """How the result of a run attends."""
    return Method(run.name, "router", {"path": str((trainings.path(run) / "router").resolve())})


def static(trainings: Trainings, scorer: Scorer, size: Size) -> Callable[[Run], Iterable[Run]]:
    """For :meth:`Trainings.train`: after each of the recipe's routers, the static methods.

    They get the share of sparse heads that the routers have on average over the held-out samples,
    so all spend the same over the whole set.
    """
    main = f"elastic-t{main_target(Recipe.load(trainings.config, trainings.common)):g}"

    def then(run: Run) -> Iterable[Run]:
        if run.group == main:
            msr = mean_msr(scorer.score(router(trainings, run), size.length, size.samples))
            for policy in size.methods:
                changes = (f"policy={policy}", f"policy_settings.sparsity={msr:.4f}")
                yield Run(policy, run.seed, (*changes, *STEP_SIZES.get(policy, ())))

    return then


@dataclass(frozen=True)
class Subject:
    """A way to attend, and what is scored of it.

    Attributes
    ----------
    way
        What attends.
    group
        Its name without the seed; of an equal share, ``method@group of elastic``.
    seed
        Of its training, or the number of a random table.
    lengths
        Tokens and samples per task of each scoring.
    tasks
        Which ones.
    """

    way: Way
    group: str
    seed: int = 0
    lengths: tuple[tuple[int, int], ...] = ()
    tasks: tuple[str, ...] = field(default=tuple(TASKS))


def ways(
    trainings: Trainings, scorer: Scorer, size: Size, trained: Sequence[Run]
) -> Iterator[Subject]:
    """Everything to score, the most important first; it may depend on what was scored before."""
    recipe = Recipe.load(trainings.config, trainings.common)
    way = parts_of(recipe).way
    streams = streaming(way)
    main = f"elastic-t{main_target(recipe):g}"
    once = ((size.length, size.samples),)
    every = once + tuple((length, size.length_samples) for length in size.lengths)
    plain = [
        Subject(Method("full", "full"), "full", lengths=every),
        Subject(Method("streaming", "streaming", window(way)), "streaming", lengths=every),
    ]
    plain += [
        Subject(
            router(trainings, run),
            run.group,
            run.seed,
            every if run.group in {main, *BASELINES, "fa-xa", "xa-ssa"} else once,
        )
        for run in trained
    ]
    yield from plain
    # Beyond the trained length, also with positions that the backbone knows.
    for length in (one for one in size.lengths if one > size.length):
        for one in plain:
            if one.group in {"full", "streaming", main, *BASELINES}:
                longer = Stretched(one.way, length / size.length)
                few = ((length, size.length_samples),)
                yield Subject(longer, f"{one.group}+yarn", one.seed, few)

    # Static patterns at the share that elastic attention has on average.
    gates = {run: gate_scores(trainings.path(run)) for run in trained if run.group in BASELINES}
    shares: dict[str, list[float]] = {}
    for run in (run for run in trained if run.group.startswith("elastic-t")):
        msr = mean_msr(scorer.score(router(trainings, run), size.length, size.samples))
        shares.setdefault(run.group, []).append(msr)
        for other, scores in gates.items():
            if other.seed == run.seed and run.group != main:
                group = f"{other.group}@{run.group}"
                table = HeadTable.of_scores(scores, msr)
                cut = Static(f"{group}-s{run.seed}", table, streams)
                yield Subject(cut, group, run.seed, once)
    for share in size.shares:
        for other, scores in gates.items():
            group = f"{other.group}@{share:g}"
            table = HeadTable.of_scores(scores, share)
            cut = Static(f"{group}-s{other.seed}", table, streams)
            yield Subject(cut, group, other.seed, once)
    few = ((size.length, size.table_samples),)
    for group, found in shares.items():
        for number in range(size.tables):
            table = HeadTable.random(*scorer.shape, fmean(found), number)
            random = Static(f"random@{group}-{number}", table, streams)
            yield Subject(random, f"random@{group}", number, few, SENSITIVE)
    for name in size.selectors:
        kind, settings = SELECTORS[name]
        selecting = Method(name, kind, {**settings, "block_size": way.block_size})
        yield Subject(selecting, name, lengths=once)
