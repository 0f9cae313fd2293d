"""``python -m elasticore`` is the ``elasticore`` command."""

from elasticore.cli import app

app()
