"""Figures of model diffing with dictionaries (P2)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from interventions.figures.base import drawer, one_n, subplots, with_n
from vlm_jax.runs.charts import Chart


def _explained_chart(fvu: Mapping[str, Mapping[str, Sequence]], layers: Mapping[str, Sequence[int]]) -> Chart:
    rows = [
        {"panel": site, "series": group if len(by_seed) == 1 else f"{group}, seed {number}", "x": layer, "y": value}
        for site, groups in fvu.items()
        for group, by_seed in groups.items()
        for number, values in enumerate(by_seed)
        for layer, value in zip(layers[site], values, strict=True)
    ]
    return Chart(rows, {"x": "layer", "y": "variance unexplained", "series": "tokens"})


@drawer("curves", _explained_chart, fvu="site -> token group -> seeds -> value by layer", layers="site -> layers")
def explained(fvu: Mapping[str, Mapping[str, Sequence]], layers: Mapping[str, Sequence[int]]) -> Figure:
    """The fraction of variance unexplained by layer: a panel for each site, a line for each token group, thin ones for
    the seeds."""
    figure, axes = subplots(1, len(fvu), size=(1.2 + 3.2 * len(fvu), 2.8), sharey=True)
    for axis, (site, groups) in zip(axes[0], fvu.items(), strict=True):
        for number, (group, by_seed) in enumerate(groups.items()):
            values = np.array(by_seed, float)
            axis.plot(layers[site], values.mean(0), "o-", color=f"C{number}", ms=3, label=group)
            if len(values) > 1:
                axis.plot(layers[site], values.T, color=f"C{number}", lw=0.6, alpha=0.6)
        axis.set_title(site, fontsize=9)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("variance unexplained")
    axes[0][0].legend(fontsize=8)
    return figure


def _rotated_chart(
    cosine: Mapping[str, Sequence[float]], energy: Mapping[str, Sequence[float]], adapted: Mapping[str, Sequence[int]]
) -> Chart:
    rows = [
        {"panel": name, "series": "adapted" if latent in chosen else "other", "x": x, "y": y, "latent": latent}
        for name in cosine
        for chosen in [set(adapted[name])]
        for latent, (x, y) in enumerate(zip(cosine[name], energy[name], strict=True))
    ]
    return Chart(rows, {"x": "cosine before, after", "y": "visual energy", "series": "latent"})


@drawer(
    "scatter",
    _rotated_chart,
    cosine="dictionary -> latent -> cosine of its direction before and after",
    energy="dictionary -> latent -> visual energy",
    adapted="dictionary -> the adapted latents",
)
def rotated(
    cosine: Mapping[str, Sequence[float]], energy: Mapping[str, Sequence[float]], adapted: Mapping[str, Sequence[int]]
) -> Figure:
    """Every latent's visual energy against the cosine of its direction: a panel for each dictionary."""
    figure, axes = _panels(len(cosine), 4, 2.4, 2.2)
    for axis, name in zip(axes.ravel(), cosine, strict=False):
        x, y = np.array(cosine[name], float), np.maximum(np.array(energy[name], float), 1e-6)
        chosen = np.isin(np.arange(len(x)), adapted[name])
        axis.plot(x[~chosen], y[~chosen], ".", color="0.6", ms=2)
        axis.plot(x[chosen], y[chosen], ".", color="C3", ms=3, label=f"{chosen.sum()} adapted")
        axis.set_yscale("log")
        axis.set_title(name, fontsize=8)
        axis.legend(fontsize=7, loc="lower left")
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("cosine before, after", fontsize=8)
    axes[0][0].set_ylabel("visual energy", fontsize=8)
    return figure


def _ablated_chart(rows: Sequence[Mapping]) -> Chart:
    found = []
    for row in rows:
        name = f"L{row['layer']} {row['latent']} ({row['selection']})"
        ends = {"value": row["difference"], "low": row["low"], "high": row["high"], "samples": row["samples"]}
        found.append({"panel": row["relation"], "row": name, "series": row["questions"], **ends})
    return Chart(found, {"row": "feature", "value": "change of accuracy (95 % interval)", "series": "questions"})


@drawer("intervals", _ablated_chart, rows="a row for each feature and set of questions, as in ablations.parquet")
def ablated(rows: Sequence[Mapping]) -> Figure:
    """The change of accuracy without each feature's direction, with its interval: a row for each feature."""
    names = list(dict.fromkeys((row["relation"], row["layer"], row["latent"], row["selection"]) for row in rows))
    colours = {"target": "C3", "others": "C0", "neutral": "0.5"}
    figure, axes = subplots(1, 1, size=(6.0, 1.2 + 0.3 * len(names)))
    axis, labelled = axes[0][0], set()
    for row in rows:
        name = (row["relation"], row["layer"], row["latent"], row["selection"])
        questions = row["questions"]
        y = len(names) - 1 - names.index(name) + {"target": 0.22, "others": 0.0, "neutral": -0.22}[questions]
        axis.plot([row["low"], row["high"]], [y, y], color=colours[questions], lw=2, solid_capstyle="round")
        label = None if questions in labelled else questions
        axis.plot(row["difference"], y, "o", color=colours[questions], ms=4, label=label)
        labelled.add(questions)
    shown = []
    for name in reversed(names):
        of = [row for row in rows if (row["relation"], row["layer"], row["latent"], row["selection"]) == name]
        shown.append(f"{name[0]}: L{name[1]} {name[2]} (n = {', '.join(str(row['samples']) for row in of)})")
    axis.set_yticks(range(len(names)), shown, fontsize=8)
    axis.axvline(0, color="0.7", lw=0.8)
    axis.set_xlabel("change of accuracy (95 % interval over samples)", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, title="questions", title_fontsize=8)
    return figure


def _recalled_chart(records: Sequence[Mapping]) -> Chart:
    rows = []
    for record in records:
        found = [("supervised", record["ceiling"]), ("best latent", record["best"]), ("feature", record["features"])]
        found += [("random dictionaries", value) for value in record["random"]]
        rows += [
            {"panel": record["relation"], "series": name, "x": record["layer"], "y": value, "n": record["samples"]}
            for name, value in found
            if value is not None
        ]
    return Chart(rows, {"x": "layer", "y": "AUROC", "series": "what tells whether the relation holds"})


@drawer("scatter", _recalled_chart, records="a record for each relation and layer, as in auroc.json")
def recalled(records: Sequence[Mapping]) -> Figure:
    """AUROC by layer, a panel for each relation: supervised, best feature, best latent, random dictionaries."""
    relations = list(dict.fromkeys(record["relation"] for record in records))
    figure, axes = _panels(len(relations), 3, 2.6, 2.1)
    for axis, relation in zip(axes.ravel(), relations, strict=False):
        of = [record for record in records if record["relation"] == relation]
        layers = [record["layer"] for record in of]
        axis.plot(layers, [record["ceiling"] for record in of], "-", color="0.3", label="supervised")
        axis.plot(layers, [record["best"] for record in of], "o-", color="C0", ms=4, label="best latent")
        known = [(r["layer"], r["features"]) for r in of if r["features"] is not None]
        if known:
            axis.plot(*zip(*known, strict=True), "*", color="C3", ms=9, label="best feature")
        for number, record in enumerate(of):
            label = "random dictionaries" if number == 0 else None
            axis.plot(
                [record["layer"]] * len(record["random"]), record["random"], "_", color="C1", alpha=0.6, label=label
            )
        axis.axhline(0.5, color="0.8", lw=0.8)
        axis.set_title(with_n(relation, one_n(of)), fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("layer", fontsize=8)
    axes[0][0].set_ylabel("AUROC", fontsize=8)
    axes[0][0].legend(fontsize=7)
    return figure


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure with ``count`` panels of a size in inches, which share their axes, in rows of at most ``columns``."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (0.8 + width * columns, 0.7 + height * rows)
    figure, axes = subplots(rows, columns, size=size, sharex=True, sharey=True)
    for axis in axes.ravel()[count:]:
        axis.set_axis_off()
    return figure, axes
