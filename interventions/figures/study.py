"""Figures of a study of placements (P0): accuracy by placement and by k, and LoRA's gain in single modules."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from interventions.figures.base import drawer, estimate, one_n, subplots, with_n
from vlm_jax.runs.charts import Chart


def _placements_chart(accuracy: Mapping[str, Mapping[str, Mapping]]) -> Chart:
    rows = [
        {"panel": family, "row": name, "series": family, **estimate(one)}
        for family, by_placement in accuracy.items()
        for name, one in by_placement.items()
    ]
    value = "accuracy (95 % interval over samples and runs)"
    return Chart(rows, {"row": "placement", "value": value, "series": "task family"})


@drawer("intervals", _placements_chart, accuracy="task family -> placement -> mean, low, high, samples, folders")
def placements(accuracy: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """Accuracy with its interval: a panel for each family, a row for each placement, best at the top."""
    rows = max(map(len, accuracy.values()))
    size = (1.5 + 3.0 * len(accuracy), 1.2 + 0.26 * rows)
    figure, axes = subplots(1, len(accuracy), size=size, sharey=True)
    order = sorted(accuracy[list(accuracy)[-1]], key=lambda name: accuracy[list(accuracy)[-1]][name]["mean"])
    for axis, (family, by_placement) in zip(axes[0], accuracy.items(), strict=True):
        for y, name in enumerate(order):
            one = by_placement[name]
            colour = "C3" if name.startswith("random") else "0.4" if name in ("baseline", "all modules") else "C0"
            axis.plot([one["low"], one["high"]], [y, y], color=colour, lw=2, solid_capstyle="round")
            axis.plot(one["mean"], y, "o", color=colour, ms=5)
        random = [name for name in order if name.startswith("random, ")]
        if random:
            axis.axvline(by_placement[random[0]]["mean"], color="C3", lw=0.8, ls=":")
        axis.set_yticks(range(len(order)), order)
        axis.set_title(with_n(family, one_n(by_placement.values())))
        axis.set_xlabel("accuracy (95 % interval over samples and runs)", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    return figure


def _k_chart(accuracy: Mapping[str, Mapping[str, Mapping[str, Mapping]]]) -> Chart:
    rows = [
        {"panel": family, "series": name, "x": int(k), "y": one["mean"]}
        | {key: one[name] for key, name in (("low", "low"), ("high", "high"), ("n", "samples")) if name in one}
        for family, curves in accuracy.items()
        for name, by_k in curves.items()
        for k, one in sorted(by_k.items(), key=lambda item: int(item[0]))
    ]
    return Chart(rows, {"x": "modules with LoRA (k)", "y": "accuracy", "series": "placement"})


@drawer("curves", _k_chart, accuracy="task family -> placement -> k -> mean, low, high, samples")
def k_sweep(accuracy: Mapping[str, Mapping[str, Mapping[str, Mapping]]]) -> Figure:
    """Accuracy against k, a panel for each family."""
    figure, axes = subplots(1, len(accuracy), size=(3.4 * len(accuracy), 2.8))
    for axis, (family, curves) in zip(axes[0], accuracy.items(), strict=True):
        for number, (name, by_k) in enumerate(curves.items()):
            points = {int(k): by_k[k] for k in sorted(by_k, key=int)}
            ks = list(points)
            axis.plot(ks, [point["mean"] for point in points.values()], "o-", color=f"C{number}", label=name)
            low, high = ([point[end] for point in points.values()] for end in ("low", "high"))
            axis.fill_between(ks, low, high, color=f"C{number}", alpha=0.15)
        axis.set_title(with_n(family, one_n(point for by_k in curves.values() for point in by_k.values())))
        axis.set_xlabel("modules with LoRA (k)")
        axis.set_ylabel("accuracy")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    return figure


def _alone_chart(
    rr: Mapping[str, Sequence],
    gains: Mapping[str, Sequence],
    names: Sequence[str],
    samples: Mapping[str, int] | None = None,
) -> Chart:
    rows = [
        {"panel": family, "series": name.rpartition("-")[2], "x": x, "y": y, "module": name}
        | ({"n": samples[family]} if samples else {})
        for family in rr
        for x, y, name in zip(rr[family], gains[family], names, strict=True)
    ]
    titles = {"x": "restoration rate (RR)", "y": "accuracy gained by LoRA there alone", "series": "module"}
    return Chart(rows, titles)


@drawer(
    "scatter",
    _alone_chart,
    rr="task family -> RR of every module",
    gains="task family -> accuracy gained by LoRA in every module alone",
    names="names of the modules",
    samples="task family -> the number of samples that are scored, or null",
)
def alone(
    rr: Mapping[str, Sequence],
    gains: Mapping[str, Sequence],
    names: Sequence[str],
    samples: Mapping[str, int] | None = None,
) -> Figure:
    """LoRA's gain in a module alone against the module's RR, a panel for each family."""
    figure, axes = subplots(1, len(rr), size=(4.2 * len(rr), 3.4))
    for axis, family in zip(axes[0], rr, strict=True):
        for kind, colour in (("attn", "C1"), ("mlp", "C2")):
            of_kind = [i for i, name in enumerate(names) if name.endswith(kind)]
            axis.plot(np.array(rr[family])[of_kind], np.array(gains[family])[of_kind], "o", color=colour, label=kind)
        for x, y, name in zip(rr[family], gains[family], names, strict=True):
            axis.annotate(name.split("-")[0], (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
        axis.axhline(0, color="0.7", lw=0.8)
        axis.margins(0.1)  # room for the names of the outermost points
        axis.set_title(with_n(family, (samples or {}).get(family)))
        axis.set_xlabel("restoration rate (RR)")
        axis.set_ylabel("accuracy gained by LoRA there alone")
    axes[0][0].legend()
    return figure
