"""Draws the figures of a run folder again from their data.

python -m interventions.figures runs/trace
python -m interventions.figures runs/trace --figures svg pdf --out figures
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from interventions.figures.redraw import figures_of, redraw
from vlm_jax.errors import UserError
from vlm_jax.runs.command import command


@dataclasses.dataclass(frozen=True)
class Args:
    """Draw the figures of a run folder again, each from the JSON file beside it."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    file: tyro.conf.Positional[str | None] = None
    """One data file of the folder, such as heatmap.json; by default those of all figures."""
    out: Path | None = None
    """Folder to draw into; by default the run folder itself, where pictures are replaced."""
    figures: Annotated[tuple[Literal["png", "svg", "pdf"], ...], tyro.conf.arg(metavar="FORMAT [FORMAT ...]")] = ()
    """Formats to draw; by default those that the run has. They need --out, because a run folder holds only files that
    it lists."""


@command
def main(args: Args) -> None:
    if args.figures and args.out is None:
        raise UserError("--figures needs --out: name a folder for the drawings")
    figures = figures_of(args.run)
    if args.file is not None:
        figures = {picture: data for picture, data in figures.items() if data == args.file}
        if not figures:
            raise UserError(
                f"{args.run} has no figure that is drawn from {args.file}: name a file such as heatmap.json"
            )
    if args.figures:
        names = dict.fromkeys((Path(picture).with_suffix(""), data) for picture, data in figures.items())
        figures = {f"{name}.{suffix}": data for name, data in names for suffix in args.figures}
    for picture, data in figures.items():
        path = (args.out or args.run) / picture
        redraw(args.run / data, path)
        print(f"drawn {path}")


if __name__ == "__main__":
    main(tyro.cli(Args))
