"""The numbers that a benchmark reports, with their standard errors and intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Int, Shaped

from interventions.statistics import LEAST, accuracy, interval_text
from interventions.statistics.proportions import widest

_RESAMPLES = 2000


class Value(NamedTuple):
    """A reported number, its standard error, the number of independent clusters (images, groups or samples), and the
    bounds of its 95 % interval."""

    value: float
    stderr: float
    clusters: int
    low: float
    high: float

    def __str__(self) -> str:
        return interval_text(self._asdict(), "value")


def mean(
    scores: Sequence[float] | Shaped[np.ndarray, " samples"],
    clusters: Int[np.ndarray, " samples"] | None = None,
    top: float = 1.0,
) -> Value:
    """The mean of scores from 0 to ``top``.

    The standard error is sqrt(var / n), with the variance divided by n. For clustered samples it includes the products
    of the deviations within each cluster (Miller 2024, "Adding error bars to evals", equation 4). The interval is that
    of :func:`interventions.statistics.accuracy`.
    """
    values = np.asarray(scores, float)
    clusters = np.arange(len(values)) if clusters is None else clusters
    deviations = np.bincount(clusters, values - values.mean())
    error = float(np.sqrt(np.sum(deviations**2)) / len(values))
    found = accuracy(values / top, clusters=clusters, resamples=_RESAMPLES)
    return Value(float(values.mean()), error, found["units"], top * found["low"], top * found["high"])


def ratio(
    numerator: Shaped[np.ndarray, " samples"],
    denominator: Shaped[np.ndarray, " samples"],
    clusters: Int[np.ndarray, " samples"],
    resamples: int = 1000,
) -> Value:
    """sum(numerator) / sum(denominator), which is from 0 to 1; 0 if the denominator is 0.

    Standard error and interval come from a bootstrap over clusters with a fixed seed. The error is 0 for a single
    cluster. If fewer than six clusters count, or all resamples give the same, the interval is Wilson's of as many
    independent samples.
    """

    def statistic(above, below, axis):
        below = below.sum(axis)
        return np.divide(above.sum(axis), below, out=np.zeros(np.shape(below)), where=below > 0)

    counts = [np.bincount(clusters, np.asarray(part, float)) for part in (numerator, denominator)]
    count, error, value = len(counts[0]), 0.0, float(statistic(*counts, axis=0))
    low = high = value
    if count > 1:
        options = {"n_resamples": resamples, "batch": 100, "method": "percentile", "rng": np.random.default_rng(0)}
        found = scipy.stats.bootstrap(counts, statistic, paired=True, vectorized=True, **options)
        error, (low, high) = float(found.standard_error), map(float, found.confidence_interval)
    counting = int((counts[1] > 0).sum())
    if counting == 0:
        low, high = 0.0, 1.0
    elif counting < LEAST or low == high:
        wide = widest(value, counting)
        low, high = min(low, wide.low), max(high, wide.high)
    return Value(value, error, count, low, high)


def total(values: Sequence[Value]) -> Value:
    """The sum of independent values. The distances to the bounds add up as standard errors do (Zou and Donner 2008)."""
    value, stderr, clusters, low, high = map(np.array, zip(*values, strict=True))
    below, above = (float(np.sqrt(np.sum((value - end) ** 2))) for end in (low, high))
    added = float(value.sum())
    return Value(added, float(np.sqrt(np.sum(stderr**2))), int(clusters.sum()), added - below, added + above)
