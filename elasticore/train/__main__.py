"""``python -m elasticore.train``: the command ``elasticore train``, as launchers start it."""

import sys

from elasticore.cli import app

app(["train", *sys.argv[1:]], prog_name="python -m elasticore")
