"""Figures of trained editors (P4)."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from interventions.figures.base import drawer, subplots


@drawer("intervals", accuracy="task -> before or after -> mean, low, high")
def before_and_after(accuracy: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """Scores with their intervals: a row for each task, without and with the editors."""
    figure, axes = subplots(1, 1, size=(5.0, 1.2 + 0.4 * len(accuracy)))
    axis = axes[0][0]
    for row, by_time in enumerate(reversed(accuracy.values())):
        for shift, (when, colour) in zip((0.12, -0.12), (("before", "0.5"), ("after", "C0")), strict=True):
            one = by_time[when]
            axis.plot([one["low"], one["high"]], [row + shift] * 2, color=colour, lw=2, solid_capstyle="round")
            axis.plot(one["mean"], row + shift, "o", color=colour, ms=5, label=when if row == 0 else None)
    axis.set_yticks(range(len(accuracy)), list(reversed(accuracy)))
    axis.set_xlabel("score (95 % interval over samples)", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    return figure
