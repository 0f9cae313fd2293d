"""Sphinx configuration: Markdown pages, NumPy docstrings, and nothing from the network."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import elasticore  # noqa: E402 - the checkout that these pages belong to, installed or not

logger = getLogger(__name__)

project = "elasticore"
author = "The elasticore authors"
copyright = "2026, The elasticore authors"
version = release = elasticore.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "support",
    "tables",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"elasticore {release}"
html_static_path = ["_static"]
html_css_files = ["wide-tables.css"]

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = False

# The pages are built without inventories of other projects, so names that are theirs stay text. So
# do the words of types such as "int64, shape (length,)", and names that start with an underscore.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|np|numpy|npt|transformers|tokenizers|lm_eval)\..*"),
    (
        "py:.*",
        r"(abc|collections\.abc|contextvars|dataclasses|enum|pathlib|random|threading|typing)(\..*)?",
    ),
    ("py:class", r"Tensor|NDArray|Path|PreTrainedTokenizerBase|Tokens|Tokenizer"),
    ("py:class", r"TrainingArguments|GenerateDecoderOnlyOutput|\w+Config"),
    ("py:class", r"[^A-Z.]*"),
    ("py:class", r".*\.(Base|Model|Item|Prepared|Made)|LayerState"),
    ("py:.*", r"(.*\.)?_\w+"),
    ("py:attr", r"temperature|tasks"),
    ("py:mod", r"elasticore\.router\.schedule"),
]


def find_by_tail(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Resolve a name that is documented under another path.

    Users import ``elasticore.HeadPlan``, docstrings say ``HeadPlan``, and the reference documents
    ``elasticore.plan.HeadPlan``: all three mean the one object whose path ends that way.
    """
    if node.get("refdomain") != "py":
        return None
    parts = node["reftarget"].split(".")
    first = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    tail = "." + ".".join(parts[first:])
    domain: Any = env.domains["py"]
    kinds = domain.objtypes_for_role(node["reftype"]) or ()
    found = {
        name: entry
        for name, entry in domain.objects.items()
        if name.endswith(tail) and entry.objtype in kinds and not entry.aliased
    }
    if len(found) != 1:
        return None
    ((name, entry),) = found.items()
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)


def name_as_imported(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Make every public name known where users import it, to other projects' references too."""
    domain: Any = env.domains["py"]
    for name in (one for one in elasticore.__all__ if one != "__version__"):
        value = getattr(elasticore, name)
        home = getattr(value, "__module__", None), getattr(value, "__qualname__", name)
        entry = domain.objects.get(".".join(map(str, home)))
        if entry is None:  # a constant: it does not know where it is
            ends = f".{name}"
            entry = next((e for n, e in domain.objects.items() if n.endswith(ends)), None)
        if entry is None:
            logger.warning("elasticore.%s is documented nowhere", name)
        else:
            domain.objects[f"elasticore.{name}"] = entry._replace(aliased=True)
    return []


def tidy(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Leave out what Python says of a named tuple's field; keep attributes in one entry together.

    Sphinx takes "first, last" for a type and a name.
    """
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    for index, line in enumerate(lines):
        names, colon, text = line.removeprefix(":ivar ").partition(":")
        if line.startswith(":ivar "):
            lines[index] = f":ivar {names.replace(', ', ',')}{colon}{text}"


def setup(app: Sphinx) -> None:
    """Connect them."""
    app.connect("env-updated", name_as_imported)
    app.connect("missing-reference", find_by_tail)
    app.connect("autodoc-process-docstring", tidy, priority=900)  # after napoleon
