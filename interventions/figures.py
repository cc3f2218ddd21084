"""Figures of the analyses."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def heatmap(path: Path, panels: dict[str, np.ndarray], label: str = "mean restoration rate (RR)") -> None:
    """Layer x module maps side by side on one colour scale centred at 0; ``panels``: title -> ``(L, 2)``."""
    limit = max(float(np.nanmax(np.abs(values))) for values in panels.values()) or 1.0
    depth = max(len(values) for values in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 * len(panels) + 1.2, 1.4 + 0.32 * depth), squeeze=False, layout="constrained"
    )
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        axis.set_title(title)
        axis.set_xticks([0, 1], ["attn", "mlp"])
        axis.set_yticks(range(0, len(values), max(1, len(values) // 12)))
        axis.set_ylabel("layer")
        if values.size <= 80:
            for (row, column), value in np.ndenumerate(values):
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes[0].tolist(), label=label)
    figure.savefig(path, dpi=150)
    plt.close(figure)
