"""One HTML file that shows what a run folder holds, or two of them side by side.

python -m eval.page runs/trace
python -m eval.page runs/before runs/after
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from interventions.statistics import paired
from vlm_jax.runs.command import command
from vlm_jax.runs.page import write_page
from vlm_jax.runs.ranges import Range


@dataclasses.dataclass(frozen=True)
class Args:
    """Make a page of a run folder: charts, tables, samples, and how it was run, in one HTML file that a browser opens
    from the disk, without a network. The run may still be going on.

    Two run folders stand side by side, after what differs: options, the scores of the samples that both have (with
    paired intervals), and heat maps.
    """

    run: tyro.conf.Positional[Path]
    """Run folder: the --out of a command."""
    other: tyro.conf.Positional[Path | None] = None
    """A second run folder, to be compared with the first."""
    out: Path | None = None
    """The file. By default page.html in the folder, and compared.html for two."""
    samples: Annotated[int, Range(least=1)] = 200
    """How many samples of each file are shown."""


@command(configured=False)
def main(args: Args) -> None:
    file = write_page(args.run, args.out, args.samples, other=args.other, paired=paired)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Args))
