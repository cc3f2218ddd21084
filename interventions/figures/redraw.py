"""Draws figures again from the data files of a run folder."""

import json
from pathlib import Path

# Drawers register themselves when their modules are imported.
from interventions.figures import flow, study, talo, tracing  # noqa: F401
from interventions.figures.base import DRAWERS
from vlm_jax.errors import UserError, nearest
from vlm_jax.runs.artifacts import ARTIFACTS


def redraw(data: Path, out: Path) -> None:
    """Draws a figure from its data file; the bytes are those of the picture in the run folder.

    Args:
        data: a data file, ``NAME.json``.
        out: where to draw; its suffix is the format: ``.png``, ``.pdf`` or another that Matplotlib knows.

    Raises:
        UserError: if the file holds no figure's data, or data of a drawer that is not known.
    """
    try:
        content = json.loads(data.read_text())
        name, values = content["drawer"], dict(content["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{data} holds no figure's data ({error}): name a file beside a figure") from None
    if name not in DRAWERS:
        raise UserError(f"unknown drawer {name!r} in {data}{nearest(name, DRAWERS)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    DRAWERS[name].write(out, values)


def figures_of(run: Path) -> dict[str, str]:
    """The figures of a run folder: picture -> data file, both relative to the folder."""
    try:
        entries = json.loads((run / ARTIFACTS).read_text())["artifacts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run} has no readable {ARTIFACTS} ({error}): name a run folder") from None
    return {entry["file"]: entry["data"] for entry in entries if entry["type"] == "figure"}
