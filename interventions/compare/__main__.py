"""What changed from one state of a model to another: two runs of one command, sample by sample.

python -m interventions.trace --task mini-okvqa --out runs/base
python -m interventions.trace --task mini-okvqa --adapter ADAPTER --out runs/adapted
python -m interventions.compare runs/base runs/adapted --out runs/change
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from interventions.compare.artifacts import CHANGES, RESULTS
from interventions.compare.runs import Compared, compare
from interventions.modules import module_names
from interventions.statistics import write_rows
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import PageOptions
from vlm_jax.runs.ranges import Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(PageOptions):
    """Compare two runs of interventions.trace, interventions.flow or eval.accuracy on the same samples: the paired
    change of every restoration rate, attention share and accuracy, with its interval."""

    first: tyro.conf.Positional[Path]
    """Run folder of the first state, such as the base model."""
    second: tyro.conf.Positional[Path]
    """Run folder of the second state, such as the same model with --adapter."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the bootstrap intervals."""
    out: Path = Path("runs/compare")
    """Run folder: results.json, changes.parquet and figures."""


#: Part of an estimate in a figure -> the field of a change.
_ENDS = {"value": "change", "low": "low", "high": "high"}


def draw(run: Run, compared: Compared) -> None:
    """Writes the figures: RR of both states, and what changed by layer."""
    from interventions.figures.base import save_figure
    from interventions.figures.compare import changes
    from interventions.figures.tracing import heatmap, interval_plot

    rates = [row for row in compared.changes if row["measure"] == "RR"]
    cells = [row["of"] for row in rates]
    if cells:
        estimates = {end: [row[name] for row in rates] for end, name in _ENDS.items()}
        title = f"RR of {compared.names[1]} minus RR of {compared.names[0]}"
        save_figure(
            run,
            "intervals",
            interval_plot,
            title,
            cells=cells,
            groups={"change": estimates | {"samples": compared.samples}},
            different=[row["p_holm"] is not None and row["p_holm"] < 0.05 for row in rates],
            label="change of RR, 95 % interval",
        )
        depth = 1 + max(row["layer"] for row in rates)
        if set(cells) == set(module_names(depth)):
            by_name = {row["of"]: row for row in rates}
            panels = {
                side: np.array([by_name[name][side] for name in module_names(depth)]).reshape(depth, 2)
                for side in ("first", "second", "change")
            }
            title = f"RR of {compared.names[0]}, of {compared.names[1]}, and the change"
            save_figure(run, "heatmap", heatmap, title, panels=panels, samples=dict.fromkeys(panels, compared.samples))
    layered = [row for row in compared.changes if row["layer"] is not None and row["measure"] != "RR"]
    if layered:
        title = f"What changed by layer from {compared.names[0]} to {compared.names[1]}"
        save_figure(run, "layers", changes, title, rows=layered)


@command
def main(args: Args) -> None:
    run = Run.open(args.out, args)
    compared = compare(args.first, args.second, seed=args.seed)
    for name, state in (("first", compared.first), ("second", compared.second)):
        run.pin(name, {key: state.manifest.get(key) for key in ("model", "adapter", "interventions")})
    run.write(
        "changes.parquet",
        lambda path: write_rows(path, compared.changes),
        Artifact("table", "Every change with its interval", CHANGES),
    )
    draw(run, compared)
    states = {
        name: {"folder": str(state.folder), "state": state.name}
        for name, state in (("first", compared.first), ("second", compared.second))
    }
    content = {
        "command": compared.command,
        **states,
        "samples": compared.samples,
        "left_out": compared.left_out,
        "changes": compared.changes,
    }
    run.save_json("results.json", content, Artifact("metrics", "What changed", RESULTS))
    print(compared)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
