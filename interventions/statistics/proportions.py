"""Intervals of proportions, and what a few samples can tell at most."""

from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

LEAST = 6
"""The fewest independent samples of which a bootstrap interval at 95 % is given. Resampled means stay between the
smallest and the largest sample, and all N samples lie on the same side of the median with a chance of 2^(1 - N): .06 of
five, .03 of six. For the same reason fewer than six changed answers are no evidence: the sign test's p is 2^(1 - N)."""

NOT_ENOUGH = "not enough samples"
"""Printed in place of an interval of fewer than :data:`LEAST` samples."""


class Bounds(NamedTuple):
    """The two ends of an interval."""

    low: float
    high: float


def wilson(right: int, count: int, level: float = 0.95) -> Bounds:
    """Wilson's (1927) score interval of the proportion ``right / count`` of independent samples. It has a width even if
    all of them are right or all wrong."""
    interval = scipy.stats.binomtest(right, count).proportion_ci(level, "wilson")
    return Bounds(float(interval.low), float(interval.high))


def widest(mean: float, units: int, level: float = 0.95) -> Bounds:
    """Wilson's interval of ``units`` scores of 0 and 1 with this mean, rounded outwards to whole numbers of right ones.

    Of all scores from 0 to 1 with the same mean, those of 0 and 1 vary most.
    """
    right = np.clip(mean * units, 0, units)
    low, high = int(np.floor(right + 1e-9)), int(np.ceil(right - 1e-9))
    return Bounds(wilson(low, units, level).low, wilson(high, units, level).high)


def exact_bound(changed: int, units: int, level: float = 0.95) -> float:
    """Clopper and Pearson's one-sided upper bound of a share of which ``changed / units`` was seen. Of none it is
    ``1 - (1 - level)^(1 / units)``: the largest share of which none is drawn with a chance of ``1 - level``."""
    return float(scipy.stats.binomtest(changed, units, alternative="less").proportion_ci(level, "exact").high)


def few_changes(gained: int, lost: int, units: int, level: float = 0.95) -> Bounds:
    """Bounds of a mean change in [-1, 1] of which only ``gained + lost`` of ``units`` samples show any.

    The mean is at most the share of samples that gain, and at least minus the share that lose; both shares have exact
    bounds, at half the error each. If no sample changed, one bound holds for both: of the share that changes at all.
    """
    if gained + lost == 0:
        bound = exact_bound(0, units, level)
        return Bounds(-bound, bound)
    each = (1 + level) / 2
    return Bounds(-exact_bound(lost, units, each), exact_bound(gained, units, each))


def widened(
    low: ArrayLike, high: ArrayLike, gained: ArrayLike, lost: ArrayLike, units: int, level: float = 0.95
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """Bootstrap intervals of mean changes in [-1, 1], joined with :func:`few_changes` where fewer than :data:`LEAST`
    samples changed: resampling so few cannot tell how rare changes are.

    Args:
        low, high: the intervals.
        gained, lost: how many of the ``units`` samples changed in each direction; all four have the same shape.
    """
    low, high = (np.array(part, float) for part in (low, high))
    counts: list[Int[np.ndarray, "*shape"]] = [np.asarray(part, int) for part in (gained, lost)]
    for at in map(tuple, np.argwhere(counts[0] + counts[1] < LEAST)):
        few = few_changes(int(counts[0][at]), int(counts[1][at]), units, level)
        low[at], high[at] = min(low[at], few.low), max(high[at], few.high)
    return low, high
