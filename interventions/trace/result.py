"""A traced task, and what it says: restoration rates, their intervals and their ranking."""

from typing import NamedTuple

import numpy as np

from interventions import statistics
from interventions.modules import PAPER_SHARE, module_names
from interventions.trace.options import TraceOptions
from vlm_jax.errors import UserError


class TaskTrace(NamedTuple):
    """A traced task as NumPy arrays: of N samples, R replicates and C cells ``p_clean (N,)``, ``p_corrupt (N, R)`` and
    ``ie (N, R, C)`` in the metric's units, and ``correct (N,)``: whether greedy decoding writes the gold answer."""

    ids: list[str]
    tasks: list[str]
    cells: list[str]
    p_clean: np.ndarray
    p_corrupt: np.ndarray
    ie: np.ndarray
    correct: np.ndarray
    sigma: float

    @property
    def te(self) -> np.ndarray:
        """TE of every sample and replicate ``(N, R)``."""
        return self.p_clean[:, None] - self.p_corrupt


def summarise(traced: TaskTrace, options: TraceOptions) -> dict:
    """What ``summary.json`` says of a traced task: RR of every cell by the chosen statistic with its 95 % bootstrap
    interval over samples, the ranking, all statistics side by side, how stable the ranking is, and counts."""
    te, how = traced.te, {"min_te": options.min_te, "eps": options.eps}
    rows = statistics.summary(te, traced.ie, traced.cells, seed=options.seed, **how)
    chosen = [row for row in rows if row["statistic"] == options.statistic]
    if not chosen:  # says why
        statistics.rr(te, traced.ie, statistic=options.statistic, **how)
    ranked = sorted(chosen, key=lambda row: row["rank"])
    try:
        top = sorted({max(1, round(PAPER_SHARE * len(traced.cells))), 10})
        how |= {"seed": options.seed, "statistic": options.statistic}
        stability = statistics.rank_stability(te, traced.ie, top=top, **how)
    except UserError:  # too few samples to be halved
        stability = []
    return {
        "samples": len(te),
        "replicates": te.shape[1],
        "te_not_positive": int((te.mean(1) <= 0).sum()),
        "excluded_by_min_te": int((te.mean(1) < options.min_te).sum()),
        "correct": float(traced.correct.mean()),
        "p_clean": float(traced.p_clean.mean()),
        "p_corrupt": float(traced.p_corrupt.mean()),
        "sigma_E": traced.sigma,
        "statistic": options.statistic,
        "ranking": [row["cell"] for row in ranked],
        "rr": {row["cell"]: row["rr"] for row in chosen},
        "tasks": {task: rates for task in dict.fromkeys(traced.tasks) if (rates := _of_task(traced, task, options))},
        "stability": stability,
        "cells": rows,
    }


def _of_task(traced: TaskTrace, task: str, options: TraceOptions) -> dict[str, float]:
    """RR of every cell in one of the tasks of a family, none where no sample of it counts."""
    here = np.array(traced.tasks) == task
    how = {"min_te": options.min_te, "eps": options.eps, "statistic": options.statistic}
    try:
        found = statistics.rr(traced.te[here], traced.ie[here], **how)
    except UserError:
        return {}
    return dict(zip(traced.cells, found.tolist(), strict=True))


def bounds(summary: dict) -> statistics.Interval:
    """RR of every cell by the chosen statistic, with its interval over samples."""
    rows = [row for row in summary["cells"] if row["statistic"] == summary["statistic"]]
    return statistics.Interval(*(np.array([row[name] for row in rows]) for name in ("rr", "low", "high")))


def by_module(summary: dict) -> np.ndarray:
    """RR ``(L, 2)`` of a summary, last axis attention, MLP."""
    rates = summary["rr"]
    depth = len(rates) // 2
    return np.array([rates[name] for name in module_names(depth)]).reshape(depth, 2)
