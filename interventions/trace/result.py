"""The result of tracing a task: restoration rates, their intervals and their ranking."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from interventions import statistics
from interventions.modules import PAPER_SHARE, module_names
from interventions.trace.options import TraceOptions
from vlm_jax.errors import UserError


class TaskTrace(NamedTuple):
    """The trace of a task: NumPy arrays by sample, replicate of the corruption and cell."""

    ids: list[str]
    """The samples' ids."""
    tasks: list[str]
    """The samples' tasks."""
    cells: list[str]
    """The names of the cells."""
    p_clean: Float[np.ndarray, "samples"]
    """The metric of the clean run, by default p(gold)."""
    p_corrupt: Float[np.ndarray, "samples replicates"]
    """The metric of the corrupted run."""
    ie: Float[np.ndarray, "samples replicates cells"]
    """The indirect effect of restoring each cell, in the metric's units (P0, equation 3)."""
    correct: Bool[np.ndarray, "samples"]
    """Whether greedy decoding writes the gold answer."""
    sigma: float
    """sigma_E, the standard deviation of the embeddings, which scales the noise."""

    @property
    def te(self) -> Float[np.ndarray, "samples replicates"]:
        """The total effect of the corruption (P0, equation 2)."""
        return self.p_clean[:, None] - self.p_corrupt


def summarise(traced: TaskTrace, options: TraceOptions) -> dict:
    """The content of a task's ``summary.json``: RR and ranking by the chosen statistic, all statistics with
    their 95 % bootstrap intervals, the stability of the ranking, and counts.

    Raises:
        UserError: as :func:`interventions.statistics.rr`.
    """
    te = traced.te
    rate_options: dict[str, Any] = {"min_te": options.min_te, "eps": options.eps}
    rows = statistics.rr_summary(te, traced.ie, traced.cells, seed=options.seed, **rate_options)
    chosen = [row for row in rows if row["statistic"] == options.statistic]
    if not chosen:  # the statistic is not defined for this task: this call raises the error with the reason
        statistics.rr(te, traced.ie, statistic=options.statistic, **rate_options)
    ranked = sorted(chosen, key=lambda row: row["rank"])
    try:
        top = sorted({max(1, round(PAPER_SHARE * len(traced.cells))), 10})
        rate_options |= {"seed": options.seed, "statistic": options.statistic}
        stability = statistics.rank_stability(te, traced.ie, top=top, **rate_options)
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
    """RR of every cell in one task of a family; empty if the task has no sample with TE >= min_te."""
    in_task = np.array(traced.tasks) == task
    rate_options: dict[str, Any] = {"min_te": options.min_te, "eps": options.eps, "statistic": options.statistic}
    try:
        rates = statistics.rr(traced.te[in_task], traced.ie[in_task], **rate_options)
    except UserError:
        return {}
    return dict(zip(traced.cells, rates.tolist(), strict=True))


def bounds(summary: dict) -> statistics.Interval:
    """RR of every cell ``(C,)`` by the chosen statistic, with its interval over samples."""
    rows = [row for row in summary["cells"] if row["statistic"] == summary["statistic"]]
    return statistics.Interval(*(np.array([row[name] for row in rows]) for name in ("rr", "low", "high")))


def by_module(summary: dict) -> Float[np.ndarray, "layers 2"]:
    """RR of a summary by layer and module; the last axis is attention, MLP."""
    rates = summary["rr"]
    depth = len(rates) // 2
    return np.array([rates[name] for name in module_names(depth)]).reshape(depth, 2)
