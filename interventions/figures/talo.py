"""Figures of task-layer interaction vectors (P3)."""

from collections.abc import Sequence

import matplotlib.colors
import numpy as np
from matplotlib.figure import Figure

from interventions.figures.base import drawer, subplots, with_n
from vlm_jax.runs.charts import Chart


def _interactions_chart(
    names: Sequence[str],
    vectors: Sequence,
    sure: Sequence,
    similarity: Sequence,
    tree: Sequence | None,
    label: str,
    samples: Sequence[int] | None = None,
) -> Chart:
    numbers = [{} for _ in names] if samples is None else [{"n": number} for number in samples]
    rows = [
        {
            "panel": "change in accuracy when a layer is cut",
            "x": layer,
            "y": name,
            "value": value,
            "sure": bool(certain),
            **number,
        }
        for name, of_task, sure_of_task, number in zip(names, vectors, sure, numbers, strict=True)
        for layer, (value, certain) in enumerate(zip(of_task, sure_of_task, strict=True))
    ]
    return Chart(rows, {"x": "layer", "y": "task", "value": "change in accuracy"})


@drawer(
    "heat_map",
    _interactions_chart,
    names="names of T tasks",
    vectors="interaction vectors (T, L): change in accuracy when a layer is cut",
    sure="(T, L), whether the change's interval excludes 0",
    similarity="(T, T)",
    tree="SciPy's linkage of the tasks (T - 1, 4); null of one task",
    label="the measure of similarity",
    samples="(T,), the number of samples of each task, or null",
)
def interactions(
    names: Sequence[str],
    vectors: Sequence,
    sure: Sequence,
    similarity: Sequence,
    tree: Sequence | None,
    label: str,
    samples: Sequence[int] | None = None,
) -> Figure:
    """TaLo's tasks: their tree, interaction vectors and similarities, a row each, in the tree's order. Sure entries are
    in bold. One task has neither tree nor similarities.
    """
    from scipy.cluster.hierarchy import dendrogram

    vectors, sure, similarity = np.array(vectors, float), np.array(sure), np.array(similarity, float)
    count, depth = vectors.shape
    names = list(map(with_n, names, samples or [None] * count))
    many = tree is not None
    widths = [0.9, 0.5 * depth + 0.6, 0.5 * count + 0.6] if many else [0.5 * depth + 0.6]
    size = sum(widths) + 0.1 * max(map(len, names)) + 1.2, 0.38 * count + (1.6 + 0.06 * max(map(len, names)) * many)
    figure, axes = subplots(1, len(widths), size=size, width_ratios=widths)
    order = list(range(count))
    if many:
        drawn = dendrogram(np.array(tree, float), orientation="left", ax=axes[0, 0], no_labels=True, color_threshold=0)
        order = drawn["leaves"]
        axes[0, 0].set_ylim(0, 10 * count)  # SciPy's leaves lie 10 apart, the first at 5
        axes[0, 0].set_xlabel("1 - similarity", fontsize=8)
        axes[0, 0].tick_params(labelsize=7)
        axes[0, 0].spines[["left", "top", "right"]].set_visible(False)
    ordered = [names[i] for i in order]
    # Near 0 linear, then logarithmic: most cuts change little, and a few take everything away.
    norm = matplotlib.colors.SymLogNorm(0.05, vmin=-1, vmax=1, base=10)
    axis = axes[0, 1 if many else 0]
    image = _cells(axis, vectors[order], norm, sure[order])
    axis.set_title("change in accuracy when a layer is cut", fontsize=9)
    axis.set_xlabel("layer")
    axis.set_yticks(np.arange(count) * 10 + 5, ordered, fontsize=8)
    bar = figure.colorbar(image, ax=axis, ticks=[-1, -0.3, -0.1, 0, 0.1, 0.3, 1], pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels(["-1", "-0.3", "-0.1", "0", "0.1", "0.3", "1"])
    if many:
        axis = axes[0, 2]
        _cells(axis, similarity[np.ix_(order, order)], matplotlib.colors.Normalize(-1, 1))
        axis.set_title(f"similarity ({label})", fontsize=9)
        axis.set_xticks(range(count), ordered, rotation=90, fontsize=8)
        axis.set_yticks([])
    return figure


def _cells(axis, values: np.ndarray, norm, bold: np.ndarray | None = None):
    """A map with the first row at the bottom, rows 10 high, and its numbers where there is room for them."""
    rows, columns = values.shape
    extent = (-0.5, columns - 0.5, 0, 10 * rows)
    image = axis.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto", origin="lower", extent=extent)
    if columns <= 24:
        axis.set_xticks(range(columns))
        for (row, column), value in np.ndenumerate(values):
            weight = "bold" if bold is not None and bold[row, column] else "normal"
            colour = "white" if abs(float(norm(value)) - 0.5) > 0.33 else "black"
            text = f"{value:+.2f}".replace("-0.00", "+0.00")
            axis.text(column, 10 * row + 5, text, ha="center", va="center", fontsize=6.5, weight=weight, color=colour)
    return image
