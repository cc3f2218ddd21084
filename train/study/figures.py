"""A study's figures."""

from pathlib import Path

import numpy as np

from interventions.figures.base import save_figure, subplots


def placements(path: Path, accuracy: dict[str, dict[str, dict]]) -> None:
    """Accuracy with its interval: a panel for each family, a row for each placement, best at the top."""
    rows = max(map(len, accuracy.values()))
    size = (1.5 + 3.0 * len(accuracy), 1.2 + 0.26 * rows)
    figure, axes = subplots(1, len(accuracy), size=size, sharey=True)
    order = sorted(accuracy[list(accuracy)[-1]], key=lambda name: accuracy[list(accuracy)[-1]][name]["mean"])
    for axis, (family, found) in zip(axes[0], accuracy.items(), strict=True):
        for y, name in enumerate(order):
            one = found[name]
            colour = "C3" if name.startswith("random") else "0.4" if name in ("baseline", "all modules") else "C0"
            axis.plot([one["low"], one["high"]], [y, y], color=colour, lw=2, solid_capstyle="round")
            axis.plot(one["mean"], y, "o", color=colour, ms=5)
        random = [name for name in order if name.startswith("random, ")]
        if random:
            axis.axvline(found[random[0]]["mean"], color="C3", lw=0.8, ls=":")
        axis.set_yticks(range(len(order)), order)
        axis.set_title(family)
        axis.set_xlabel("accuracy (95 % interval over samples and runs)", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def k_sweep(path: Path, found: dict[str, dict[str, dict[int, dict]]]) -> None:
    """Accuracy against k, a panel for each family."""
    figure, axes = subplots(1, len(found), size=(3.4 * len(found), 2.8))
    for axis, (family, curves) in zip(axes[0], found.items(), strict=True):
        for number, (name, points) in enumerate(curves.items()):
            ks = sorted(points)
            axis.plot(ks, [points[k]["mean"] for k in ks], "o-", color=f"C{number}", label=name)
            low, high = ([points[k][end] for k in ks] for end in ("low", "high"))
            axis.fill_between(ks, low, high, color=f"C{number}", alpha=0.15)
        axis.set_title(family)
        axis.set_xlabel("modules with LoRA (k)")
        axis.set_ylabel("accuracy")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    save_figure(figure, path)


def alone(path: Path, rr: dict[str, np.ndarray], gains: dict[str, list[float]], names: list[str]) -> None:
    """LoRA's gain in a module alone against the module's RR, a panel for each family."""
    figure, axes = subplots(1, len(rr), size=(4.2 * len(rr), 3.4))
    for axis, family in zip(axes[0], rr, strict=True):
        for kind, colour in (("attn", "C1"), ("mlp", "C2")):
            mine = [i for i, name in enumerate(names) if name.endswith(kind)]
            axis.plot(rr[family][mine], np.array(gains[family])[mine], "o", color=colour, label=kind)
        for x, y, name in zip(rr[family], gains[family], names, strict=True):
            axis.annotate(name.split("-")[0], (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
        axis.axhline(0, color="0.7", lw=0.8)
        axis.set_title(family)
        axis.set_xlabel("mean restoration rate (RR)")
        axis.set_ylabel("accuracy gained by LoRA there alone")
    axes[0][0].legend()
    save_figure(figure, path)
