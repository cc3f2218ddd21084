"""Figures of causal traces: heat maps, intervals, stability and agreement of rankings (P0)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from interventions.figures.base import COLOURS, drawer, subplots, with_n
from interventions.modules import split_cell
from vlm_jax.runs.charts import Chart


def _heatmap_chart(
    panels: Mapping[str, Sequence], label: str, samples: Mapping[str, int | str | None] | None = None
) -> Chart:
    numbers = samples or {}
    rows = [
        {"panel": title, "x": kind, "y": layer, "value": value, "cell": f"L{layer}-{kind}"}
        | ({"n": numbers[title]} if numbers.get(title) else {})
        for title, values in panels.items()
        for layer, row in enumerate(values)
        for kind, value in zip(("attn", "mlp"), row, strict=True)
    ]
    return Chart(rows, {"x": "module", "y": "layer", "value": label})


@drawer(
    "heat_map",
    _heatmap_chart,
    panels="title -> values (L, 2): a row per layer, attention and MLP",
    label="what the values are",
    samples="title -> the number of samples behind the values, or the numbers of two groups; null if not known",
)
def heatmap(
    panels: Mapping[str, Sequence],
    label: str = "restoration rate (RR)",
    samples: Mapping[str, int | str | None] | None = None,
) -> Figure:
    """Layer x module maps side by side on one colour scale centred at 0."""
    maps = {title: np.array(values, float) for title, values in panels.items()}
    limit = max(float(np.nanmax(np.abs(values))) for values in maps.values()) or 1.0
    depth = max(len(values) for values in maps.values())
    figure, axes = subplots(1, len(maps), size=(2.6 * len(maps) + 1.2, 1.4 + 0.32 * depth))
    for axis, (title, values) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        axis.set_title(with_n(title, (samples or {}).get(title), "\n"), fontsize=10)
        axis.set_xticks([0, 1], ["attn", "mlp"])
        axis.set_yticks(range(0, len(values), max(1, len(values) // 12)))
        axis.set_ylabel("layer")
        if values.size <= 80:
            for (row, column), value in np.ndenumerate(values):
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axis.text(
                    column,
                    row,
                    f"{value:.2f}".replace("-0.00", "0.00"),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=colour,
                )
    figure.colorbar(image, ax=axes[0].tolist(), label=label)
    return figure


def _positions_chart(panels: Mapping[str, Sequence], groups: Sequence[str], label: str) -> Chart:
    rows = [
        {"panel": kind, "x": layer, "y": group, "value": value, "cell": f"L{layer}-{kind}@{group}"}
        for kind, values in panels.items()
        for group, row in zip(groups, values, strict=True)
        for layer, value in enumerate(row)
    ]
    return Chart(rows, {"x": "layer", "y": "tokens", "value": label})


@drawer(
    "heat_map",
    _positions_chart,
    panels="module -> values (groups, L), null where no sample has such a token",
    groups="names of the token groups",
    label="what the values are",
)
def position_map(panels: Mapping[str, Sequence], groups: Sequence[str], label: str = "restoration rate (RR)") -> Figure:
    """Token group x layer maps, one below the other for attention and MLP, on one colour scale centred at 0 (as figure
    1 of Meng et al. 2022). Cells without a value are grey."""
    maps = {kind: np.array(values, float) for kind, values in panels.items()}
    limit = max(float(np.nanmax(np.abs(values))) for values in maps.values()) or 1.0
    depth = len(next(iter(maps.values()))[0])
    size = 2.4 + 0.24 * max(depth, 12), 0.5 + len(maps) * (0.7 + 0.28 * len(groups))
    figure, axes = subplots(len(maps), 1, size=size, sharex=True)
    for axis, (kind, values) in zip(axes[:, 0], maps.items(), strict=True):
        axis.set_facecolor("#bbbbbb")
        image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(kind, fontsize=10)
        axis.set_yticks(range(len(groups)), groups)
    axes[-1, 0].set_xticks(range(0, depth, max(1, -(-depth // 16))))
    axes[-1, 0].set_xlabel("layer")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label=label)
    return figure


def _interval_chart(
    cells: Sequence[str],
    groups: Mapping[str, Mapping[str, Any]],
    different: Sequence[bool] | None,
    label: str,
) -> Chart:
    rows = []
    for number, cell in enumerate(cells):
        shared: dict = {"panel": split_cell(cell)[1], "row": cell, "cell": cell}
        if different is not None:
            shared["groups differ"] = bool(different[number])
        for name, estimates in groups.items():
            ends = {part: estimates[part][number] for part in ("value", "low", "high")}
            if "samples" in estimates:
                ends["n"] = estimates["samples"]
            rows.append({**shared, "series": name, **ends})
    return Chart(rows, {"row": "cell", "value": label, "series": "task"})


@drawer(
    "intervals",
    _interval_chart,
    cells="names of C cells, such as L3-attn or L3-attn@question",
    groups="group -> value (C,), low (C,), high (C,), and samples: the number of samples that count",
    different="per cell, whether the groups differ significantly, or null",
    label="what the values are",
)
def interval_plot(
    cells: Sequence[str],
    groups: Mapping[str, Mapping[str, Any]],
    different: Sequence[bool] | None = None,
    label: str = "restoration rate (RR), 95 % interval",
) -> Figure:
    """Every cell's value with its interval, the groups (knowledge, perception) side by side; a panel for every kind of
    cell (attention, MLP, ...), layers along it. Cells in which the groups differ are shaded and starred."""
    kinds: dict[str, list[tuple[int, int]]] = {}  # kind -> (layer, number of the cell)
    for number, cell in enumerate(cells):
        layer, kind = split_cell(cell)
        kinds.setdefault(kind, []).append((layer, number))
    depth = 1 + max(layer for of_kind in kinds.values() for layer, _ in of_kind)
    columns = 2 if depth <= 12 and len(kinds) > 1 else 1
    rows = -(-len(kinds) // columns)
    size = columns * (1.6 + 0.26 * max(depth, 10)), 0.6 + 2.5 * rows
    figure, axes = subplots(rows, columns, size=size, sharey=True)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    for axis, (kind, of_kind) in zip(axes.flat, kinds.items(), strict=False):
        layers, numbers = map(np.array, zip(*of_kind, strict=True))
        for index, (name, estimates) in enumerate(groups.items()):
            value, low, high = (np.array(estimates[part], float)[numbers] for part in ("value", "low", "high"))
            axis.errorbar(
                layers + (index - (len(groups) - 1) / 2) * 0.6 / len(groups),
                value,
                # A skewed estimate can lie outside its interval.
                [np.maximum(value - low, 0), np.maximum(high - value, 0)],
                fmt="os^Dv*"[index % 6],
                ms=4,
                lw=1.4,
                color=COLOURS[index % len(COLOURS)],
                label=with_n(name, estimates.get("samples")),
            )
        axis.axhline(0, color="black", lw=0.8)
        for layer, number in of_kind if different is not None else ():
            if different[number]:
                axis.axvspan(layer - 0.5, layer + 0.5, color="#edc948", alpha=0.35, lw=0)
                axis.annotate("*", (layer, 0.99), xycoords=("data", "axes fraction"), ha="center", va="top")
        axis.set_title(kind, fontsize=10)
        axis.set_xlim(-0.7, depth - 0.3)
        axis.set_xticks(range(0, depth, 1 if depth <= 40 else 5))
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", lw=0.4, alpha=0.5)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low, high + 0.07 * (high - low))  # room for the stars
    figure.supylabel(label, fontsize=9)
    handles, names = axes[0, 0].get_legend_handles_labels()
    if different is not None and any(different):
        handles.append(Patch(color="#edc948", alpha=0.35))
        names.append("significant difference (*)")
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=len(names))
    return figure


def _stability_chart(groups: Mapping[str, Sequence[Mapping]]) -> Chart:
    rows = []
    for group, sizes in groups.items():
        for size in sizes:
            measures = {"Kendall's tau": size["tau"]}
            measures |= {f"overlap of the top {k}": measure for k, measure in size["overlap"].items()}
            for panel, measure in measures.items():
                ends = {"y": measure["mean"], "low": measure["low"], "high": measure["high"]}
                rows.append({"panel": panel, "series": group, "x": size["samples"], **ends})
    return Chart(rows, {"x": "samples in each half", "y": "mean, 95 % of random halves", "series": "task"})


@drawer("curves", _stability_chart, groups="group -> rows as interventions.statistics.rank_stability returns them")
def stability(groups: Mapping[str, Sequence[Mapping]]) -> Figure:
    """By group, how alike the rankings of two disjoint sets of samples are: Kendall's tau, and the share of the top k
    that both have; dotted: by chance."""
    every = sorted({row["samples"] for rows in groups.values() for row in rows})
    tops = list(next(iter(groups.values()))[0]["overlap"])
    titles = ["Kendall's tau", *(f"overlap of the top {k}" for k in tops)]
    figure, axes = subplots(1, len(titles), size=(3.4 * len(titles) + 0.4, 3.3), sharey=True)
    for axis, title, k in zip(axes[0], titles, [None, *tops], strict=True):
        for (name, rows), colour in zip(groups.items(), COLOURS, strict=False):
            sizes = [row["samples"] for row in rows]
            measures = [row["tau"] if k is None else row["overlap"][k] for row in rows]
            axis.plot(sizes, [m["mean"] for m in measures], "o-", ms=4, color=colour, label=name)
            bounds = ([m[end] for m in measures] for end in ("low", "high"))
            axis.fill_between(sizes, *bounds, color=colour, alpha=0.18, lw=0)
        axis.axhline(0 if k is None else measures[0]["chance"], color="black", ls=":", lw=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(every, every)
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("samples in each half")
        axis.grid(axis="y", lw=0.4, alpha=0.5)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(min(low, -0.05), max(high, 1.02))
    axes[0, 0].set_ylabel("mean, 95 % of random halves")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    return figure


def _correlation_chart(rows: Sequence[Mapping]) -> Chart:
    found = [
        {"panel": measure.capitalize(), "x": row[first], "y": row[second], "value": row[measure]}
        for measure in ("pearson", "spearman", "kendall")
        for row in rows
        for first, second in (("first", "second"), ("second", "first"))
    ]
    return Chart(found, {"x": "corruption", "y": "corruption", "value": "correlation"})


@drawer("heat_map", _correlation_chart, rows="rows as interventions.statistics.correlations returns them")
def correlation(rows: Sequence[Mapping]) -> Figure:
    """A map per measure (Pearson, Spearman, Kendall) of how alike the RR of kinds of corruption are."""
    measures = ("pearson", "spearman", "kendall")
    names = list(dict.fromkeys(row[end] for row in rows for end in ("first", "second")))
    count, longest = len(names), max(map(len, names))
    side = 0.62 * count + 0.5
    size = len(measures) * (side + 0.15) + 0.075 * longest, side + 0.06 * longest + 0.3
    figure, axes = subplots(1, len(measures), size=size, sharey=True)
    for axis, measure in zip(axes[0], measures, strict=True):
        matrix = np.eye(count)
        for row in rows:
            i, j = names.index(row["first"]), names.index(row["second"])
            matrix[i, j] = matrix[j, i] = np.nan if row[measure] is None else row[measure]
        axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.66 else "black"
            text = "none" if np.isnan(value) else f"{value:.2f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        cells = f" ({rows[0]['cells']} cells)" if "cells" in rows[0] else ""
        axis.set_title(measure.capitalize() + cells, fontsize=10)
        axis.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(count), names, fontsize=8)
    return figure
