"""Importing elasticore is cheap, and what it says it exports is there and documented."""

from __future__ import annotations

import subprocess
import sys

import pytest

import elasticore


def run(code: str) -> str:
    """What ``code`` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_no_engine_and_no_model_library() -> None:
    code = (
        "import sys, elasticore; "
        "print(*sorted({'triton', 'flashinfer', 'transformers'} & set(sys.modules)))"
    )
    assert run(code) == ""


def test_an_attention_call_loads_no_engine_but_its_own() -> None:
    code = (
        "import sys, torch, elasticore; "
        "q = torch.randn(1, 2, 8, 16); "
        "plan = elasticore.HeadPlan(torch.zeros(1, 2, dtype=torch.int8)); "
        "elasticore.hybrid_head_attention(q, q, q, plan, backend='serial'); "
        "print(*sorted({'flashinfer', 'transformers'} & set(sys.modules)))"
    )
    assert run(code) == ""


@pytest.mark.parametrize("name", elasticore.__all__)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(elasticore, name)
    if callable(value):
        assert value.__doc__, f"elasticore.{name} has no docstring"
        assert not value.__doc__.startswith(f"{name}("), "only the signature that dataclass writes"


def test_public_names_are_listed_once_and_shown_by_dir() -> None:
    assert len(set(elasticore.__all__)) == len(elasticore.__all__)
    assert set(elasticore.__all__) == set(dir(elasticore))


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        elasticore.nothing_of_the_kind  # noqa: B018
