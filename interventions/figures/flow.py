"""Figures of how visual information flows to text (P1)."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from interventions.figures.base import drawer, subplots, with_n
from vlm_jax.runs.charts import Chart

_COLOURS = {
    "before": "#bab0ac",
    "image": "#4e79a7",
    "image_end": "#e15759",
    "register": "#f28e2b",
    "text": "#76b7b2",
}
_NAMES = {
    "before": "before the image",
    "image": "image",
    "image_end": "end of image",
    "register": "registers",
    "text": "text itself",
}
_MODES = {"post_softmax": "#4e79a7", "pre_softmax": "#59a14f", "random_mass": "#bab0ac", "value_norm": "#d4a6c8"}


def _panels(rows: int, columns: int, width: float = 4.6, height: float = 3.1, **options):
    return subplots(rows, columns, size=(width * columns, height * rows), **options)


def _band(axis, estimates: Mapping, colour: str | None = None, **options) -> None:
    """A line over the layers with its interval."""
    mean, low, high = (np.array(estimates[part], float) for part in ("mean", "low", "high"))
    (line,) = axis.plot(mean, "o-", markersize=3.5, color=colour, **options)
    axis.fill_between(range(len(mean)), low, high, alpha=0.2, color=line.get_color(), lw=0)


def _attention_chart(tasks: Mapping[str, Mapping]) -> Chart:
    rows = []
    for task, shares in tasks.items():
        for group, name in _NAMES.items():
            for layer, ends in enumerate(_by_layer(shares.get(f"to_{group}"))):
                rows.append({"panel": task, "series": name, "x": layer, "value": ends.pop("y"), **ends, **_n(shares)})
    return Chart(rows, {"x": "layer", "value": "share of the text's attention", "series": "attended tokens"})


def _n(part: Mapping) -> dict:
    return {"n": part["samples"]} if "samples" in part else {}


def _by_layer(estimates: Mapping | None) -> list[dict]:
    """For each layer the estimate ``y`` and its interval."""
    if estimates is None:
        return []
    parts = zip(*(estimates[part] for part in ("mean", "low", "high")), strict=True)
    return [{"y": mean, "low": low, "high": high} for mean, low, high in parts]


@drawer("bars", _attention_chart, dpi=110, tasks="task -> what interventions.flow.summary.summarise_reading returns")
def attention(tasks: Mapping[str, Mapping]) -> Figure:
    """Per task: where the text's attention goes by layer, and equation 2 (figure 1) beside what uniform attention
    would give."""
    figure, axes = _panels(len(tasks), 2)
    for (left, right), (task, shares) in zip(axes, tasks.items(), strict=True):
        bottom = np.zeros(len(shares["to_image"]["mean"]))
        for group in ("image", "image_end", "register", "before", "text"):
            if f"to_{group}" in shares:
                mean = np.array(shares[f"to_{group}"]["mean"], float)
                left.bar(range(len(mean)), mean, bottom=bottom, width=0.85, color=_COLOURS[group], label=_NAMES[group])
                bottom = bottom + mean
        left.set(
            title=f"{with_n(task, shares.get('samples'))}: where the text's attention goes",
            ylim=(0, 1),
            ylabel="share, mean over heads",
        )
        end = "registers" if "to_register" in shares else "end of image"
        right.set(title=f"{task}: image / (image + {end})", ylim=(0, 1.02), ylabel="share (P1, equation 2)")
        if "ratio" in shares:
            _band(right, shares["ratio"], _COLOURS["image"], label="mean, 95 % interval")
            right.axhline(shares["ratio_if_uniform"], color="black", ls=":", label="uniform attention")
            right.legend(fontsize=8, loc="lower right")
        else:
            right.text(0.5, 0.5, "the model has no end-of-image token", ha="center", transform=right.transAxes)
        for axis in (left, right):
            axis.set_xlabel("layer")
            axis.set_xticks(_ticks(len(bottom)))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=4)
    return figure


def _cumulative_chart(tasks: Mapping[str, Mapping]) -> Chart:
    rows = [
        {"panel": task, "series": f"layer {layer}", "x": x, "y": y, **_n(received)}
        for task, received in tasks.items()
        for layer, curve in enumerate(received["curves"])
        for x, y in list(zip(received["grid"], curve, strict=True))[::5]
    ]
    x = "share of image tokens, most attended first"
    return Chart(rows, {"x": x, "y": "cumulative share of the image's attention", "series": "layer"})


@drawer(
    "curves", _cumulative_chart, dpi=110, tasks="task -> what interventions.flow.summary.summarise_received returns"
)
def cumulative(tasks: Mapping[str, Mapping]) -> Figure:
    """Figures 2 and 3: what the most attended image tokens receive of the image's attention, by layer; and how many
    carry 80 and 90 % of it."""
    figure, axes = _panels(len(tasks), 2)
    for (left, right), (task, received) in zip(axes, tasks.items(), strict=True):
        grid, curves = received["grid"], np.array(received["curves"], float)
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(curves)))
        shown = set(_ticks(len(curves)))
        for layer, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
            left.plot(grid, curve, color=colour, label=f"layer {layer}" if layer in shown else None)
        left.plot([0, 1], [0, 1], color="black", ls=":", label="uniform")
        left.set(
            title=f"{with_n(task, received.get('samples'))}: the image's attention",
            xlabel="share of image tokens, most attended first",
        )
        left.set(ylabel="cumulative share", xlim=(0, 1), ylim=(0, 1.01))
        for (percent, needed), colour in zip(received["needed"].items(), ("#4e79a7", "#f28e2b"), strict=True):
            part = int(percent) / 100
            left.axhline(part, color=colour, lw=0.6, alpha=0.6)
            mean, deviation = (np.array(needed[name], float) for name in ("mean", "deviation"))
            right.errorbar(
                range(len(mean)),
                mean,
                deviation,
                fmt="o-",
                ms=3.5,
                capsize=2,
                color=colour,
                label=f"{part:.0%}, ± standard deviation over samples",
            )
            right.axhline(part, color=colour, ls=":")
        right.set(title=f"{task}: tokens that carry 80 and 90 %", ylim=(0, 1), xlabel="layer")
        right.set(ylabel="share of image tokens (dotted: uniform)")
        right.set_xticks(_ticks(len(curves)))
        right.legend(fontsize=8, loc="lower right")
    axes[0, 0].legend(fontsize=7, loc="lower right", ncols=2)
    return figure


def _answers_chart(tasks: Mapping[str, Sequence[Mapping]]) -> Chart:
    rows = []
    for task, conditions in tasks.items():
        for one in conditions:
            if one["layers"] is not None:
                continue
            ends = {part: one["accuracy"][part] for part in ("low", "high")}
            edge, mode = ("nothing cut", "nothing cut") if one["edge"] is None else (_arrow(one["edge"]), one["mode"])
            row = {"panel": task, "x": edge, "series": mode, "value": one["accuracy"]["mean"], **ends}
            rows.append({**row, "no possible answer": sum(one["failures"].values()), "samples": one["samples"]})
    return Chart(rows, {"x": "attention that is cut", "value": "accuracy", "series": "mode"})


@drawer("bars", _answers_chart, dpi=110, tasks="task -> what interventions.flow.summary.summarise_answers returns")
def answers(tasks: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Per task: accuracy with each edge cut in all layers, by mode; crosses are the share of outputs that are no
    possible answer."""
    figure, axes = _panels(1, len(tasks), 5.4, 3.6, sharey=True)
    for axis, (task, conditions) in zip(axes[0], tasks.items(), strict=True):
        whole = [c for c in conditions if c["layers"] is None and c["edge"] is not None]
        edges, modes = (list(dict.fromkeys(c[key] for c in whole)) for key in ("edge", "mode"))
        base, width = conditions[0]["accuracy"], 0.8 / len(modes)
        axis.axhspan(base["low"], base["high"], color="black", alpha=0.08, lw=0)
        axis.axhline(base["mean"], color="black", ls="--", lw=1, label="nothing cut")
        for c in whole:
            x = edges.index(c["edge"]) + (modes.index(c["mode"]) - (len(modes) - 1) / 2) * width
            (mean, low, high), first = (c["accuracy"][part] for part in ("mean", "low", "high")), c["edge"] == edges[0]
            axis.bar(x, mean, width * 0.92, color=_MODES[c["mode"]], label=c["mode"] if first else None)
            axis.errorbar(x, mean, [[max(mean - low, 0)], [max(high - mean, 0)]], color="black", lw=0.8, capsize=2)
            samples = c["samples"]
            axis.plot(
                x,
                sum(c["failures"].values()) / samples,
                "x",
                color="black",
                ms=5,
                label="not a possible answer" if c is whole[0] else None,
            )
        axis.set_xticks(range(len(edges)), [_arrow(e).replace("+", "\nand ") for e in edges], fontsize=8)
        axis.set(title=with_n(task, conditions[0].get("samples")), ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("share of samples")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(modes) + 2)
    return figure


def _windows_chart(tasks: Mapping[str, Mapping]) -> Chart:
    rows = [
        {"panel": task, "series": _arrow(name), "x": layer, **ends, **_n(effect)}
        for task, effect in tasks.items()
        for name, change in effect["change"].items()
        for layer, ends in enumerate(_by_layer(change))
    ]
    x = "layer at the window's middle"
    return Chart(rows, {"x": x, "y": "change of p(gold) when cut", "series": "attention that is cut"})


@drawer("curves", _windows_chart, dpi=110, tasks="task -> what interventions.flow.summary.summarise_effect returns")
def windows(tasks: Mapping[str, Mapping]) -> Figure:
    """Per task: how p(gold) changes when an edge is cut around a layer."""
    figure, axes = _panels(1, len(tasks), 5.0, 3.6, sharey=True)
    for axis, (task, effect) in zip(axes[0], tasks.items(), strict=True):
        axis.axhline(0, color="black", lw=0.8)
        for number, (name, change) in enumerate(effect["change"].items()):
            # Each curve is thinner than the one before, so that curves on top of each other are seen.
            _band(axis, change, label=_arrow(name), lw=max(1.0, 4 - number))
        axis.set(
            title=f"{with_n(task, effect.get('samples'))}: p(gold) is {effect['p_base']['mean']:.2f} with nothing cut",
            xlabel="layer at the window's middle",
        )
        axis.set_xticks(_ticks(len(change["mean"])))
    axes[0, 0].set_ylabel("change of p(gold) when cut")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(effect["change"])
    )
    return figure


def _arrow(edge: str) -> str:
    return edge.replace("image_end", "end of image").replace(":", " → ")


def _ticks(depth: int) -> range:
    return range(0, depth, max(1, depth // 12))
