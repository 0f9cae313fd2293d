"""Pictures are written, with one panel per task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elasticore.eval.plots import routing_picture


def test_decisions_of_prompts_are_named_and_frequencies_have_a_scale(tmp_path: Path) -> None:
    code, needle = torch.ones(3, 2), torch.tensor([[0.0, 1.0]] * 3)
    for often, axes in ((needle, 2), (needle / 2, 3)):
        found = {"code": code, "needle": often}
        path = routing_picture(found, tmp_path / "deep" / "routing.svg", title="Routing")
        text = path.read_text("utf-8")
        assert text.count('id="axes_') == axes  # the panels, and the scale
        assert ('id="legend_' in text) == (axes == 2)


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frequency"):
        routing_picture({}, tmp_path / "routing.png")
