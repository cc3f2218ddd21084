"""What every figure shares: a canvas that needs no window and no global state, colours, saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2")


def subplots(rows: int, columns: int, *, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure of ``size`` inches and its axes ``(rows, columns)``. Unlike pyplot's it belongs to nobody else, so a
    notebook's own figures and backend stay as they are."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Writes a figure in the format of the path's suffix, without the date, so that equal data give equal bytes."""
    figure.savefig(path, dpi=dpi, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)


def both(write: Callable[[str, Callable[[Path], None]], object], stem: str, draw: Callable[[Path], None]) -> None:
    """Draws a figure as PNG and as PDF; ``write`` is that of a run folder (:meth:`vlm_jax.runs.folder.Run.write`)."""
    for suffix in (".png", ".pdf"):
        write(stem + suffix, draw)
