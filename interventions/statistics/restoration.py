"""The restoration rate RR of a traced task (P0, equation 4), of the task itself or of many draws of its samples.

A traced task is ``te (N, R)`` and ``ie (N, R, C)``: N samples, R paired replicates of the corruption, C cells. A
sample's TE and IE are means over its replicates. An IE is NaN where a sample lacks a cell, as a question without an
image lacks the cells of image tokens. Such a sample does not count in the RR of that cell.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy.typing import ArrayLike

from interventions.statistics.bootstrap import sum_by_place
from vlm_jax.errors import UserError

Statistic = Literal["mean_of_ratios", "ratio_of_means", "median"]
STATISTICS = ("mean_of_ratios", "ratio_of_means", "median")
#: A restoration rate for every cell.
CellRates = Float[np.ndarray, "cells"]
#: The constant of equations 4 and 7. The paper prints "e^{-8}", which is read as 1e-8 here.
EPS = 1e-8


def rr(
    te: ArrayLike, ie: ArrayLike, min_te: float = 0.01, eps: float = EPS, statistic: Statistic = "mean_of_ratios"
) -> CellRates:
    """The restoration rate of every cell (P0, equation 4) of ``te (N, R)`` and ``ie (N, R, C)``.

    Args:
        min_te: samples with a lower TE are left out of "mean_of_ratios" and "median".
        eps: the constant of equation 4.
        statistic: "mean_of_ratios": the mean of IE / (TE + eps) over samples (P0). "median": their median.
            "ratio_of_means": mean IE / (mean TE + eps) over all samples.

    Raises:
        UserError: if no sample is left, or the mean TE is not positive.
    """
    te, ie = check_effects(te, ie)
    if statistic == "ratio_of_means":
        if te.mean() <= 0:
            raise UserError(f"the mean TE is {te.mean():.3g}: corrupt more (--noise-scale), or choose other samples")
    elif not (te.mean(1) >= min_te).any():
        raise UserError(f"no sample has TE >= {min_te}: raise --noise-scale, or choose samples that the model answers")
    return estimate_draws(te, ie, np.arange(len(te))[None], min_te=min_te, eps=eps, statistic=statistic)[0]


def normalised(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """RR divided by the largest RR (P0, equation 7).

    Args:
        axis: None divides by the largest value of the whole array, such as ``(C,)`` or ``(L, 2)``; -1 divides every row
            of ``(b, C)`` by its own.
    """
    return values / (values.max(axis, keepdims=True) + EPS)


def check_effects(
    te: ArrayLike, ie: ArrayLike
) -> tuple[Float64[np.ndarray, "samples replicates"], Float64[np.ndarray, "samples replicates cells"]]:
    """Both as float64 arrays.

    Raises:
        ValueError: for other shapes.
        UserError: if a sample's TE or IE is not finite; an IE that is NaN in all replicates is missing.
    """
    te, ie = np.asarray(te, float), np.asarray(ie, float)
    if te.ndim != 2 or ie.ndim != 3 or ie.shape[:2] != te.shape or not ie.size:
        raise ValueError(f"te is {te.shape} and ie {ie.shape}: they must be (N, R) and (N, R, C)")
    usable = np.isfinite(ie).all(1) | np.isnan(ie).all(1)  # (N, C)
    bad = ~(np.isfinite(te).all(1) & np.all(usable, 1))
    if bad.any():
        raise UserError(
            f"TE or IE of sample {int(bad.argmax())} is not a finite number: leave out {bad.sum()} such samples"
        )
    return te, ie


class DrawWeights(NamedTuple):
    """The parts of the estimates of b draws of n samples. An estimate is ``sum(numerator * IE) / sum(denominator)``."""

    effects: Float[np.ndarray, "places cells"]
    """IE of every sample and replicate."""
    places: Int[np.ndarray, "draws drawn replicates"]
    """The rows of ``effects`` that belong to each drawn sample."""
    numerator: Float[np.ndarray, "draws drawn"]
    denominator: Float[np.ndarray, "draws drawn"]


def draw_weights(
    te: Float[np.ndarray, "samples replicates"],
    ie: Float[np.ndarray, "samples replicates cells"],
    samples: Int[np.ndarray, "draws drawn"],
    replicates: Int[np.ndarray, "draws drawn replicates"] | None,
    min_te: float,
    eps: float,
    statistic: Statistic,
) -> DrawWeights:
    """The weights of draws of samples.

    Args:
        samples: the numbers of the drawn samples.
        replicates: the replicates drawn for each of them; None for all that a sample has.
    """
    if replicates is None:
        te, ie = te.mean(1, keepdims=True), ie.mean(1, keepdims=True)
        replicates = np.zeros((1, 1, 1), int)
    places = samples[..., None] * te.shape[1] + replicates
    effect = te.ravel()[places].mean(-1)  # (b, n)
    if statistic == "ratio_of_means":
        numerator, denominator = np.ones_like(effect), effect + eps
    else:
        denominator = (effect >= min_te).astype(float)
        numerator = np.divide(denominator, effect + eps, out=np.zeros_like(effect), where=denominator > 0)
    return DrawWeights(ie.reshape(te.size, -1), places, numerator, denominator)


def estimate_draws(
    te: Float[np.ndarray, "samples replicates"],
    ie: Float[np.ndarray, "samples replicates cells"],
    samples: Int[np.ndarray, "draws drawn"],
    replicates: Int[np.ndarray, "draws drawn replicates"] | None = None,
    *,
    min_te: float,
    eps: float,
    statistic: Statistic,
) -> Float[np.ndarray, "draws cells"]:
    """RR of draws of samples, which are given as for :func:`draw_weights`. NaN where no drawn sample that has the cell
    has TE >= ``min_te``."""
    effects, places, numerator, denominator = draw_weights(te, ie, samples, replicates, min_te, eps, statistic)
    if statistic == "median":
        kept = denominator > 0
        ratios = (
            effects[at[keep]].mean(1) * weight[keep, None]
            for at, weight, keep in zip(places, numerator, kept, strict=True)
        )  # (n, C) each
        return np.stack([_median(r) if len(r) else np.full(effects.shape[1], np.nan) for r in ratios])
    with np.errstate(divide="ignore", invalid="ignore"):
        known = ~np.isnan(effects)
        if not known.all():
            above, below = (sum_by_place(places, weights, len(effects)) for weights in (numerator, denominator))
            return (above @ np.where(known, effects, 0)) / (below @ known)
        return sum_by_place(places, numerator, len(effects)) @ effects / denominator.sum(1)[:, None]


def _median(ratios: Float[np.ndarray, "samples cells"]) -> Float[np.ndarray, "cells"]:
    """The medians of the samples that have a cell; NaN if none has it."""
    if not np.isnan(ratios).any():
        return np.median(ratios, 0)
    return np.array([np.median(r[~np.isnan(r)]) if not np.isnan(r).all() else np.nan for r in ratios.T])


def estimate_with_variance(
    te: Float[np.ndarray, "samples replicates"],
    ie: Float[np.ndarray, "samples replicates cells"],
    samples: Int[np.ndarray, "draws drawn"],
    normalise: bool,
    **options: Any,
) -> tuple[Float[np.ndarray, "draws cells"], Float[np.ndarray, "draws cells"]]:
    """RR of draws of samples, and its squared standard error to first order.

    One sample moves an estimate by ``(numerator * IE - estimate * denominator) / sum(denominator)``. It moves a
    normalised estimate by ``(its move - the normalised estimate * the move of the largest) / the largest estimate``.

    Args:
        normalise: divide each draw's RR by its largest (equation 7).
        options: min_te, eps and statistic, as for :func:`rr`, but not "median".
    """
    effects, places, numerator, denominator = draw_weights(te, ie, samples, None, **options)
    linear, mixed, square = (
        sum_by_place(places, weights, len(effects)) for weights in (numerator, numerator * denominator, numerator**2)
    )
    total, squares = denominator.sum(1)[:, None], (denominator**2).sum(1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        value, mixed = linear @ effects / total, mixed @ effects
        variance = (square @ effects**2 - 2 * value * mixed + value**2 * squares) / total**2
        if not normalise:
            return value, variance
        peak = value.argmax(1)
        products = np.empty_like(value)  # of the IE of every cell and of the largest cell
        for cell in np.unique(peak):
            products[peak == cell] = square[peak == cell] @ (effects * effects[:, [cell]])
        peak_value, peak_mixed, peak_variance = (
            np.take_along_axis(array, peak[:, None], 1) for array in (value, mixed, variance)
        )
        covariance = (products - value * peak_mixed - peak_value * mixed + value * peak_value * squares) / total**2
        value = normalised(value, -1)
        return value, (variance + value**2 * peak_variance - 2 * value * covariance) / peak_value**2
