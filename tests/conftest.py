"""What every test shares: threads, hypothesis profiles, GPU skips and a clean backend registry."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from elasticore import choice
from elasticore.backends import registry
from elasticore.backends.registry import BACKENDS
from elasticore.patterns.registry import PATTERNS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

# Without a GPU the kernels run in Triton's interpreter; to be said before its first import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: the first call of a kernel, or a busy machine, is no failure. CI draws the same
# examples every time; a developer's machine draws new ones.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """The registries as they were before the test, whatever the test registers or chooses."""
    tables = (BACKENDS._classes, registry.instances, PATTERNS._classes)
    kept = [dict(table) for table in tables]
    chosen = list(choice._process)
    choice._process.clear()
    _look_again()
    yield
    choice._process[:] = chosen
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)
    _look_again()


def _look_again() -> None:
    """Forget which packages are installed, and what ``auto`` chose."""
    BACKENDS.refresh()
    PATTERNS.refresh()
    registry.forget()


EXAMPLE = Path(__file__).resolve().parent / "plugins" / "elasticore_example"


@pytest.fixture(scope="session")
def example_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``tests/plugins/elasticore_example`` as pip would install it.

    Written by hand: pip would need the network, or a build backend that is here already.
    """
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(EXAMPLE / "elasticore_example", folder / "elasticore_example")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    name, version = project["name"], project["version"]
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = [
        "\n".join([f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n\n".join(points) + "\n")
    return folder


@pytest.fixture
def example(
    example_path: Path, clean_registry: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The example package, installed for one test."""
    monkeypatch.syspath_prepend(str(example_path))
    _look_again()
    yield example_path
    for name in [name for name in sys.modules if name.startswith("elasticore_example")]:
        del sys.modules[name]
