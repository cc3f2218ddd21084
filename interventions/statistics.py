"""Statistics of causal traces (P0) and of paired evaluations: estimates, what chance does to them, and tests.

A traced task is ``te (N, R)`` and ``ie (N, R, C)``: N samples, R paired replicates of the corruption, C cells. A
sample's TE and IE are means over its replicates. All of it is NumPy, seeded, and in bounded memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import binomtest, false_discovery_control, kendalltau, norm, pearsonr, spearmanr
from scipy.stats import t as student

from vlm_jax.errors import UserError

Statistic = Literal["mean_of_ratios", "ratio_of_means", "median"]
STATISTICS = ("mean_of_ratios", "ratio_of_means", "median")
Over = Literal["samples", "replicates", "both"]
#: Of equations 4 and 7: the paper prints "e^{-8}", read here as 1e-8.
EPS = 1e-8
#: Numbers that one chunk of draws may hold.
_ROOM = 1_000_000


# The restoration rate.


def rr(te, ie, min_te: float = 0.01, eps: float = EPS, statistic: Statistic = "mean_of_ratios") -> np.ndarray:
    """The restoration rate of every cell ``(C,)`` (P0, equation 4) of ``te (N, R)`` and ``ie (N, R, C)``.

    Args:
        min_te: samples whose TE is below this are left out of both statistics of ratios.
        eps: of equation 4.
        statistic: "mean_of_ratios": mean of IE / (TE + eps) over samples (P0); "median" of the same;
            "ratio_of_means": mean IE / (mean TE + eps) over all samples.

    Raises:
        UserError: if no sample is left, or the mean TE is not positive.
    """
    te, ie = _checked(te, ie)
    if statistic == "ratio_of_means":
        if te.mean() <= 0:
            raise UserError(f"the mean TE is {te.mean():.3g}: corrupt more (--noise-scale), or choose other samples")
    elif not (te.mean(1) >= min_te).any():
        raise UserError(f"no sample has TE >= {min_te}: raise --noise-scale, or choose samples that the model answers")
    return _estimates(te, ie, np.arange(len(te))[None], min_te=min_te, eps=eps, statistic=statistic)[0]


def normalised(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Equation 7: RR over its largest: the array's, as of ``(C,)`` or ``(L, 2)``, or an axis', as -1 of ``(b, C)``."""
    return values / (values.max(axis, keepdims=True) + EPS)


class _Weights(NamedTuple):
    """What makes an estimate of each of b draws of n samples: ``top @ IE / sum(bottom)``."""

    flat: np.ndarray  # (places, C): IE of every sample and replicate
    places: np.ndarray  # (b, n, R): which of them a draw holds
    top: np.ndarray  # (b, n)
    bottom: np.ndarray  # (b, n)


def _weights(te, ie, samples, replicates, min_te, eps, statistic) -> _Weights:
    """Of draws of the rows ``samples (b, n)``, and of their replicates ``(b, n, R)``; None for those they have."""
    if replicates is None:
        te, ie = te.mean(1, keepdims=True), ie.mean(1, keepdims=True)
        replicates = np.zeros((1, 1, 1), int)
    places = samples[..., None] * te.shape[1] + replicates
    effect = te.ravel()[places].mean(-1)  # (b, n)
    if statistic == "ratio_of_means":
        top, bottom = np.ones_like(effect), effect + eps
    else:
        bottom = (effect >= min_te).astype(float)
        top = np.divide(bottom, effect + eps, out=np.zeros_like(effect), where=bottom > 0)
    return _Weights(ie.reshape(te.size, -1), places, top, bottom)


def _estimates(te, ie, samples, replicates=None, *, min_te, eps, statistic) -> np.ndarray:
    """RR ``(b, C)`` of the draws of :func:`_weights`; NaN where one keeps no sample."""
    flat, places, top, bottom = _weights(te, ie, samples, replicates, min_te, eps, statistic)
    if statistic == "median":
        kept = bottom > 0
        each = (flat[p[k]].mean(1) * t[k, None] for p, t, k in zip(places, top, kept, strict=True))  # (n, C)
        return np.stack([np.median(ratios, 0) if len(ratios) else np.full(flat.shape[1], np.nan) for ratios in each])
    with np.errstate(divide="ignore", invalid="ignore"):
        return _summed(places, top, len(flat)) @ flat / bottom.sum(1)[:, None]


def _with_errors(te, ie, samples, normalise: bool, **how) -> tuple[np.ndarray, np.ndarray]:
    """Sums over samples, and their squared standard errors to first order, ``(b, C)`` both.

    A sample moves an estimate by ``(top * IE - estimate * bottom) / sum(bottom)``, and an estimate over the largest one
    by ``(its move - the normalised estimate * the largest one's move) / the largest one``.
    """
    flat, places, top, bottom = _weights(te, ie, samples, None, **how)
    once, mixed, twice = (_summed(places, w, len(flat)) for w in (top, top * bottom, top**2))
    whole, bottoms = bottom.sum(1)[:, None], (bottom**2).sum(1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        value, mixed = once @ flat / whole, mixed @ flat
        variance = (twice @ flat**2 - 2 * value * mixed + value**2 * bottoms) / whole**2
        if not normalise:
            return value, variance
        peak = value.argmax(1)
        products = np.empty_like(value)  # of every cell's IE and the largest one's
        for cell in np.unique(peak):
            products[peak == cell] = twice[peak == cell] @ (flat * flat[:, [cell]])
        height, tied, spread = (np.take_along_axis(a, peak[:, None], 1) for a in (value, mixed, variance))
        covariance = (products - value * tied - height * mixed + value * height * bottoms) / whole**2
        value = normalised(value, -1)
        return value, (variance + value**2 * spread - 2 * value * covariance) / height**2


def _summed(places: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """``(b, size)``: the weights ``(b, n)`` summed at the places ``(b, n, R)`` that they belong to, a share each."""
    draws, _, share = places.shape
    rows = np.arange(draws)[:, None, None] * size
    shared = np.broadcast_to(weights[..., None] / share, places.shape)
    return np.bincount((rows + places).ravel(), shared.ravel(), draws * size).reshape(draws, size)


def _checked(te, ie) -> tuple[np.ndarray, np.ndarray]:
    te, ie = np.asarray(te, float), np.asarray(ie, float)
    if te.ndim != 2 or ie.ndim != 3 or ie.shape[:2] != te.shape or not ie.size:
        raise ValueError(f"te is {te.shape} and ie {ie.shape}: they must be (N, R) and (N, R, C)")
    bad = ~(np.isfinite(te).all(1) & np.isfinite(ie).all((1, 2)))
    if bad.any():
        raise UserError(f"TE or IE of sample {int(bad.argmax())} is not a finite number: leave {bad.sum()} such out")
    return te, ie


# The bootstrap.


class Interval(NamedTuple):
    """An estimate and the bounds of its interval, arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def drawn_rows(count: int, draws: int, seed, width: int = 1) -> Iterator[np.ndarray]:
    """``(draws, count)`` rows drawn with replacement, in chunks of draws such that ``width`` numbers for each of them
    have room. The stream is that of ``scipy.stats.bootstrap`` with ``rng=seed``, whatever the chunks."""
    rng = np.random.default_rng(seed)
    for size in _chunks(draws, count * width):
        yield rng.integers(0, count, (size, count))


def _chunks(draws: int, width: int) -> Iterator[int]:
    each = max(1, _ROOM // width)
    yield from (min(each, draws - done) for done in range(0, draws, each))


def _bounds(draws: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles over axis 0 that hold ``level`` of the draws; those that gave no number are left out."""
    found = np.nanpercentile if np.isnan(draws).any() else np.percentile
    low, high = found(draws, [50 * (1 - level), 50 * (1 + level)], axis=0)
    return low, high


def percentiles(draws: np.ndarray) -> dict:
    """The mean of bootstrap draws (axis 0) and their 95 % percentile interval, as JSON has them."""
    return _plain(Interval(draws.mean(0), *_bounds(draws)))


def interval(values, seed: int = 0) -> dict:
    """The mean over samples (axis 0; NaN is left out) and its 95 % percentile bootstrap interval, as JSON has them."""
    values = np.asarray(values, float)
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    filled, parts = np.where(known, flat, 0), []
    with np.errstate(invalid="ignore"):
        for rows in drawn_rows(len(flat), 2000, seed):
            times = _summed(rows[..., None], np.ones(rows.shape), len(flat))  # how often each row was drawn
            parts.append(times @ filled / (times @ known))
        mean = filled.sum(0) / known.sum(0)
    found = Interval(mean, *_bounds(np.concatenate(parts)))
    return _plain(Interval(*(a.reshape(values.shape[1:]) for a in found)))


def _plain(found: Interval) -> dict:
    return {"mean": found.value.tolist(), "low": found.low.tolist(), "high": found.high.tolist()}


def intervals(
    te, ie, over: Over = "samples", *, resamples: int = 2000, seed: int = 0, level: float = 0.95, **how
) -> Interval:
    """RR ``(C,)`` and its percentile bootstrap interval.

    Args:
        over: "samples": other samples with other corruptions. Samples are resampled with the replicates that they have,
            and since every sample has corruptions of its own, that holds both kinds of chance.
            "replicates": the same samples with other corruptions. Only replicates are resampled, within each sample,
            and the draws are spread by sqrt(R / (R - 1)), since R replicates vary less around their own mean.
            "both": samples, and then replicates within each (hierarchical). Counts the chance of the corruption twice,
            so that it is as a rule wider; where few samples of small TE carry a mean, that mean moves as well.
        how: min_te, eps, statistic, as for :func:`rr`.

    Raises:
        UserError: as :func:`rr`; and for "replicates" of which there is one.
    """
    te, ie = _checked(te, ie)
    value = rr(te, ie, **how)
    draws = resampled(te, ie, over, resamples=resamples, seed=seed, **how)
    if over == "replicates":
        draws = value + (draws - value) * np.sqrt(te.shape[1] / (te.shape[1] - 1))
    return Interval(value, *_bounds(draws, level))


def resampled(te, ie, over: Over = "samples", *, resamples: int = 2000, seed=0, **how) -> np.ndarray:
    """RR of bootstrap resamples ``(resamples, C)``; arguments as for :func:`intervals`. NaN where one has no sample
    with TE >= min_te."""
    te, ie = _checked(te, ie)
    count, replicates = te.shape
    if over == "replicates" and replicates == 1:
        raise UserError("one replicate says nothing about the chance of the corruption: trace with --replicates 2")
    how = {"min_te": 0.01, "eps": EPS, "statistic": "mean_of_ratios"} | how
    others = np.random.default_rng([seed, 1])  # apart from the samples' stream, which R must not change
    parts = []
    for rows in drawn_rows(count, resamples, seed, replicates):
        if over == "replicates":
            rows = np.broadcast_to(np.arange(count), rows.shape)
        within = None if over == "samples" else others.integers(0, replicates, (*rows.shape, replicates))
        parts.append(_estimates(te, ie, rows, within, **how))
    return np.concatenate(parts)


def summary(te, ie, cells: Sequence[str], *, resamples: int = 2000, seed: int = 0, **how) -> list[dict]:
    """One row per cell and statistic: its RR and rank (1 is the highest), and its intervals over samples and, where
    there are several replicates, over replicates and over both. No ratio of means where the mean TE is not positive.

    Args:
        how: min_te, eps, as for :func:`rr`.
    """
    te, ie = _checked(te, ie)
    names = {"samples": ("low", "high")}
    if te.shape[1] > 1:
        names |= {over: (f"{over}_low", f"{over}_high") for over in ("replicates", "both")}
    rows = []
    for statistic in STATISTICS:
        if statistic == "ratio_of_means" and te.mean() <= 0:
            continue
        found = {o: intervals(te, ie, o, resamples=resamples, seed=seed, statistic=statistic, **how) for o in names}
        value = found["samples"].value
        rank = 1 + np.argsort(np.argsort(-value, kind="stable"), kind="stable")
        for cell, name in enumerate(cells):
            row = {"cell": name, "statistic": statistic, "rr": float(value[cell]), "rank": int(rank[cell])}
            for over, (low, high) in names.items():
                row |= {low: float(found[over].low[cell]), high: float(found[over].high[cell])}
            rows.append(row)
    return rows


# Knowledge against perception.


class Difference(NamedTuple):
    """Per cell ``(C,)``: first less second, its 95 % bootstrap interval over samples, the permutation test's p, and q:
    p adjusted for C tests (Benjamini-Hochberg), below .05 for a set of cells of which 5 % are expected to be wrong."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    q: np.ndarray


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
    """Does the RR of a cell differ between two groups of samples, such as knowledge and perception? Two-sided.

    The labels of the samples are shuffled. Differences are compared in units of their standard error (Chung and Romano
    2013), without which groups of unequal sizes and spreads differ too often; only those of medians, whose standard
    error is not simple, are compared as they are.

    Args:
        first, second: ``te (N, R)`` and ``ie (N, R, C)`` of each; N and R may differ.
        normalise: compare RR over the largest RR of its group (equation 7), as P0's task-diff does. Each group is
            brought to the same height before labels are shuffled, and after every shuffle again.
        min_te, eps, statistic: as for :func:`rr`.
    """
    how = {"min_te": min_te, "eps": eps, "statistic": statistic}
    groups = []
    for group in (first, second):
        te, ie = _checked(*group)
        height = rr(te, ie, **how).max()
        if normalise and height <= 0:
            raise UserError("no RR of a group is positive: its largest cannot normalise it, compare raw RR")
        groups.append((te.mean(1, keepdims=True), ie.mean(1, keepdims=True) / (height if normalise else 1)))
    te, ie = map(np.concatenate, zip(*groups, strict=True))
    size = len(groups[0][0])

    def differences(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The difference ``(b, C)`` of samples in an order ``(b, N)``, the first group's first, and the test's."""
        halves = order[:, :size], order[:, size:]
        if statistic == "median":
            one, other = (_estimates(te, ie, half, **how) for half in halves)
            value = normalised(one, -1) - normalised(other, -1) if normalise else one - other
            return value, value
        (one, error), (other, other_error) = (_with_errors(te, ie, half, normalise, **how) for half in halves)
        scale = np.sqrt(np.maximum(error + other_error, 0))
        # Where nothing varies, as at the largest of both groups, rounding errors would be compared.
        return one - other, np.divide(one - other, scale, out=0 * (one - other), where=scale > 1e-9)

    everyone = np.arange(len(te))
    value, observed = (found[0] for found in differences(everyone[None]))
    rng, beyond, counted = np.random.default_rng(seed), np.zeros(len(value)), np.zeros(len(value))
    for number in _chunks(permutations, len(te)):
        null = differences(rng.permuted(np.broadcast_to(everyone, (number, len(te))), axis=1))[1]
        beyond += (np.abs(null) >= np.abs(observed) - 1e-9).sum(0)
        counted += np.isfinite(null).sum(0)  # not those that left a group without a sample
    p = (1 + beyond) / (1 + counted)
    one, other = (resampled(*g, resamples=resamples, seed=[seed, n], **how) for n, g in enumerate(groups))
    drawn = normalised(one, -1) - normalised(other, -1) if normalise else one - other
    return Difference(value, *_bounds(drawn), p, false_discovery_control(p))


def holm(p) -> np.ndarray:
    """p-values ``(K,)`` adjusted so that the chance of any false finding among K tests stays below the level (Holm
    1979). For the share of false findings instead: ``scipy.stats.false_discovery_control``."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)[np.argsort(order, kind="stable")]


# Rankings.


def rank_stability(
    te, ie, *, sizes: Sequence[int] | None = None, top: Sequence[int] = (10,), halves: int = 200, seed: int = 0, **how
) -> list[dict]:
    """How alike are the rankings of two disjoint random sets of samples?

    Args:
        sizes: samples in each of the two; half of all where None, and halves of that down to 8.
        top: numbers k of modules; those above C are left out.
        halves: random pairs of sets.
        how: min_te, eps, statistic, as for :func:`rr`.

    Returns:
        Per size: ``samples``; ``tau``: Kendall's tau between the two RR, mean and 95 % range over pairs; ``overlap``:
        by k, the share of the top k that both have, the same, and ``chance``, what unrelated rankings would share.

    Raises:
        UserError: if there are not enough samples.
    """
    te, ie = _checked(te, ie)
    count, cells = len(te), ie.shape[2]
    how = {"min_te": 0.01, "eps": EPS, "statistic": "mean_of_ratios"} | how
    if sizes is None:
        sizes = [count >> power for power in range(1, 5) if count >> power >= 8 or power == 1][::-1]
    if not all(1 <= size <= count // 2 for size in sizes):
        raise UserError(f"two sets of {max(sizes)} cannot be drawn of {count} samples: give at least 2 samples")
    rng, found = np.random.default_rng(seed), []
    for size in sizes:
        order = rng.permuted(np.broadcast_to(np.arange(count), (halves, count)), axis=1)
        pairs = [_estimates(te, ie, order[:, at : at + size], **how) for at in (0, size)]
        known = np.isfinite(pairs[0]).all(1) & np.isfinite(pairs[1]).all(1)
        if not known.any():
            raise UserError(f"of {size} samples none has TE >= {how['min_te']}: trace more samples")
        one, other = (pair[known] for pair in pairs)
        tau = np.array([kendalltau(a, b).statistic for a, b in zip(one, other, strict=True)])
        ranked = [np.argsort(-pair, axis=1, kind="stable") for pair in (one, other)]
        overlap = {}
        for k in (k for k in top if k <= cells):
            both = [len(np.intersect1d(a[:k], b[:k])) / k for a, b in zip(*ranked, strict=True)]
            overlap[k] = {**percentiles(np.array(both)), "chance": k / cells}
        found.append({"samples": size, "tau": percentiles(tau), "overlap": overlap})
    return found


def correlations(rates: Mapping[str, np.ndarray]) -> list[dict]:
    """How alike the RR ``(C,)`` of kinds of corruption are: one row per pair with ``pearson, spearman, kendall``, None
    where one of the two is the same in all cells. Cells are no sample of anything, so there is no p-value."""
    rows = []
    for (first, x), (second, y) in combinations(rates.items(), 2):
        constant = np.ptp(x) == 0 or np.ptp(y) == 0
        measures = {"pearson": pearsonr, "spearman": spearmanr, "kendall": kendalltau}
        found = {name: None if constant else float(measure(x, y).statistic) for name, measure in measures.items()}
        rows.append({"first": first, "second": second, "cells": len(x), **found})
    return rows


# Paired evaluations.


def paired(first, second, *, clusters=None, resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> dict:
    """Two placements' scores on the same held-out samples: is there a difference, and how large can it still be?

    Args:
        first, second: ``(N,)``, or ``(S, N)`` of several training seeds; S may differ.
        clusters: labels ``(N,)`` of samples that hang together, such as those of one image
            (:func:`eval.judging.clusters_of`): clusters are resampled in place of samples.

    Returns:
        ``difference`` of the means, first less second; ``low``, ``high``: its percentile bootstrap interval;
        ``excluded``: the largest of the two bounds' sizes, beyond which a difference is excluded;
        ``p``, two-sided: the share of draws on the far side of 0, before they are spread, as a normal quantile, looked
        up in Student's t. As far as the draws are normal it agrees with the interval, but the share is never below
        1 / (resamples + 1), which puts a floor under p: by default .0002 with one seed each, .065 at 2 degrees of
        freedom, where the interval can lack 0 and p is still above .05;
        ``mcnemar_p``, ``gained``, ``lost``: :func:`mcnemar` of one seed each, else None. It knows nothing of clusters,
        in which it counts every sample as one of its own.

    With several seeds, samples (the same for all, scored by the mean over seeds) and the seeds of each placement are
    resampled, and what each changes is added. Seeds are drawn S - 1 at a time, without which their mean would vary too
    little (Rao and Wu 1988), and the interval is spread by Student's t over the normal quantile, with the degrees of
    freedom that so few seeds leave (Satterthwaite). With one seed the chance of training is not in the interval.

    Raises:
        UserError: if the two have not the same samples.
    """
    first, second = _on_the_same(first, second)
    count = first.shape[1]
    each = first.mean(0) - second.mean(0)  # (N,)
    sums, sizes = each, np.ones(count)  # of what is resampled
    if clusters is not None:
        if np.shape(clusters) != (count,):
            raise ValueError(f"clusters are {np.shape(clusters)}: they must be ({count},), a label for every sample")
        labels = np.unique(clusters, return_inverse=True)[1]
        sums, sizes = np.bincount(labels, each), np.bincount(labels)
    parts = [sums[rows].sum(1) / sizes[rows].sum(1) for rows in drawn_rows(len(sums), resamples, seed)]
    draws = np.concatenate(parts) - each.mean()
    variances, freedom, rng = [draws.var()], [np.inf], np.random.default_rng([seed, 1])
    for scores, sign in ((first, 1), (second, -1)):
        if (seeds := len(scores)) > 1:
            moves = scores.mean(1) - scores.mean()  # (S,)
            draws += sign * (rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), resamples) @ moves) / (seeds - 1)
            variances.append(moves.var(ddof=1) / seeds)
            freedom.append(seeds - 1)
    lost = (np.square(variances) / freedom).sum()
    left = sum(variances) ** 2 / lost if lost else np.inf
    tail = (1 + level) / 2
    low, high = map(float, _bounds(each.mean() + draws * (student.ppf(tail, left) / norm.ppf(tail)), level))
    unspread = each.mean() + draws
    share = (1 + min((unspread <= 0).sum(), (unspread >= 0).sum())) / (1 + resamples)
    found = {
        "samples": count,
        "seeds": [len(first), len(second)],
        "first": float(first.mean()),
        "second": float(second.mean()),
        "difference": float(each.mean()),
        "low": low,
        "high": high,
        "excluded": max(abs(low), abs(high)),
        "p": min(1.0, 2 * float(student.sf(norm.isf(share), left))),
    }
    one_each = len(first) == len(second) == 1
    return found | (mcnemar(first[0], second[0]) if one_each else dict.fromkeys(("gained", "lost", "mcnemar_p")))


def mcnemar(first, second) -> dict:
    """McNemar's exact test of two placements' scores ``(N,)`` on the same samples.

    Returns:
        ``gained``, ``lost``: samples that the first alone, or the second alone, gets right; ``mcnemar_p``, two-sided.
        All None where a score is neither 0 nor 1.

    Raises:
        UserError: if the two have not the same samples.
    """
    first, second = _on_the_same(first, second)
    if len(first) > 1 or len(second) > 1:
        raise ValueError(f"scores of {len(first)} and {len(second)} seeds: McNemar's test is of one each")
    if not np.isin([first, second], (0, 1)).all():
        return dict.fromkeys(("gained", "lost", "mcnemar_p"))
    gained, lost = int((first > second).sum()), int((first < second).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "mcnemar_p": p}


def _on_the_same(first, second) -> tuple[np.ndarray, np.ndarray]:
    """Both as ``(S, N)``."""
    first, second = (np.atleast_2d(np.asarray(x, float)) for x in (first, second))
    if first.shape[1] != second.shape[1] or not first.size:
        raise UserError(f"the two have {first.shape[1]} and {second.shape[1]} samples: compare them on the same ones")
    return first, second
