"""The model card beside routers on disk: what is known of them, and headings for the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elasticore.models.fingerprint import HUB_ID
from elasticore.places import write_text

__all__ = ["CARD", "is_card", "model_card", "write_card"]

CARD = "README.md"
_OPEN = "To be filled in"
_MARK = "library_name: elasticore"

_TEXT = """\
---
{front}
---

# Routers for {model}

With them every key-value head attends in one of two ways, which is decided for each prompt.
The model itself is not in here, and is not changed.

## Use

```python
import elasticore
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({backbone}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({backbone})
elasticore.elasticize(model, {routers})
```

{notes}## What decides, and what heads read

| | |
| --- | --- |
{rows}

## Data

{open}: which texts, under which licences.

## Training

{open}: the recipe or command, steps, tokens, hardware, time.

## Figures

{open}: scores beside full attention, the share of sparse heads (Ω_MSR), on which data, seeds.

## Limits

{open}: languages, lengths and tasks that were not tried, and where it is worse than full attention.
"""


def model_card(
    way: Mapping[str, Any], base_model: Mapping[str, Any] | None, hub_id: str | None = None
) -> str:
    """The Markdown of a card, with the front matter that the Hugging Face hub reads.

    Parameters
    ----------
    way
        The settings of a way to attend, as :meth:`Elastic.to_dict` gives them.
    base_model
        The fingerprint of the backbone that it is for, or None.
    hub_id
        Where on the hub the routers are, if they are there.
    """
    base = base_model or {}
    name, family = str(base.get("name") or ""), base.get("family")
    # A path of two parts looks like a hub id.
    known = bool(HUB_ID.match(name)) and not Path(name).exists()
    tags = ["elastic-attention", "sparse-attention", "arxiv:2601.17367", *([family] * bool(family))]
    front = [_MARK, *([f"base_model: {json.dumps(name)}"] * known), f"tags: {json.dumps(tags)}"]
    notes = [] if known else [f"{_OPEN}: where the model is."]
    if hub_id is None:
        notes.append('`"."` is the folder of this file; an id on the hub, `"user/name"`, will do.')
    return _TEXT.format(
        front="\n".join(front),
        model=name or (f"a {family} model" if family else "any model"),
        backbone=json.dumps(name or "the-model", ensure_ascii=False),
        routers=json.dumps(hub_id or "."),
        notes="".join(f"{note}\n\n" for note in notes),
        rows="\n".join(_rows(way, base_model)),
        open=_OPEN,
    )


def write_card(folder: Path, text: str) -> None:
    """Write a card, whole, into a folder that has no ``README.md``; else leave it as it is."""
    if os.path.lexists(folder / CARD):
        return
    write_text(folder / CARD, text)


def is_card(file: Path) -> bool:
    """Whether a file is a card of routers, filled in or not, and no other text of somebody's."""
    try:
        _, front, _ = file.read_text(encoding="utf-8").split("---\n", 2)
    except (OSError, ValueError):
        return False
    return _MARK in front.splitlines()


def _rows(way: Mapping[str, Any], base_model: Mapping[str, Any] | None) -> list[str]:
    """What is known, as rows of a table."""
    told = {
        "what decides": _named(way["policy"]),
        "retrieval heads read": _named(way["retrieval"]),
        "sparse heads read": _named(way["sparse"]),
        "tokens per block": str(way["block_size"]),
        "while a prompt is read": f"`{way['prefill']}`",
        "while tokens are generated": f"`{way['decode']}`",
    }
    if base_model is not None:
        sizes = ("layers", "kv_heads", "head_dim")
        told["the model's sizes"] = ", ".join(f"{key} {base_model[key]}" for key in sizes)
    return [f"| {what} | {value} |" for what, value in told.items()]


def _named(part: Mapping[str, Any]) -> str:
    """A policy or a pattern: its name, and its settings."""
    settings = [f"{key} {value}" for key, value in part.items() if key != "name"]
    return f"`{part['name']}`{': ' * bool(settings)}{', '.join(settings)}".replace("|", r"\|")
