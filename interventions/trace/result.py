"""The result of tracing a task: the restoration rate (RR) of each cell, its interval, and the ranking of the cells."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from interventions import statistics
from interventions.modules import MODULES, PAPER_SHARE, module_names
from interventions.trace.options import TraceOptions
from vlm_jax.errors import UserError


class TaskTrace(NamedTuple):
    """What a trace measured on a task, as NumPy arrays.

    A cell is what one patch restores: a module or a head, at all tokens or at one token group. A replicate is one
    repetition of the corruption, with noise of its own.
    """

    ids: list[str]
    """The id of each sample."""
    tasks: list[str]
    """The task of each sample. A family has several tasks."""
    cells: list[str]
    """The names of the cells."""
    p_clean: Float[np.ndarray, "samples"]
    """The metric in the clean run. By default it is the probability of the gold answer; with ``--metric`` it may be the
    log-probability or a difference of logits."""
    p_corrupt: Float[np.ndarray, "samples replicates"]
    """The same metric in the corrupted run."""
    ie: Float[np.ndarray, "samples replicates cells"]
    """The indirect effect of each cell: how much the metric rises if the cell's clean value is patched into the
    corrupted run (P0, equation 3). NaN where a sample has no token of the cell's group."""
    correct: Bool[np.ndarray, "samples"]
    """Whether greedy decoding writes the gold answer."""
    sigma: float
    """sigma_E, the standard deviation of the embeddings. The noise is proportional to it."""

    @property
    def te(self) -> Float[np.ndarray, "samples replicates"]:
        """The total effect of the corruption: how much it lowers the metric (P0, equation 2)."""
        return self.p_clean[:, None] - self.p_corrupt


def summarise(traced: TaskTrace, options: TraceOptions) -> dict:
    """The content of a task's ``summary.json``.

    It holds RR and the ranking of the cells by the chosen statistic (``--statistic``), RR by every statistic with its
    95 % bootstrap interval, the stability of the ranking, and counts of samples.

    Raises:
        UserError: if RR is not defined for these samples (:func:`interventions.statistics.rr`).
    """
    te = traced.te
    rate_options: dict[str, Any] = {"min_te": options.min_te, "eps": options.eps}
    rows = statistics.rr_summary(te, traced.ie, traced.cells, seed=options.seed, **rate_options)
    chosen = [row for row in rows if row["statistic"] == options.statistic]
    if not chosen:  # the chosen statistic is not defined for these samples; this call raises an error with the reason
        statistics.rr(te, traced.ie, statistic=options.statistic, **rate_options)
    ranked = sorted((row for row in chosen if row["rank"] is not None), key=lambda row: row["rank"])
    missing = np.isnan(traced.ie[:, 0]).sum(0)
    try:
        # How many cells at the top are compared: P0's share of all cells, and 10.
        top_counts = sorted({max(1, round(PAPER_SHARE * len(traced.cells))), 10})
        rate_options |= {"seed": options.seed, "statistic": options.statistic}
        stability = statistics.rank_stability(te, traced.ie, top=top_counts, **rate_options)
    except UserError:  # too few samples for two disjoint sets, or too few with TE >= min_te
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
        "missing": {cell: int(count) for cell, count in zip(traced.cells, missing, strict=True) if count},
        "tasks": {task: rates for task in dict.fromkeys(traced.tasks) if (rates := _of_task(traced, task, options))},
        "task_samples": {task: _counted(traced, task, options) for task in dict.fromkeys(traced.tasks)},
        "stability": stability,
        "cells": rows,
    }


def _counted(traced: TaskTrace, task: str, options: TraceOptions) -> int:
    """How many samples of one task of a family count in RR."""
    in_task = np.array(traced.tasks) == task
    return statistics.counted_samples(traced.te[in_task], options.min_te, options.statistic)


def _of_task(traced: TaskTrace, task: str, options: TraceOptions) -> dict[str, float | None]:
    """Cell -> RR over the samples of one task of a family. Empty if RR is not defined for them, for example because no
    sample has TE >= min_te."""
    in_task = np.array(traced.tasks) == task
    rate_options: dict[str, Any] = {"min_te": options.min_te, "eps": options.eps, "statistic": options.statistic}
    try:
        rates = statistics.rr(traced.te[in_task], traced.ie[in_task], **rate_options)
    except UserError:
        return {}
    return {cell: rate if np.isfinite(rate) else None for cell, rate in zip(traced.cells, rates.tolist(), strict=True)}


def bounds(summary: dict) -> statistics.Interval:
    """RR of every cell by the chosen statistic, with its 95 % interval over samples. Each array is ``(C,)``; bounds
    are NaN if too few samples count."""
    rows = [row for row in summary["cells"] if row["statistic"] == summary["statistic"]]
    return statistics.Interval(*(np.array([row[name] for row in rows], float) for name in ("rr", "low", "high")))


def sample_count(summary: dict) -> int | None:
    """How many samples count in RR by the chosen statistic; None if an older version wrote the summary."""
    return next(row.get("samples") for row in summary["cells"] if row["statistic"] == summary["statistic"])


def by_position(summary: dict, groups: Sequence[str]) -> dict[str, list[list[float | None]]]:
    """Module -> RR ``(groups, L)`` of the cells of several token groups; None where there is no rate."""
    depth = len(summary["rr"]) // (len(MODULES) * len(groups))
    return {
        kind: [[summary["rr"][f"L{layer}-{kind}@{group}"] for layer in range(depth)] for group in groups]
        for kind in MODULES
    }


def by_module(summary: dict) -> Float[np.ndarray, "layers 2"]:
    """RR of every module. The last axis is attention, then MLP. The cells of the summary must be modules."""
    rates = summary["rr"]
    depth = len(rates) // 2
    return np.array([rates[name] for name in module_names(depth)], float).reshape(depth, 2)
