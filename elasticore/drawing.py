"""What all pictures share: matplotlib where it is installed, and files in the formats of papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elasticore.places import check_writable

__all__ = ["FORMATS", "check_picture", "pyplot", "save"]

FORMATS = (".png", ".svg", ".pdf")


def pyplot() -> Any:
    """``matplotlib.pyplot``, drawing into files.

    Raises
    ------
    ImportError
        With what to do, if there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "plot needs matplotlib, which is not installed; pip install 'elasticore[plot]'."
        ) from None
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot

    return matplotlib.pyplot


def check_picture(name: str, path: Path) -> None:
    """Raise ``ValueError`` unless ``path`` ends as a picture does, ``OSError`` if none fits there.

    The folders above it are made.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{name} must end in {', '.join(FORMATS)}, got {path}.")
    check_writable(path)


def save(figure: Any, path: Path, dpi: int) -> Path:
    """Write a figure, with the folders above it, and close it; the suffix is the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)
    return path
