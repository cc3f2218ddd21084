"""Bootstrap intervals of restoration rates, over samples, replicates or both."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from interventions.statistics.bootstrap import Interval, bootstrap_rows, percentile_bounds
from interventions.statistics.proportions import LEAST
from interventions.statistics.restoration import EPS, STATISTICS, Statistic, check_effects, estimate_draws, rr
from vlm_jax.errors import UserError

Over = Literal["samples", "replicates", "both"]


def rr_interval(
    te: ArrayLike,
    ie: ArrayLike,
    over: Over = "samples",
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    **options,
) -> Interval:
    """RR ``(C,)`` of ``te (N, R)`` and ``ie (N, R, C)``, and its percentile bootstrap interval.

    Args:
        over: "samples": would other samples, with other corruptions, give the same? Samples are resampled together with
            their replicates. Each sample has its own corruptions, so the interval covers both kinds of chance.
            "replicates": would other corruptions of the same samples give the same? Replicates are resampled within
            each sample. R replicates vary too little around their own mean, so the draws are spread by
            sqrt(R / (R - 1)).
            "both": samples are resampled, and then replicates within each (hierarchical). This counts the corruption
            twice, so the interval is usually wider. If a few samples with a small TE dominate the mean, the mean moves
            too.
        options: min_te, eps and statistic, as for :func:`rr`.

    The bounds over samples are NaN if fewer than six samples count (:data:`.proportions.LEAST`).

    Raises:
        UserError: as :func:`rr`; also for "replicates" if there is only one.
    """
    te, ie = check_effects(te, ie)
    value = rr(te, ie, **options)
    draws = rr_resamples(te, ie, over, resamples=resamples, seed=seed, **options)
    if over != "replicates" and counted_samples(te, **options) < LEAST:
        return Interval(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    if over == "replicates":
        draws = value + (draws - value) * np.sqrt(te.shape[1] / (te.shape[1] - 1))
    return Interval(value, *percentile_bounds(draws, level))


def counted_samples(te: ArrayLike, min_te: float = 0.01, statistic: Statistic = "mean_of_ratios", **_) -> int:
    """How many samples of ``te (N, R)`` count in RR: those with TE >= ``min_te``, or all for the ratio of means."""
    te = np.asarray(te, float)
    return len(te) if statistic == "ratio_of_means" else int((te.mean(1) >= min_te).sum())


def rr_resamples(
    te: ArrayLike,
    ie: ArrayLike,
    over: Over = "samples",
    *,
    resamples: int = 2000,
    seed: int | Sequence[int] = 0,
    **options,
) -> Float[np.ndarray, "resamples cells"]:
    """RR of bootstrap resamples; arguments as for :func:`rr_interval`. NaN where a resample has no
    sample with TE >= ``min_te``."""
    te, ie = check_effects(te, ie)
    count, replicates = te.shape
    if over == "replicates" and replicates == 1:
        raise UserError("one replicate does not show how much corruptions vary: trace with --replicates 2")
    options = {"min_te": 0.01, "eps": EPS, "statistic": "mean_of_ratios"} | options
    # A second stream, so that the drawn samples do not depend on R.
    replicate_rng = np.random.default_rng([seed, 1])
    chunks = []
    for rows in bootstrap_rows(count, resamples, seed, replicates):
        if over == "replicates":
            rows = np.broadcast_to(np.arange(count), rows.shape)
        drawn = None if over == "samples" else replicate_rng.integers(0, replicates, (*rows.shape, replicates))
        chunks.append(estimate_draws(te, ie, rows, drawn, **options))
    return np.concatenate(chunks)


def rr_summary(
    te: ArrayLike, ie: ArrayLike, cells: Sequence[str], *, resamples: int = 2000, seed: int = 0, **options
) -> list[dict]:
    """A row for each cell and statistic: RR, its rank (1 is the highest), how many samples count, and the intervals.

    ``low`` and ``high`` are the interval over samples, None if fewer than six count. With several replicates there are
    also ``replicates_low``, ``replicates_high``, ``both_low`` and ``both_high``. The ratio of means is left out if the
    mean TE is not positive. All numbers of a cell are None if no sample with TE >= ``min_te`` has it.

    Args:
        options: min_te and eps, as for :func:`rr`.
    """
    te, ie = check_effects(te, ie)
    columns: dict[Over, tuple[str, str]] = {"samples": ("low", "high")}
    if te.shape[1] > 1:
        columns |= {"replicates": ("replicates_low", "replicates_high"), "both": ("both_low", "both_high")}
    rows = []
    for statistic in STATISTICS:
        if statistic == "ratio_of_means" and te.mean() <= 0:
            continue
        intervals = {
            over: rr_interval(te, ie, over, resamples=resamples, seed=seed, statistic=statistic, **options)
            for over in columns
        }
        value = intervals["samples"].value
        rank = 1 + np.argsort(np.argsort(-value, kind="stable"), kind="stable")  # NaN comes last
        for cell, name in enumerate(cells):
            known = bool(np.isfinite(value[cell]))
            row = {"cell": name, "statistic": statistic, "rr": None, "rank": int(rank[cell]) if known else None}
            row["rr"] = float(value[cell]) if known else None
            row["samples"] = counted_samples(te, statistic=statistic, **options)
            for over, (low, high) in columns.items():
                ends = float(intervals[over].low[cell]), float(intervals[over].high[cell])
                ends = (None if np.isnan(end) or not known else end for end in ends)
                row |= dict(zip((low, high), ends, strict=True))
            rows.append(row)
    return rows
