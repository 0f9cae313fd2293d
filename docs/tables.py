"""Measured results in these pages: a directive for tables, a role for figures in sentences.

In a page::

    ```{results} tiny-elastic.json retrieval
    :rows: needle, multikey
    :below: gpu, date

    Full attention = results.full.{row}.accuracy
    Elastic = results.elastic.{row}.accuracy
    ```

Every column is a heading and a dotted path into ``benchmarks/results/tiny-elastic.json``, in which
``{row}`` stands for the row's name. A path that ends in ``a|b|c`` gives the smallest of those that
there are. The values at ``below`` are printed under the table. A path that the file lacks is an
error; a file that is missing is said to be missing.

In a sentence::

    It takes {figure}`bench.json a.ms : .1f` ms, {figure}`bench.json 1 - a.ms / b.ms : .0%` less.

The paths are those of the tables. ``-`` and ``/`` with spaces around them subtract and divide, and
numbers may stand in for paths. What follows ``:`` is one of Python's format specifications; without
it a value looks as it does in a table. Here a file that is missing is an error too.

The README has tables only. ``python docs/tables.py docs/tiny.md docs/benchmarks.md README.md``
writes the tables of the first files into the last, between ``<!-- table:retrieval -->`` and
``<!-- /table:retrieval -->``.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from docutils.nodes import Node
    from sphinx.application import Sphinx

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
BLOCK = re.compile(r"^```\{results\} (\S+) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(\.\d+)?")


def look_up(results: Any, path: str) -> Any:
    """The value at a dotted path; a key may hold dots itself."""
    if isinstance(results, dict):
        for end in [len(path), *(i for i in reversed(range(len(path))) if path[i] == ".")]:
            if path[:end] in results:
                value = results[path[:end]]
                return value if end == len(path) else look_up(value, path[end + 1 :])
        raise ValueError(f"there is no {path!r} among {', '.join(results)}")
    raise ValueError(f"there is nothing below which {path!r} could be")


def smallest(results: Any, path: str) -> Any:
    """The value at a path, or the smallest of several whose last keys are joined by ``|``."""
    parent, _, last = path.rpartition(".")
    if "|" not in last:
        return look_up(results, path)
    there = look_up(results, parent)
    found = [there[name] for name in last.split("|") if there.get(name) is not None]
    if not found:
        raise ValueError(f"none of {last!r} is among {', '.join(there)}")
    return min(found)


def cell(value: object, percent: bool = False) -> str:
    """One value as text: three decimals, one from 100 on and for percents; a dash for None.

    What three decimals would make a zero of is written with an exponent.
    """
    if value is None:
        return "–"
    if isinstance(value, float):
        if 0 < abs(value) < 5e-4:
            return f"{value:.1e}"
        return f"{value:,.3f}" if abs(value) < 100 and not percent else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def calculate(results: Any, expression: str) -> Any:
    """The value of a path, or of paths and numbers with `` / `` and `` - `` between them."""
    minuend, *subtrahends = expression.split(" - ")
    if subtrahends:
        return calculate(results, minuend) - sum(calculate(results, one) for one in subtrahends)
    dividend, *divisors = expression.split(" / ")
    if divisors:
        return calculate(results, dividend) / math.prod(calculate(results, d) for d in divisors)
    return float(expression) if NUMBER.fullmatch(expression) else smallest(results, expression)


def figure(text: str) -> str:
    """The text of a figure: of ``file.json expression`` or ``file.json expression : format``.

    Raises
    ------
    ValueError
        If there is no such file, a path is not in it, or its value cannot be calculated with or
        formatted.
    """
    file, _, rest = " ".join(text.split()).partition(" ")
    expression, _, form = rest.partition(" : ")
    if not (RESULTS / file).is_file():
        raise ValueError(f"there is no benchmarks/results/{file}")
    try:
        value = calculate(json.loads((RESULTS / file).read_text(encoding="utf-8")), expression)
        return format(value, form).replace("%", " %") if form else cell(value)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {expression}: {error}") from error


def table(file: str, rows: str, columns: Sequence[str], below: str = "") -> str:
    """One table as Markdown, or a sentence that says that it is not measured.

    Raises
    ------
    ValueError
        If a path is not in the file, or a column is not ``heading = path``.
    """
    source = RESULTS / file
    if not source.is_file():
        return f"*Not measured yet: there is no `benchmarks/results/{file}`.*"
    results = json.loads(source.read_text(encoding="utf-8"))
    pairs = [column.partition("=") for column in columns if column.strip()]
    if not pairs or not all(sign for _, sign, _ in pairs):
        raise ValueError(f"{file}: every column is 'heading = dotted path', got {list(columns)}")
    lines = [["", *(heading.strip() for heading, _, _ in pairs)], ["---", *["--:"] * len(pairs)]]
    for row in (name.strip() for name in rows.split(",")):
        cells = (
            cell(
                smallest(results, path.strip().replace("{row}", row)),
                "%" in heading or "points" in heading,
            )
            for heading, _, path in pairs
        )
        lines.append([f"`{row}`", *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    facts = [path.strip() for path in below.split(",") if path.strip()]
    if facts:
        named = [(path.split(".")[-1].replace("_", " "), look_up(results, path)) for path in facts]
        text += "\n\n" + "; ".join(f"{name}: {cell(value)}" for name, value in named) + "."
    return text


def tables_of(page: str) -> Iterator[tuple[str, str]]:
    """Name and Markdown of every table that a page asks for."""
    for file, name, body in BLOCK.findall(page):
        options = dict(re.findall(r"^:(\w+): *(.*)$", body, re.MULTILINE))
        columns = [line for line in body.splitlines() if not line.startswith(":")]
        yield name, table(file, options["rows"], columns, options.get("below", ""))


def fill(text: str, tables: dict[str, str]) -> str:
    """``text`` with every table between its two comments."""
    for name, markdown in tables.items():
        between = rf"(<!-- table:{re.escape(name)} -->\n).*?(<!-- /table:{re.escape(name)} -->)"
        found = re.compile(between, re.DOTALL)
        text = found.sub(lambda m: f"{m[1]}\n{markdown}\n\n{m[2]}", text)  # noqa: B023
    return text


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the ``results`` directive and the ``figure`` role known to Sphinx."""
    from docutils import nodes
    from docutils.parsers.rst import directives
    from docutils.statemachine import StringList
    from sphinx.util.docutils import SphinxDirective, SphinxRole

    class Results(SphinxDirective):
        required_arguments = 2
        has_content = True
        option_spec: ClassVar = {
            "rows": directives.unchanged_required,
            "below": directives.unchanged,
        }

        def run(self) -> list[Node]:
            file, _ = self.arguments
            self.env.note_dependency(str(RESULTS / file))
            rows, below = self.options.get("rows", ""), self.options.get("below", "")
            try:
                text = table(file, rows, list(self.content), below)
            except ValueError as error:
                raise self.error(str(error)) from error
            holder = nodes.container()
            self.state.nested_parse(StringList(text.splitlines(), file), 0, holder)
            return list(holder.children)

    class Figure(SphinxRole):
        def run(self) -> tuple[list[Node], list[nodes.system_message]]:
            self.env.note_dependency(str(RESULTS / self.text.split()[0]))
            try:
                return [nodes.Text(figure(self.text))], []
            except ValueError as error:
                message = self.inliner.reporter.error(str(error), line=self.lineno)
                return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]

    app.add_directive("results", Results)
    app.add_role("figure", Figure())
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    *pages, target = map(Path, sys.argv[1:])
    tables = dict(pair for page in pages for pair in tables_of(page.read_text(encoding="utf-8")))
    target.write_text(fill(target.read_text(encoding="utf-8"), tables), encoding="utf-8")
