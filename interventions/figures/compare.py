"""Figures of what changed from one state of a model to another."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from interventions.figures.base import COLOURS, drawer, one_n, subplots, with_n
from vlm_jax.runs.charts import Chart


def _chart(rows: Sequence[Mapping]) -> Chart:
    shown = [
        {
            "panel": row["task"],
            "series": row["measure"],
            "x": row["layer"],
            "y": row["change"],
            "low": row["low"],
            "high": row["high"],
            **({"n": row["samples"]} if "samples" in row else {}),
        }
        for row in rows
    ]
    return Chart(shown, {"x": "layer", "y": "change, 95 % interval", "series": "measure"})


@drawer("curves", _chart, rows="rows of changes.parquet that have a layer")
def changes(rows: Sequence[Mapping]) -> Figure:
    """For each task (rows) and measure (columns) the change by layer with its interval; changes that stay significant
    after Holm's adjustment are filled."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    size = 3.4 * len(measures), 2.8 * len(tasks)
    figure, axes = subplots(len(tasks), len(measures), size=size)
    for line, task in zip(axes, tasks, strict=True):
        for axis, measure in zip(line, measures, strict=True):
            found = [row for row in rows if (row["task"], row["measure"]) == (task, measure)]
            layer, change, low, high, p = (
                np.array([row[key] for row in found], float) for key in ("layer", "change", "low", "high", "p_holm")
            )
            axis.axhline(0, color="black", lw=0.8)
            axis.fill_between(layer, low, high, alpha=0.2, color=COLOURS[0], lw=0)
            axis.plot(layer, change, "o-", ms=4, color=COLOURS[0], markerfacecolor="white")
            axis.plot(layer[p < 0.05], change[p < 0.05], "o", ms=4, color=COLOURS[0])
            axis.set_title(with_n(f"{task}: {measure}", one_n(found)), fontsize=8)
            axis.set_xlabel("layer")
            axis.tick_params(labelsize=8)
    figure.supylabel("change (filled: p < .05 after Holm)", fontsize=9)
    return figure
