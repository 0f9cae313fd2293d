"""What every test shares: threads, hypothesis profiles, GPU skips and a clean backend registry."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from elasticore.backends import registry

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
    """The backend registry as it was before the test, whatever the test registers or chooses."""
    registered, instances = dict(registry._registered), dict(registry._instances)
    token = registry._default.set(registry.AUTO)
    registry._entry_points.cache_clear()
    yield
    registry._default.reset(token)
    for table, before in ((registry._registered, registered), (registry._instances, instances)):
        table.clear()
        table.update(before)
    registry._entry_points.cache_clear()
