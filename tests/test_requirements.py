"""An old PyTorch or transformers is named, with what to do, and ends in no traceback of theirs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from elasticore.requirements import OLDEST, check_packages, is_older, oldest

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def with_old(package: str, version: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that finds a package in another version."""
    code = (
        "import importlib.metadata as metadata, sys\n"
        "found = metadata.version\n"
        f"metadata.version = lambda name: {version!r} if name == {package!r} else found(name)\n"
        f"{code}"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("package", "version", "use", "unloaded"),
    [
        ("torch", "2.4.1+cu121", "elasticore.HeadPlan", "torch"),
        ("torch", "2.4.1", "import elasticore.models.cache", "torch"),
        ("transformers", "4.57.0", "elasticore.Elastic", "transformers"),
        ("safetensors", "0.5.3", "elasticore.elasticize", "transformers"),
    ],
)
def test_an_old_package_is_named_before_it_is_imported(
    package: str, version: str, use: str, unloaded: str
) -> None:
    done = with_old(
        package,
        version,
        "import elasticore\n"  # which imports none of them, and works
        f"try:\n    {use}\n"
        "except elasticore.OutdatedPackage as error:\n    print(error)\n"
        f"assert {unloaded!r} not in sys.modules",
    )
    wanted = oldest(package)
    assert done.stdout.strip() == (
        f"{package} {version} is too old: elasticore needs {wanted} or newer; "
        f"pip install --upgrade '{package}>={wanted}'."
    ), done.stderr


def test_a_command_ends_in_that_line() -> None:
    call = "sys.argv[1:] = ['run', '--model', 'tiny', '--prompt-file', '/nowhere']\n"
    done = with_old("transformers", "4.57.0", f"{call}from elasticore.cli import app\napp()")
    assert done.returncode == 2
    assert done.stderr.startswith("error: transformers 4.57.0 is too old")
    assert done.stderr.count("\n") == 1


def test_doctor_still_shows_the_rest_and_fails() -> None:
    call = "sys.argv[1:] = ['doctor']\n"
    done = with_old("transformers", "4.57.0", f"{call}from elasticore.cli import app\napp()")
    assert done.returncode == 1
    assert "serial" in done.stdout
    assert "transformers 4.57.0 is too old" in " ".join(done.stdout.split())


def test_the_oldest_are_those_that_pip_is_told() -> None:
    told = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', PROJECT.read_text("utf-8")))
    assert {package: told[package] for package in OLDEST} == {
        package: oldest(package) for package in OLDEST
    }


@pytest.mark.parametrize(
    ("version", "older"),
    [
        ("5.17.0", False),
        ("5.17", False),
        ("5.17.0.dev0", False),
        ("6.0", False),
        ("5.9.3", True),
        ("5", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, older: bool) -> None:
    assert is_older("transformers", version) is older


def test_what_is_not_installed_is_left_to_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OLDEST, "not-a-package", (1, 0))
    check_packages("not-a-package")
