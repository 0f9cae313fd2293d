"""Real text that every Python has at hand: the source of its standard library.

Code documents are `.py` files; prose documents are their docstrings, the language reference that
`pydoc` ships (`pydoc_data/topics.py`), and plain-text files such as the licence. Nothing is
downloaded. A document is held out by a hash of its path, so the split is the same on every machine
and for every Python version that has the file.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]
Kind = Literal["code", "prose"]

HELDOUT_PERCENT = 8
MIN_CHARACTERS = 200
TOPICS = "pydoc_data/topics.py"
# Third-party, platform-made or generated files: tables of characters and numbers teach nothing.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload"}
EXCLUDED_FILES = {
    TOPICS,  # split topic by topic instead
    "html/entities.py",
    "sre_constants.py",
    "re/_constants.py",
    "stringprep.py",
    "tkinter/constants.py",
    "lib2to3/pgen2/grammar.py",
}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes
    ----------
    path : str
        Where it comes from, relative to the standard library's root, with forward slashes.
    kind : {"code", "prose"}
        What it is.
    text : str
        The text itself, with ``\\n`` line ends.
    """

    path: str
    kind: Kind
    text: str


def is_heldout(name: str, percent: int = HELDOUT_PERCENT) -> bool:
    """Whether a name is of the `percent` of names held out, by a hash that never changes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < percent


@lru_cache(maxsize=8)
def documents(split: Split, kind: Kind, root: str | None = None) -> tuple[Document, ...]:
    """Read one part of the corpus, in the order of the paths.

    Parameters
    ----------
    split : {"train", "heldout"}
        About 92 % and 8 % of the paths.
    kind : {"code", "prose"}
        Source files, or English text.
    root : str, optional
        Folder to read; the running interpreter's standard library by default.

    Returns
    -------
    tuple of Document
        Never empty.

    Raises
    ------
    ValueError
        If `split` or `kind` is unknown.
    FileNotFoundError
        If the folder holds no such source, as in an interpreter frozen or stripped of its library.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'heldout'")
    if kind not in ("code", "prose"):
        raise ValueError(f"kind={kind!r} is unknown; use 'code' or 'prose'")
    base = Path(root or sysconfig.get_path("stdlib"))
    read = _code if kind == "code" else _prose
    found = tuple(d for d in read(base, split == "heldout") if len(d.text) >= MIN_CHARACTERS)
    if not found:
        raise FileNotFoundError(
            f"{base} holds no {split} {kind}: this interpreter ships no standard-library source; "
            "run under a Python with its .py files, or pass root=<a folder of Python source>"
        )
    return found


def _paths(base: Path, pattern: str, heldout: bool) -> list[tuple[Path, str]]:
    """Files that match `pattern` in one half of the split, each with its relative path."""
    chosen = []
    for file in base.rglob(pattern):
        path = file.relative_to(base).as_posix()
        excluded = (
            not EXCLUDED_FOLDERS.isdisjoint(file.relative_to(base).parts)
            or path in EXCLUDED_FILES
            or path.startswith(EXCLUDED_PREFIXES)
        )
        if not excluded and is_heldout(path) == heldout:
            chosen.append((file, path))
    return sorted(chosen, key=lambda item: item[1])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""  # test suites ship files in other encodings on purpose


def _code(base: Path, heldout: bool) -> list[Document]:
    return [Document(path, "code", _read(file)) for file, path in _paths(base, "*.py", heldout)]


def _prose(base: Path, heldout: bool) -> list[Document]:
    found = [
        Document(path, "prose", _read(file))
        for file, path in _paths(base, "*.txt", heldout)
        if not {"test", "tests"} & set(path.split("/"))
    ]
    for file, path in _paths(base, "*.py", heldout):
        if not path.startswith("test/"):  # tests hardly document themselves
            found.append(Document(path, "prose", _docstrings(_read(file))))
    for name, text in _topics(base / TOPICS).items():
        path = f"pydoc_data/topics/{name}"
        if is_heldout(path) == heldout:
            found.append(Document(path, "prose", text))
    return found


def _docstrings(source: str) -> str:
    """Every docstring of a module that is longer than a line, a blank line between two."""
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return ""  # templates and deliberately broken files
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in nodes if isinstance(node, owners))
    return "\n\n".join(text for text in texts if text and len(text) >= 80)


def _topics(file: Path) -> dict[str, str]:
    """The language reference's sections by name; read, never imported."""
    if not file.is_file():
        return {}
    for node in ast.parse(_read(file)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return dict(ast.literal_eval(node.value))
    return {}
