"""Figures of trained editors (P4) and registers (P1)."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from interventions.figures.base import drawer, estimate, one_n, subplots, with_n
from vlm_jax.runs.charts import Chart


def _times_chart(accuracy: Mapping[str, Mapping[str, Mapping]]) -> Chart:
    rows = [
        {"panel": "score", "row": task, "series": when, **estimate(one)}
        for task, by_time in accuracy.items()
        for when, one in by_time.items()
    ]
    return Chart(rows, {"row": "task", "value": "score (95 % interval over samples)", "series": "when"})


@drawer(
    "intervals",
    _times_chart,
    accuracy="task -> when (before, after ...) -> mean, low, high, samples, folders of the samples",
)
def before_and_after(accuracy: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """Scores with their intervals: a row for each task, before and after a training, or at several times."""
    figure, axes = subplots(1, 1, size=(5.0, 1.2 + 0.4 * len(accuracy)))
    axis = axes[0][0]
    for row, by_time in enumerate(reversed(accuracy.values())):
        for number, (when, one) in enumerate(by_time.items()):
            y = row + 0.24 * ((len(by_time) - 1) / 2 - number)
            colour = f"C{len(by_time) - 1 - number}" if number else "0.5"
            axis.plot([one["low"], one["high"]], [y, y], color=colour, lw=2, solid_capstyle="round")
            axis.plot(one["mean"], y, "o", color=colour, ms=5, label=when if row == 0 else None)
    names = [with_n(task, one_n(by_time.values()), "\n") for task, by_time in reversed(accuracy.items())]
    axis.set_yticks(range(len(accuracy)), names)
    axis.set_xlabel("score (95 % interval over samples)", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _conditions_chart(accuracy: Mapping[str, Mapping], full: str) -> Chart:
    rows = []
    for name, one in accuracy.items():
        section, _, condition = name.partition(": ")
        rows.append({"panel": "accuracy", "row": condition, "series": section, **estimate(one)})
    return Chart(
        rows, {"row": "condition", "value": "accuracy (95 % interval over samples and seeds)", "series": "part"}
    )


@drawer(
    "intervals",
    _conditions_chart,
    accuracy="section: condition -> mean, low, high, samples, folders of the samples",
    full="what others are compared with",
)
def conditions(accuracy: Mapping[str, Mapping], full: str) -> Figure:
    """Accuracy with its interval: a row for each condition, coloured by section, in the order of the table."""
    figure, axes = subplots(1, 1, size=(6.5, 1.2 + 0.27 * len(accuracy)))
    axis = axes[0][0]
    sections = list(dict.fromkeys(name.split(": ")[0] for name in accuracy))
    for row, (name, one) in enumerate(reversed(accuracy.items())):
        section, _, condition = name.partition(": ")
        colour = f"C{sections.index(section) % 10}"
        axis.plot([one["low"], one["high"]], [row, row], color=colour, lw=2, solid_capstyle="round")
        axis.plot(one["mean"], row, "o", color=colour, ms=5)
        if condition == full:
            axis.axvline(one["mean"], color=colour, lw=0.8, ls=":")
    axis.set_yticks(range(len(accuracy)), [name.partition(": ")[2] for name in reversed(accuracy)], fontsize=8)
    label = with_n("accuracy, 95 % interval over samples and seeds", one_n(accuracy.values()))
    axis.set_xlabel(label, fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    return figure
