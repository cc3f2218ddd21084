"""One HTML file that shows what a run folder holds.

python -m eval.page runs/trace
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from vlm_jax.runs.command import command
from vlm_jax.runs.page import write_page
from vlm_jax.runs.ranges import Range


@dataclasses.dataclass(frozen=True)
class Args:
    """Make a page of a run folder: charts, tables, samples, and how it was run, in one HTML file that a browser opens
    from the disk, without a network. The run may still be going on."""

    run: tyro.conf.Positional[Path]
    """Run folder: the --out of a command."""
    out: Path | None = None
    """The file. By default page.html in the folder."""
    samples: Annotated[int, Range(least=1)] = 200
    """How many samples of each file are shown."""


@command(configured=False)
def main(args: Args) -> None:
    file = write_page(args.run, args.out, args.samples)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Args))
