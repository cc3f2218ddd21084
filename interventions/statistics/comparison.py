"""Compares two placements on the same held-out samples, and adjusts the p-values of several comparisons."""

from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float
from numpy.typing import ArrayLike

from interventions.statistics.bootstrap import bootstrap_rows, percentile_bounds, sum_by_place
from interventions.statistics.proportions import LEAST, Bounds, exact_bound, widened, widest, wilson
from vlm_jax.errors import UserError


def paired(
    first: ArrayLike,
    second: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> dict:
    """The difference of two placements' mean scores on the same held-out samples, with its interval and p-value.

    Args:
        first, second: scores ``(N,)``, or ``(S, N)`` of S training seeds; S may differ between the two.
        clusters: labels ``(N,)`` of samples that are not independent, such as those of one image
            (:func:`eval.judging.clusters_of`). Clusters are then resampled in place of samples.

    Returns:
        ``difference``: the first mean minus the second. ``low``, ``high``: its percentile bootstrap interval, or a
        wider one if few samples differ (see below).
        ``excluded``: the larger absolute value of the two bounds; the interval excludes any larger difference.
        ``units``: how many independent samples (or clusters) there are. ``differing``: in how many of them the two
        scores differ.
        ``p``: two-sided p-value (see below).
        ``mcnemar_p``, ``gained``, ``lost``: the results of :func:`mcnemar`, None with several seeds. McNemar's test
        ignores clusters and treats every sample as independent.

    With several seeds, three things are resampled: the samples, which are the same for all and scored by the mean over
    seeds, and the seeds of each placement. The resulting changes are added. S - 1 of S seeds are drawn at a time,
    because the mean of S resampled seeds would vary too little (Rao and Wu 1988). The interval is then widened from
    the normal quantile to Student's t, with the few degrees of freedom that the seeds leave (Satterthwaite). With one
    seed the interval does not cover the chance of training.

    p comes from the share of draws on the other side of 0, before the interval is widened. The share is converted to a
    normal quantile, and that is looked up in Student's t. For normal draws p agrees with the interval. But the share is
    never below 1 / (resamples + 1), so p has a lower limit: by default .0002 with one seed each and .065 at 2 degrees
    of freedom. There the interval can exclude 0 although p is above .05.

    Few samples do not tell how rare a difference is, and resampling them does not either. So the interval of scores
    from 0 to 1 is joined with exact bounds if fewer than six samples differ (:func:`.proportions.few_changes`). If all
    differ by the same number, it reaches as far as n samples without an exception allow: 1 - .05^(1/n) to both sides.
    The interval of other scores is None below six samples. p is never below 2^(1 - differing), the least p of a sign
    test.

    Raises:
        UserError: if the two do not have the same samples.
    """
    first, second = _as_seeds_by_samples(first, second)
    drawn = _resampled(first, second, clusters, resamples, seed, level)
    changes = _Changes.of(first.mean(0) - second.mean(0), clusters)
    bounds = _bounds(drawn.interval, first, second, changes, level)
    beyond = min((drawn.means <= 0).sum(), (drawn.means >= 0).sum())
    share = (1 + beyond) / (1 + resamples)
    p = 2 * float(scipy.stats.t.sf(scipy.stats.norm.isf(share), drawn.freedom))
    result = {
        "samples": first.shape[1],
        "units": changes.units,
        "differing": changes.differing,
        "seeds": [len(first), len(second)],
        "first": float(first.mean()),
        "second": float(second.mean()),
        "difference": drawn.mean,
        "low": bounds and bounds.low,
        "high": bounds and bounds.high,
        "excluded": bounds and max(abs(bounds.low), abs(bounds.high)),
        "p": min(1.0, max(p, 2.0 ** (1 - changes.differing))),
    }
    one_seed_each = len(first) == len(second) == 1
    return result | (mcnemar(first[0], second[0]) if one_seed_each else dict.fromkeys(_MCNEMAR))


class _Resampled(NamedTuple):
    """Bootstrap draws of the difference of two means."""

    mean: float
    means: Float[np.ndarray, "resamples"]
    interval: Bounds
    """The percentiles of the means, after these were widened to Student's t."""
    freedom: float
    """Its degrees of freedom."""


def _resampled(
    first: Float[np.ndarray, "_seeds samples"],
    second: Float[np.ndarray, "_seeds samples"],
    clusters: ArrayLike | None,
    resamples: int,
    seed: int,
    level: float,
) -> _Resampled:
    """The draws of :func:`paired`, over samples and seeds."""
    difference = first.mean(0) - second.mean(0)  # (N,)
    mean = difference.mean()
    draws = _resampled_means(difference, clusters, resamples, seed) - mean
    variances, freedom, rng = [draws.var()], [np.inf], np.random.default_rng([seed, 1])
    for scores, sign in ((first, 1), (second, -1)):
        if (seeds := len(scores)) > 1:
            moves = scores.mean(1) - scores.mean()  # (S,)
            draws += sign * (rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), resamples) @ moves) / (seeds - 1)
            variances.append(moves.var(ddof=1) / seeds)
            freedom.append(seeds - 1)
    freedom_lost = (np.square(variances) / freedom).sum()
    freedom_left = sum(variances) ** 2 / freedom_lost if freedom_lost else np.inf
    tail = (1 + level) / 2
    spread = draws * (scipy.stats.t.ppf(tail, freedom_left) / scipy.stats.norm.ppf(tail))
    interval = Bounds(*map(float, percentile_bounds(mean + spread, level)))
    return _Resampled(float(mean), mean + draws, interval, float(freedom_left))


def paired_columns(
    first: Float[np.ndarray, "samples columns"],
    second: Float[np.ndarray, "samples columns"],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "columns"]]:
    """The change of the mean of every column between two measurements of the same samples. A sample is left out of the
    columns in which one of its values is NaN.

    Returns:
        ``first``, ``second``: the means. ``change``: second minus first. ``low``, ``high``: its percentile bootstrap
        interval over samples. ``p``: its two-sided p-value (:func:`two_sided`). These three are NaN in a column with
        fewer than six samples.
    """
    known = ~np.isnan(first) & ~np.isnan(second)
    change = np.where(known, second - first, 0)
    chunks = []
    with np.errstate(invalid="ignore"):
        for rows in bootstrap_rows(len(change), resamples, seed, change.shape[1]):
            times_drawn = sum_by_place(rows[..., None], np.ones(rows.shape), len(change))
            chunks.append(times_drawn @ change / (times_drawn @ known))
        means = [np.where(known, values, 0).sum(0) / known.sum(0) for values in (first, second, change)]
    draws = np.concatenate(chunks)
    low, high = percentile_bounds(draws)
    ends = (np.where(known.sum(0) >= LEAST, end, np.nan) for end in (low, high, two_sided(draws)))
    return dict(zip(("first", "second", "change", "low", "high", "p"), (*means, *ends), strict=True))


def two_sided(draws: Float[np.ndarray, "resamples *shape"]) -> Float[np.ndarray, "*shape"]:
    """The two-sided p-value of 0 from bootstrap draws of a difference: twice the smaller share of the draws on either
    side of 0, at least 2 / (resamples + 1). NaN where no draw is known."""
    known = ~np.isnan(draws)
    beyond = np.minimum((known & (draws <= 0)).sum(0), (known & (draws >= 0)).sum(0))
    p = np.minimum(1.0, 2 * (1 + beyond) / (1 + known.sum(0)))
    return np.where(known.any(0), p, np.nan)


class _Changes(NamedTuple):
    """In how many of the independent samples (or clusters) two scores differ, and in which directions."""

    units: int
    differing: int
    gained: int
    lost: int

    @classmethod
    def of(cls, difference: Float[np.ndarray, "samples"], clusters: ArrayLike | None) -> "_Changes":
        labels = np.arange(len(difference)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
        up, down = difference > 1e-12, difference < -1e-12  # means over seeds that are equal may differ by rounding
        return cls(int(labels.max()) + 1, *(len(np.unique(labels[part])) for part in (up | down, up, down)))


def _bounds(
    resampled: Bounds,
    first: Float[np.ndarray, "_seeds samples"],
    second: Float[np.ndarray, "_seeds samples"],
    changes: _Changes,
    level: float,
) -> Bounds | None:
    """The interval of :func:`paired` from the bootstrap's; None if there are too few samples to have one."""
    low, high = resampled
    if min(first.min(), second.min()) < 0 or max(first.max(), second.max()) > 1:
        return resampled if changes.units >= LEAST else None
    if low == high:  # all samples differ by the same number, so the bootstrap knows nothing
        bound = exact_bound(0, changes.units, level)
        low, high = max(low - bound, -1), min(high + bound, 1)
    return Bounds(*map(float, widened(low, high, changes.gained, changes.lost, changes.units, level)))


def accuracy(scores: ArrayLike, *, clusters: ArrayLike | None = None, resamples: int = 10_000) -> dict:
    """The mean of scores from 0 to 1, ``(N,)`` or ``(S, N)``, with its 95 % interval over samples and seeds.

    Returns:
        ``mean``, ``low``, ``high``; ``samples``; ``units``: how many independent samples (or clusters) there are.

    Scores of 0 and 1 of independent samples (one seed, no two samples in a cluster) have Wilson's interval. Other
    scores, clusters and seeds have that of :func:`paired`, joined with Wilson's of as many scores of 0 and 1 as there
    are units if these are fewer than six, or all score the same.
    """
    scores = np.atleast_2d(np.asarray(scores, float))
    count = scores.shape[1]
    units = count if clusters is None else len(np.unique(clusters))
    mean = float(scores.mean())
    if len(scores) == 1 and units == count and np.isin(scores, (0, 1)).all():
        low, high = wilson(int(scores.sum()), count)
    else:
        low, high = _resampled(scores, np.zeros((1, count)), clusters, resamples, 0, 0.95).interval
        low, high = max(low, 0.0), min(high, 1.0)
        if units < LEAST or low == high:
            wide = widest(mean, units)
            low, high = min(low, wide.low), max(high, wide.high)
    return {"mean": mean, "low": low, "high": high, "samples": count, "units": units}


def _resampled_means(
    values: Float[np.ndarray, "samples"], clusters: Any, resamples: int, seed: int
) -> Float[np.ndarray, "resamples"]:
    """Means of bootstrap resamples of the samples, or of their clusters."""
    count = len(values)
    sums, sizes = values, np.ones(count)
    if clusters is not None:
        if np.shape(clusters) != (count,):
            raise ValueError(f"clusters are {np.shape(clusters)}: they must be ({count},), a label for every sample")
        labels = np.unique(clusters, return_inverse=True)[1]
        sums, sizes = np.bincount(labels, values), np.bincount(labels)
    chunks = [sums[rows].sum(1) / sizes[rows].sum(1) for rows in bootstrap_rows(len(sums), resamples, seed)]
    return np.concatenate(chunks)


_MCNEMAR = ("gained", "lost", "mcnemar_p")


def mcnemar(first: ArrayLike, second: ArrayLike) -> dict:
    """McNemar's exact test of two placements' scores ``(N,)`` on the same samples.

    Returns:
        ``gained``, ``lost``: how many samples only the first, or only the second, gets right. ``mcnemar_p``: two-sided
        p-value. All are None if a score is neither 0 nor 1.

    Raises:
        UserError: if the two do not have the same samples.
    """
    first, second = _as_seeds_by_samples(first, second)
    if len(first) > 1 or len(second) > 1:
        raise ValueError(f"scores of {len(first)} and {len(second)} seeds: McNemar's test needs one seed of each")
    if not np.isin([first, second], (0, 1)).all():
        return dict.fromkeys(_MCNEMAR)
    gained, lost = int((first > second).sum()), int((first < second).sum())
    p = float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "mcnemar_p": p}


def _as_seeds_by_samples(
    first: ArrayLike, second: ArrayLike
) -> tuple[Float[np.ndarray, "_seeds samples"], Float[np.ndarray, "_seeds samples"]]:
    """Both as arrays by seed and sample."""
    first, second = (np.atleast_2d(np.asarray(scores, float)) for scores in (first, second))
    if first.shape[1] != second.shape[1] or not first.size:
        raise UserError(f"the two have {first.shape[1]} and {second.shape[1]} samples: compare them on the same ones")
    return first, second


def holm(p: ArrayLike) -> Float[np.ndarray, "tests"]:
    """p-values ``(K,)`` adjusted by Holm (1979): the chance of any false finding among K tests stays below the level.

    To bound the share of false findings instead, use ``scipy.stats.false_discovery_control``.
    """
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)[np.argsort(order, kind="stable")]
