"""The page of a reproduction: one HTML file with its pictures in it, made of the figures alone."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipes.tiny.figures import draw
from recipes.tiny.sections import LIMITS, SECTIONS
from recipes.tiny.sentences import answer, here, meaning
from recipes.tiny.tables import (
    ablation_table,
    answer_table,
    length_table,
    made_table,
    msr_table,
    paired_table,
    paper_table,
    sparsification_table,
    task_table,
)

__all__ = ["write_report"]

Report = dict[str, Any]
TEMPLATE = "report.html"
PICTURES = ("front", *(section.name for section in SECTIONS))


def write_report(report: Report, output: Path) -> Path:
    """Draw the pictures and write ``report.html``.

    Parameters
    ----------
    report
        The figures, as ``reproduction.json`` holds them.
    output
        Folder of the page; its pictures are also in ``pictures`` there.
    """
    pictures = draw(report, output / "pictures")
    said = here(report)
    own_tables = {
        "sparsification": [sparsification_table(report)],
        "lengths": [length_table(report, "retrieval"), length_table(report, "text_loss")],
        "hidden": [ablation_table(report, "hidden")],
        "pooling": [ablation_table(report, "boundary")],
        "modes": [ablation_table(report, "modes")],
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        report=report,
        seeds=report["settings"]["seeds"],
        answer=answer(report),
        meaning=meaning(report),
        pictures={name: pictures.get(name) and _inline(pictures[name]) for name in PICTURES},
        tables={
            "paired": paired_table(report),
            "tasks": task_table(report),
            "msr": msr_table(report),
            "made": made_table(report),
            "paper": paper_table(),
        },
        sections=[
            {
                "name": section.name,
                "title": section.title,
                "paper": section.paper,
                "here": said.get(section.name, ""),
                "tables": [one for one in own_tables.get(section.name, []) if one["rows"]],
            }
            for section in SECTIONS
        ],
        examples=[
            {**one, "table": answer_table(one)} for one in report["analyses"].get("examples", [])
        ],
        notes=report.get("notes", []),  # written into the figures by hand
        limits=LIMITS,
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _inline(path: Path) -> str:
    """A picture as an address that holds all of it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
