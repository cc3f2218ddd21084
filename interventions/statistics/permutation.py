"""Does a cell's restoration rate differ between two groups of samples, such as knowledge and perception?"""

from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

from interventions.statistics.bootstrap import chunk_sizes, percentile_bounds
from interventions.statistics.intervals import counted_samples, rr_resamples
from interventions.statistics.proportions import LEAST
from interventions.statistics.restoration import (
    EPS,
    Statistic,
    check_effects,
    estimate_draws,
    estimate_with_variance,
    normalised,
    rr,
)
from vlm_jax.errors import UserError


class Difference(NamedTuple):
    """The difference of two groups' RR for each cell."""

    value: Float[np.ndarray, "cells"]
    """The first group's RR minus the second's."""
    low: Float[np.ndarray, "cells"]
    high: Float[np.ndarray, "cells"]
    """Bounds of the 95 % bootstrap interval over samples; NaN if fewer than six samples of a group count."""
    p: Float[np.ndarray, "cells"]
    """p-value of the permutation test, two-sided."""
    q: Float[np.ndarray, "cells"]
    """p adjusted for C tests (Benjamini and Hochberg). At most 5 % of the cells with q < .05 are expected to be
    false."""


def permutation_test(
    first,
    second,
    *,
    normalise: bool = False,
    permutations: int = 10_000,
    resamples: int = 2000,
    seed: int = 0,
    min_te: float = 0.01,
    eps: float = EPS,
    statistic: Statistic = "mean_of_ratios",
) -> Difference:
    """Tests for each cell, two-sided, whether RR differs between two groups of samples.

    The group labels of the samples are shuffled. Differences are compared in units of their standard error (Chung and
    Romano 2013); without it, groups of unequal sizes and spreads differ too often. Medians have no simple standard
    error, so their differences are compared without one.

    Args:
        first, second: the groups, each as ``(te (N, R), ie (N, R, C))``; N and R may differ between them.
        normalise: compare RR divided by the largest RR of its group (equation 7), as P0's task-diff does. The groups
            are scaled to the same largest RR before the labels are shuffled, and again after every shuffle.
        min_te, eps, statistic: as for :func:`rr`.

    Raises:
        UserError: as :func:`rr`; also if ``normalise`` is set and no RR of a group is positive.
    """
    options: dict[str, Any] = {"min_te": min_te, "eps": eps, "statistic": statistic}
    groups = [_scaled_means(te, ie, normalise, options) for te, ie in (first, second)]
    te, ie = map(np.concatenate, zip(*groups, strict=True))
    size, samples = len(groups[0][0]), np.arange(len(te))

    def difference(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The difference ``(b, C)`` and the test statistic ``(b, C)`` for orders ``(b, N)`` of the samples. The first
        ``size`` samples of an order form the first group."""
        halves = order[:, :size], order[:, size:]
        if statistic == "median":
            one, other = (estimate_draws(te, ie, half, **options) for half in halves)
            value = normalised(one, -1) - normalised(other, -1) if normalise else one - other
            return value, value
        (one, variance), (other, other_variance) = (
            estimate_with_variance(te, ie, half, normalise, **options) for half in halves
        )
        scale = np.sqrt(np.maximum(variance + other_variance, 0))
        # Where nothing varies, as at the largest normalised cell of both groups, the quotient would be rounding error.
        return one - other, np.divide(one - other, scale, out=0 * (one - other), where=scale > 1e-9)

    value, observed = (part[0] for part in difference(samples[None]))
    rng, beyond, counted = np.random.default_rng(seed), np.zeros(len(value)), np.zeros(len(value))
    for number in chunk_sizes(permutations, len(te)):
        null = difference(rng.permuted(np.broadcast_to(samples, (number, len(te))), axis=1))[1]
        beyond += (np.abs(null) >= np.abs(observed) - 1e-9).sum(0)
        counted += np.isfinite(null).sum(0)  # shuffles that leave a group without a sample do not count
    p = (1 + beyond) / (1 + counted)
    one, other = (
        rr_resamples(*group, resamples=resamples, seed=[seed, n], **options) for n, group in enumerate(groups)
    )
    draws = normalised(one, -1) - normalised(other, -1) if normalise else one - other
    low, high = percentile_bounds(draws)
    if min(counted_samples(of, **options) for of, _ in groups) < LEAST:
        low = high = np.full_like(value, np.nan)
    return Difference(value, low, high, p, scipy.stats.false_discovery_control(p))


def _scaled_means(
    te, ie, normalise: bool, options: dict[str, Any]
) -> tuple[Float[np.ndarray, "samples 1"], Float[np.ndarray, "samples 1 cells"]]:
    """A group's TE and IE, means over replicates; with ``normalise``, IE is divided by the
    group's largest RR."""
    te, ie = check_effects(te, ie)
    if np.isnan(ie).any():
        raise UserError(
            "some samples lack a cell, and the permutation test needs all cells of all samples: leave it out"
        )
    largest = rr(te, ie, **options).max()
    if normalise and largest <= 0:
        raise UserError("no RR of a group is positive: its largest cannot normalise it, compare raw RR")
    return te.mean(1, keepdims=True), ie.mean(1, keepdims=True) / (largest if normalise else 1)
