"""Pictures are written, with one panel per task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elasticore.eval.plots import routing_picture


def test_routing_picture(tmp_path: Path) -> None:
    frequency = {"code": torch.ones(3, 2), "needle": torch.tensor([[0.0, 1.0]] * 3)}
    path = routing_picture(frequency, tmp_path / "deep" / "routing.svg", title="Routing")
    text = path.read_text("utf-8")
    assert text.count('id="axes_') == 3  # two panels and the colour bar


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frequency"):
        routing_picture({}, tmp_path / "routing.png")
