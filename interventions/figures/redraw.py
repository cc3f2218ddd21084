"""Draws figures again from the data files of a run folder."""

from pathlib import Path

# Drawers register themselves when their modules are imported.
from interventions.figures import compare, diff, editing, flow, lens, study, talo, tracing  # noqa: F401
from interventions.figures.base import DRAWERS
from vlm_jax.errors import UserError, nearest, unwritten
from vlm_jax.files import read_json
from vlm_jax.runs.artifacts import ARTIFACTS, is_listing


def redraw(data: Path, out: Path) -> None:
    """Draws a figure from its data file; the bytes are those of the picture in the run folder.

    Args:
        data: a data file, ``NAME.json``.
        out: where to draw; its suffix is the format: ``.png``, ``.pdf`` or another that Matplotlib knows.

    Raises:
        UserError: if the file holds no figure's data, or data of a drawer that is not known.
    """
    try:
        content = read_json(data)
        name, values = content["drawer"], dict(content["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{data} holds no figure's data ({error}): name a file beside a figure") from None
    if not isinstance(name, str) or name not in DRAWERS:
        raise UserError(f"unknown drawer {name!r} in {data}{nearest(str(name), DRAWERS)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        DRAWERS[name].write(out, values)
    except OSError as error:
        raise unwritten(out, error) from None
    except Exception as error:  # data of another shape can raise any error in a drawer
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{data} holds data that {name} cannot draw ({reason}): write it again") from None


def figures_of(run: Path) -> dict[str, str]:
    """The figures of a run folder: picture -> data file, both relative to the folder."""
    try:
        listing = read_json(run / ARTIFACTS)
    except UserError as error:
        raise UserError(f"{run} has no readable {ARTIFACTS} ({error}): name a run folder") from None
    if not is_listing(listing):
        raise UserError(f"{run / ARTIFACTS} is damaged: name another run folder")
    figures = [entry for entry in listing["artifacts"] if entry["type"] == "figure"]
    return {entry["file"]: entry["data"] for entry in figures if isinstance(entry.get("data"), str)}
