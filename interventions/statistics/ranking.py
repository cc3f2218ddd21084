"""How stable a ranking of cells is, and how similar the rankings of several corruptions are."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import scipy
from numpy.typing import ArrayLike

from interventions.statistics.bootstrap import percentiles
from interventions.statistics.restoration import EPS, check_effects, estimate_draws
from vlm_jax.errors import UserError


def rank_stability(
    te: ArrayLike,
    ie: ArrayLike,
    *,
    sizes: Sequence[int] | None = None,
    top: Sequence[int] = (10,),
    halves: int = 200,
    seed: int = 0,
    **options,
) -> list[dict]:
    """Compares the rankings that two disjoint random sets of samples give.

    Args:
        sizes: numbers of samples in each of the two sets. None: half of all samples, then half of that, down to 8.
        top: numbers k of cells at the top to compare; numbers above C are ignored.
        halves: how many random pairs of sets are drawn.
        options: min_te, eps and statistic, as for :func:`rr`.

    Returns:
        For each size: ``samples``, the size; ``tau``, Kendall's tau between the two sets' RR, with its mean and 95 %
        range over pairs; ``overlap``: for each k the share of the top k that both have, with mean and range, and
        ``chance``, the share that unrelated rankings would have in common.

    Raises:
        UserError: if there are not enough samples.
    """
    te, ie = check_effects(te, ie)
    count, cells = len(te), ie.shape[2]
    options = {"min_te": 0.01, "eps": EPS, "statistic": "mean_of_ratios"} | options
    if sizes is None:
        sizes = [count >> power for power in range(1, 5) if count >> power >= 8 or power == 1][::-1]
    if not all(1 <= size <= count // 2 for size in sizes):
        raise UserError(f"two sets of {max(sizes)} cannot be drawn of {count} samples: give at least 2 samples")
    rng, results = np.random.default_rng(seed), []
    for size in sizes:
        order = rng.permuted(np.broadcast_to(np.arange(count), (halves, count)), axis=1)
        pairs = [estimate_draws(te, ie, order[:, start : start + size], **options) for start in (0, size)]
        both = np.isfinite(pairs[0]) & np.isfinite(pairs[1])  # a set may have no sample that has some cell
        known = both.sum(1) >= min(2, cells)
        if not known.any():
            raise UserError(f"of {size} samples none has TE >= {options['min_te']}: trace more samples")
        one, other = (np.where(both, pair, -np.inf)[known] for pair in pairs)
        compared = zip(one, other, both[known], strict=True)
        tau = np.array([scipy.stats.kendalltau(a[at], b[at]).statistic for a, b, at in compared])
        ranked = [np.argsort(-pair, axis=1, kind="stable") for pair in (one, other)]
        overlap = {}
        for k in (k for k in top if k <= cells):
            shares = [len(np.intersect1d(a[:k], b[:k])) / k for a, b in zip(*ranked, strict=True)]
            overlap[k] = {**percentiles(np.array(shares)), "chance": k / cells}
        results.append({"samples": size, "tau": percentiles(tau), "overlap": overlap})
    return results


def correlations(rates: Mapping[str, np.ndarray]) -> list[dict]:
    """How similar the RR ``(C,)`` of several corruptions are: a row for each pair with ``pearson``, ``spearman`` and
    ``kendall``.

    They are None where one of the two has the same RR in all cells. There is no p-value, because cells are not a random
    sample.
    """
    rows = []
    for (first, x), (second, y) in combinations(rates.items(), 2):
        constant = np.ptp(x) == 0 or np.ptp(y) == 0
        measures = {
            "pearson": scipy.stats.pearsonr,
            "spearman": scipy.stats.spearmanr,
            "kendall": scipy.stats.kendalltau,
        }
        values = {name: None if constant else float(measure(x, y).statistic) for name, measure in measures.items()}
        rows.append({"first": first, "second": second, "cells": len(x), **values})
    return rows
