"""The ``elasticore`` command: each module here adds its commands to the same app."""

from elasticore.cli.console import app

# isort: off
# In the order of `elasticore --help`.
from elasticore.cli import machine, fetching, answering, training, packing  # noqa: F401
from elasticore.cli import converting, evaluating, analyzing, benchmarking  # noqa: F401
# isort: on

__all__ = ["app"]
