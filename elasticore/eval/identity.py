"""What an evaluation is told from others by: its settings, and what model and data are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elasticore import __version__
from elasticore.checks import differences
from elasticore.data.encoding import fingerprint as tokenizer_fingerprint
from elasticore.eval.methods import Method
from elasticore.models.fingerprint import fingerprint, weights_hash

if TYPE_CHECKING:
    from elasticore.eval.evaluate import Evaluation

__all__ = ["SETTINGS", "check_same", "content_of", "leaves", "settings_of"]

SETTINGS = "evaluation.json"
FREE = ("methods", "batch_size")
"""Settings that may differ in one folder: a method has a folder of its own there."""


def settings_of(evaluation: Evaluation, methods: Sequence[Method]) -> dict[str, Any]:
    """What is known of an evaluation before anything is loaded, as JSON values."""
    own: dict[str, Any] = json.loads(json.dumps(asdict(evaluation)))
    own["methods"] = {m.name: {**asdict(m), "sha256": m.digest()} for m in methods}
    return {**own, "elasticore": __version__}


def content_of(model: Any, tokenizer: Any, tasks: Iterable[Any], samples: int | None) -> Any:
    """What a model, its tokenizer and the samples are, whatever their names: hashes of them.

    Parameters
    ----------
    model, tokenizer
        As they are loaded; not elastic.
    tasks
        Tasks, and groups of them.
    samples
        How many of each task's count; None for all.
    """
    data = hashlib.sha256()
    for task in leaves(tasks):
        for row in (task.config.task, *task.rows[:samples]):
            data.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return {
        # Of every weight: what was merged into a model may leave its norms as they were.
        "backbone": {**fingerprint(model), "weights": weights_hash(model.parameters())},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "rows": data.hexdigest()[:32],
    }


def check_same(output: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a folder has with ``own``, whose methods join those that are there.

    Raises
    ------
    ValueError
        If the folder is another evaluation's, or its record is damaged.
    """
    file = output / SETTINGS
    if not file.is_file():
        return dict(own)
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        known: dict[str, Any] = dict(saved["methods"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}), so it does not say whose answers there are; name "
            "another folder."
        ) from error
    fixed = {name: value for name, value in own.items() if name not in FREE}
    differs = differences(saved, fixed)
    if differs:
        raise ValueError(
            f"output {output} holds another evaluation: {', '.join(differs)}. Name another folder, "
            "or resume with the same."
        )
    for name, method in own["methods"].items():
        if known.get(name, method) != method:
            raise ValueError(
                f"output {output} holds answers of another method {name!r} (of other settings, or "
                "of files that have changed since); call this one by a name of its own, NAME=KIND."
            )
    return {**own, "methods": known | own["methods"]}


def leaves(tasks: Iterable[Any]) -> Iterator[Any]:
    """The harness's tasks, without the groups that they are in."""
    for task in tasks:
        if hasattr(task, "child_names"):
            yield from leaves(task)
        else:
            yield task
