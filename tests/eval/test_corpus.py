"""The corpus: real text, split by path, and a clear word where there is none."""

from __future__ import annotations

import re

import pytest

from elasticore.eval.corpus import HELDOUT_PERCENT, documents, is_heldout


@pytest.fixture
def library(tmp_path):
    """A folder that looks like a standard library of a hundred modules."""
    for i in range(100):
        body = f'"""{"A sentence of prose. " * 12}"""\nNUMBER = {i}\n' + "x = 1\n" * 50
        (tmp_path / f"module{i}.py").write_text(body)
    (tmp_path / "latin.py").write_bytes("# é\n".encode("latin-1") * 100)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("y = 2\n" * 100)
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(
        "topics = {" + ",".join(f"'topic{i}': {'word ' * 60!r}" for i in range(100)) + "}\n"
    )
    return str(tmp_path)


def test_interpreter_has_both_kinds_held_out():
    for kind in ("code", "prose"):
        found = documents("heldout", kind)
        assert sum(len(d.text) for d in found) > 50_000
        assert all(is_heldout(d.path) and d.kind == kind for d in found)


def test_split_is_by_path_complete_and_disjoint(library):
    paths = {s: {d.path for d in documents(s, "code", library)} for s in ("train", "heldout")}
    assert not paths["train"] & paths["heldout"]
    assert paths["train"] | paths["heldout"] == {f"module{i}.py" for i in range(100)}
    share = sum(is_heldout(f"name{i}") for i in range(10_000)) / 10_000
    assert share == pytest.approx(HELDOUT_PERCENT / 100, abs=0.01)


def test_prose_is_docstrings_and_topics(library):
    found = [*documents("train", "prose", library), *documents("heldout", "prose", library)]
    assert sum(d.path.startswith("pydoc_data/topics/") for d in found) == 100
    assert sum(bool(re.fullmatch(r"module\d+\.py", d.path)) for d in found) == 100
    assert not any("NUMBER" in d.text for d in found)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="split='test' is unknown"):
        documents("test", "code")
    with pytest.raises(ValueError, match="kind='poem' is unknown"):
        documents("train", "poem")
    with pytest.raises(FileNotFoundError, match="ships no standard-library source"):
        documents("train", "code", str(tmp_path))
