"""What ``elasticore analyze`` starts from: a model, its routers, prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.markup import escape

from elasticore.cli.console import count, err, steps

__all__ = ["bar", "load", "prompts_of", "route", "router_of", "way_to_read"]


def load(model: str, dtype: str) -> tuple[Any, Any]:
    """The backbone and its tokenizer."""
    from elasticore.models.loading import load_backbone

    with err.status(escape(f"loading {model}")):
        return load_backbone(model, dtype)


def prompts_of(
    backbone: Any, tokenizer: Any, tasks: str, length: str, samples: int, seed: int
) -> list[Any]:
    """Held-out samples of the two sets of tasks that need no download."""
    from elasticore.eval.ruler_like import RULER_LIKE, make_ruler_sample
    from elasticore.eval.tasks import TASKS, make_sample

    tokens, longest = count(length, "length"), backbone.config.max_position_embeddings
    if tokens > longest:
        raise ValueError(f"length {tokens} exceeds the {longest} positions of the model.")
    names = [name.strip() for name in tasks.split(",")]
    unknown = [name for name in names if name not in TASKS and name not in RULER_LIKE]
    if unknown:
        raise ValueError(
            f"tasks name the unknown {', '.join(map(repr, unknown))}; there are: "
            f"{', '.join([*TASKS, *RULER_LIKE])}."
        )
    return [
        (make_sample if name in TASKS else make_ruler_sample)(name, tokenizer, tokens, seed + i)
        for name in dict.fromkeys(names)
        for i in range(samples)
    ]


def router_of(model: str, router: str | None) -> str | None:
    """The routers that are named, or those that come with the model."""
    from elasticore.models.loading import TINY

    return TINY if router is None and model == TINY else router


def route(backbone: Any, model: str, router: str | None) -> None:
    """Make the backbone elastic."""
    from elasticore.models.elastic import elasticize

    path = router_of(model, router)
    if path is None:
        raise ValueError("router is missing: pass --router with the trained routers.")
    elasticize(backbone, path)


def way_to_read(backbone: Any, model: str, router: str | None, method: str | None) -> Any:
    """The way whose sparse heads are looked at: a method's, the routers', or the paper's."""
    from elasticore.eval.methods import Method
    from elasticore.models.elastic import Elastic

    if method is None:
        path = router_of(model, router)
        return Elastic() if path is None else Elastic.load(path)
    way = Method.parse(method).way(backbone)
    if way is None:
        raise ValueError(
            f"method {method} has no lane of sparse heads; name streaming or a selector, as "
            "xattention:threshold=0.9."
        )
    return way


def bar(text: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """What wraps samples in a progress bar."""
    return lambda samples: steps(samples, text)
