"""What the documentation shows runs, and what it lists is complete.

A fenced ``python`` block of a page is executed: as a doctest if it holds prompts, as a program if
not. The blocks of a page share their names. Examples that need a large model or long are fenced as
``{code-block} python``; they, and the README's, are compiled only.
"""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import elasticore

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\S[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.NORMALIZE_WHITESPACE

# What a figure in a sentence looks like, and what is no sentence.
UNIT = (
    r"(?:%|×|(?:[mµ]?s|seconds?|milliseconds?|microseconds?|minutes?|hours?|percent|x|times|points?"
    r"|[GM]i?B|[GT]B/s|TFLOP/s|tokens/s|tokens (?:a|per) second)\b)"
)
FIGURE = re.compile(rf"(?<![\w.,/])\d[\d.,]*\s*{UNIT}(?!\s*\d)")
NO_PROSE = re.compile(
    r"^(`{3,}|~{3,}).*?^\1$"  # fenced code and directives
    r"|^(?:#|\|)[^\n]*$"  # headings and rows of tables
    r"|<!--.*?-->|!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)"  # comments, images, the targets of links
    r"|`(?:[^`\n]|\n(?!\n))+`",  # code in a line, and roles
    re.MULTILINE | re.DOTALL,
)

# Figures in sentences that are no measurements of ours, and what they are.
STAY = {
    ("docs/auto.md", "2 %"): "a setting of benchmarks/costs.py",
    ("docs/benchmarks.md", "150 ms"): "a setting of elasticore bench",
    ("docs/benchmarks.md", "0.6 s"): "a setting of elasticore bench",
    ("docs/benchmarks.md", "13.5 times"): "a figure of XAttention's authors",
    ("docs/cli.md", "93 MB"): "the size of a download",
    ("docs/cli.md", "10 MB"): "the size of downloads",
    ("docs/limits.md", "512 MB"): "a limit that the code sets",
    ("docs/training.md", "30 seconds"): "a setting of torchrun",
    ("docs/training.md", "16.1 GB"): "parameters times their bytes",
    ("docs/training.md", "0.44 GB"): "parameters times their bytes",
    ("docs/training.md", "0.14 GB"): "parameters times their bytes",
    ("docs/training.md", "0.37 GB"): "tokens times their bytes",
    ("docs/training.md", "20 GB"): "logits times their bytes",
    ("docs/training.md", "17 GB"): "tokens times their bytes",
    ("docs/training.md", "1 GiB"): "a limit that the code sets",
    ("docs/training.md", "12 hours"): "a figure of the paper",
}

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not here")


def blocks(page: Path, kind: str) -> list[tuple[int, str]]:
    """First line and text of every fenced block of a kind."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(2)), found[2])
        for found in FENCE.finditer(text)
        if found[1].strip() == kind
    ]


def pages_with(kind: str) -> list[Path]:
    return [page for page in sorted(DOCS.glob("*.md")) if blocks(page, kind)]


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.stem)
def test_examples_of_a_page(page, request):
    if "elasticore_example" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("example")
    names: dict[str, object] = {"__name__": "__main__"}
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for line, text in blocks(page, "python"):
        if ">>>" in text:
            test = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), line)
            runner.run(test, clear_globs=False)
            names.update(test.globs)
        else:
            exec(compile("\n" * line + text, str(page), "exec"), names)
    assert not runner.failures, "see the output for what differs"


@pytest.mark.parametrize("page", pages_with("{code-block} python"), ids=lambda page: page.stem)
def test_other_examples_are_python(page):
    for line, text in blocks(page, "{code-block} python"):
        compile("\n" * line + text, str(page), "exec")


def test_the_readme_is_python():
    for line, text in blocks(ROOT / "README.md", "python"):
        compile("\n" * line + text, "README.md", "exec")


def modules() -> list[str]:
    found = pkgutil.walk_packages(elasticore.__path__, "elasticore.")
    names = sorted(info.name for info in found)
    return ["elasticore", *(name for name in names if not name.endswith("__main__"))]


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("name", modules())
def test_examples_of_a_module(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("elasticore"):
            raise
        pytest.skip(f"needs {error.name}")
    assert not doctest.testmod(module, optionflags=FLAGS).failed


def test_every_public_name_is_in_the_reference():
    documented = set()
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"automodule:: (\S+)", page.read_text(encoding="utf-8")):
            module = importlib.import_module(name)
            documented |= set(getattr(module, "__all__", vars(module)))
    missing = set(elasticore.__all__) - documented - {"__version__"}
    assert not missing, f"add them to a page of docs/api: {sorted(missing)}"


def test_every_family_is_in_the_table():
    table = (DOCS / "models.md").read_text(encoding="utf-8")
    missing = [
        name
        for name, family in elasticore.FAMILIES.items()
        if f"| `{name}` | {', '.join(f'`{module}`' for module in family.modules)} |" not in table
    ]
    assert not missing, f"add them to the table in docs/models.md: {missing}"


def test_every_source_and_column_is_in_the_data_page():
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    data = importlib.import_module("elasticore.data")
    for name, source in data.SOURCES.items():
        row = re.search(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        assert row, f"docs/data.md has no row for the source {name}"
        assert source.hub is None or source.hub in row[0]
        assert source.licence in row[0]
    layouts = importlib.import_module("elasticore.data.layouts")
    for name in layouts.COLUMNS | layouts.OFFICIAL_COLUMNS:
        assert f"`{name}`" in page


def test_every_option_is_in_the_command_line_page():
    typer = pytest.importorskip("typer")
    cli = importlib.import_module("elasticore.cli")
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(cli.app).commands.items():
        part = re.search(rf"^## {name}$(.*?)(^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert part, f"docs/cli.md has no section {name}"
        commands = [command, *getattr(command, "commands", {}).values()]  # a group's, too
        for parameter in (p for one in commands for p in one.params):
            options = [*parameter.opts, *parameter.secondary_opts]
            if parameter.param_type_name == "option":
                assert any(f"`{option}`" in part[1] for option in options), (name, options)


def test_recipes_of_the_training_page_load(tmp_path):
    yaml = pytest.importorskip("yaml")
    recipe = importlib.import_module("elasticore.train.recipe")
    found = blocks(DOCS / "training.md", "yaml") + blocks(DOCS / "data.md", "yaml")
    assert found
    for _, text in found:
        assert isinstance(yaml.safe_load(text), dict)
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        loaded = recipe.Recipe.load(tmp_path / "recipe.yaml")
        assert isinstance(recipe.parts_of(loaded).way, elasticore.Elastic)
        elasticore.LagrangianObjective(loaded.targets)


@pytest.mark.usefixtures("clean_registry")
def test_the_table_of_what_runs_where_asks_every_backend(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    support = importlib.import_module("support")
    asked = []

    class Particular(elasticore.backends.serial.SerialAttention):
        devices = ("cuda", "xpu")

        def supports(self, request):
            asked.append(request)
            fits = request.head_dim == 128 and request.queries > 1 and not request.gradients
            return elasticore.Verdict(fits and request.dtype.itemsize == 2, "too particular.")

    elasticore.register_backend("particular", Particular)
    rows = [line.strip("| ").split(" | ") for line in support.support().splitlines()]
    heads, table = rows[0], {tuple(row[:2]): row[2:] for row in rows[2:]}
    assert {name for name, _ in table} == {f"`{info.name}`" for info in elasticore.list_backends()}
    assert {request.device.type for request in asked} == {"cuda", "xpu"}, "there need be none"
    assert dict(zip(heads[2:], table["`particular`", "xpu"], strict=True)) == {
        "prefill": "bf16, fp16",
        "decode": "–",
        "gradients": "–",
        "padded": "bf16, fp16",
        "packed": "bf16, fp16",
        "selector": "bf16, fp16",
        "head_dim": "128",
        "head_dim, gradients": "–",
    }
    # As on a GPU, though the tests run in Triton's interpreter.
    assert table["`triton`", "cuda"][0] == "bf16, fp16, fp32"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    return importlib.import_module("tables")


RESULT = {
    "gpu": "a GPU",
    "settings": {"samples_per_task": 1000},
    "figures": {
        "full": {"needle": 0.98765, "code": 1.0, "code.answer": None, "refused": None},
        "steps": 5,
    },
}


@pytest.fixture
def measured(tables, tmp_path, monkeypatch):
    (tmp_path / "one.json").write_text(json.dumps(RESULT), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)


@pytest.mark.usefixtures("measured")
def test_results_become_a_table(tables):
    columns = ["Full = figures.full.{row}", "", "Steps = figures.steps"]
    text = tables.table(
        "one.json", "needle, code.answer", columns, "gpu, settings.samples_per_task"
    )
    assert text.splitlines() == [
        "|  | Full | Steps |",
        "| --- | --: | --: |",
        "| `needle` | 0.988 | 5 |",
        "| `code.answer` | – | 5 |",
        "",
        "gpu: a GPU; samples per task: 1,000.",
    ]


@pytest.mark.usefixtures("measured")
def test_a_column_may_be_the_smallest_of_several_values(tables):
    text = tables.table("one.json", "best", ["Least = figures.full.code|gone|needle|refused"])
    assert text.endswith("| `best` | 0.988 |")
    with pytest.raises(ValueError, match=r"none of 'gone\|lost' is among needle"):
        tables.table("one.json", "best", ["Least = figures.full.gone|lost"])


@pytest.mark.usefixtures("measured")
def test_a_path_that_the_results_lack_is_an_error(tables):
    with pytest.raises(ValueError, match="no 'prose' among needle, code"):
        tables.table("one.json", "prose", ["Full = figures.full.{row}"])
    with pytest.raises(ValueError, match="nothing below which 'more'"):
        tables.table("one.json", "prose", ["Steps = figures.steps.more"])
    with pytest.raises(ValueError, match="every column is 'heading = dotted path'"):
        tables.table("one.json", "needle", ["figures.full.{row}"])


def test_results_that_are_missing_are_said_to_be(tables):
    assert tables.table("none.json", "needle", []).startswith("*Not measured yet")


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("gpu", "a GPU"),
        ("settings.samples_per_task", "1,000"),
        ("figures.full.needle", "0.988"),
        ("figures.full.needle : .1%", "98.8 %"),
        ("figures.full.gone|needle : .2f", "0.99"),
        ("1 - figures.full.needle\n/ figures.steps : .0%", "80 %"),
        ("figures.steps / figures.full.code / 2 - 0.5 : .1f", "2.0"),
    ],
)
def test_results_become_a_figure(tables, text, shown):
    assert tables.figure(f"one.json {text}") == shown


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none.json gpu", "no benchmarks/results/none.json"),
        ("one.json figures.full.prose", "no 'prose' among needle, code"),
        ("one.json figures.full.code|refused / gone", "no 'gone' among gpu"),
        ("one.json gpu / figures.steps", "one.json: gpu / figures.steps: unsupported operand"),
        ("one.json figures.full.refused : .1f", "unsupported format"),
    ],
)
def test_a_figure_that_the_results_lack_is_an_error(tables, text, message):
    with pytest.raises(ValueError, match=message):
        tables.figure(text)


@pytest.mark.usefixtures("measured")
def test_tables_of_a_page_are_written_into_another(tables):
    page = "```{results} one.json first\n:rows: needle\n\nFull = figures.full.{row}\n```\n"
    before = "a\n<!-- table:first -->\nold\n<!-- /table:first -->\nb\n"
    after = tables.fill(before, dict(tables.tables_of(page)))
    table = "|  | Full |\n| --- | --: |\n| `needle` | 0.988 |"
    assert after == f"a\n<!-- table:first -->\n\n{table}\n\n<!-- /table:first -->\nb\n"


def figures(text: str) -> list[tuple[int, str]]:
    """Line and text of every figure with a unit that stands in a sentence of a page."""
    prose = NO_PROSE.sub(lambda found: "`" + "\n" * found[0].count("\n") + "`", text)
    return [
        (prose.count("\n", 0, found.start()) + 1, " ".join(found[0].split()))
        for found in FIGURE.finditer(prose)
    ]


def test_figures_are_found_in_sentences_only():
    page = """# 1 % of a heading

It takes 1.5 ms, 20
% or 1,024 tokens/s, a window of 512 tokens, {figure}`one.json a : .0f` ms and `3 ms`.

| 4 % | 5 times |

```text
6 GiB
```

![7 %](8%.png) [9 × as fast](10%.md) and 2 × 4 <!-- 11 s --> in 12 µs, 13-14 points.
"""
    assert figures(page) == [
        (3, "1.5 ms"),
        (3, "20 %"),
        (4, "1,024 tokens/s"),
        (12, "9 ×"),
        (12, "12 µs"),
        (12, "14 points"),
    ]


def test_measured_figures_come_from_the_results():
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "api").glob("*.md"))]
    found = {
        (page.relative_to(ROOT).as_posix(), figure): line
        for page in pages
        for line, figure in figures(page.read_text(encoding="utf-8"))
    }
    stray = [f"{page}:{line}: {f}" for (page, f), line in found.items() if (page, f) not in STAY]
    assert not stray, f"use {{figure}}`file.json path`, or say it without a figure: {stray}"
    assert not STAY.keys() - found.keys(), "these are in no sentence any more"


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the results are not here")
def test_the_figures_of_the_pages_are_in_the_results(tables):
    texts = [page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))]
    roles = [role for text in texts for role in re.findall(r"{figure}`([^`]+)`", text)]
    assert roles
    assert all(tables.figure(role) for role in roles)


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the results are not here")
def test_the_tables_of_the_readme_are_the_results(tables):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = ("real-model.md", "decoding.md", "tiny.md", "benchmarks.md", "training.md")
    pages = [(DOCS / name).read_text(encoding="utf-8") for name in names]
    written = dict(pair for page in pages for pair in tables.tables_of(page))
    assert set(re.findall("<!-- table:(.*) -->", readme)) <= set(written)
    current = tables.fill(readme, written)
    command = f"python docs/tables.py {' '.join(f'docs/{name}' for name in names)} README.md"
    assert readme == current, f"run: {command}"
