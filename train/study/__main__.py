"""A paper's study: its whole experiment, with the controls and the statistics that the paper lacks.

python -m train.study --recipe p0 --out runs/study
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import tyro

from train.study.control.main import run_control
from train.study.control.options import Args as ControlArgs
from train.study.diffing.main import run_diffing
from train.study.diffing.options import Args as DiffingArgs
from train.study.editing.main import run_study
from train.study.editing.options import Args as EditingArgs
from train.study.placement.main import run_placements
from train.study.placement.options import Args as PlacementArgs
from train.study.registering.main import run_registering
from train.study.registering.options import Args as RegisteringArgs
from vlm_jax.runs.command import command


class Study(NamedTuple):
    """The options of a recipe, and the function that runs it."""

    options: type
    run: Callable[[Any], None]


STUDIES = {
    "p0": Study(PlacementArgs, run_placements),
    "p1": Study(RegisteringArgs, run_registering),
    "p2": Study(DiffingArgs, run_diffing),
    "p4": Study(EditingArgs, run_study),
    "p4-full": Study(EditingArgs, run_study),
    "p4-control": Study(ControlArgs, run_control),
}


def options() -> type:
    """The options of the recipe that the command line names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="p0", choices=tuple(STUDIES))
    return STUDIES[first.parse_known_args()[0].recipe].options


@command
def main(args: Any) -> None:
    STUDIES[args.recipe].run(args)


if __name__ == "__main__":
    main(tyro.cli(options()))
