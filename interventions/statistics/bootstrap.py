"""The bootstrap: rows drawn with replacement, percentile intervals, and the interval of a mean."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from interventions.statistics.proportions import LEAST

#: How many numbers one chunk of draws may hold; it bounds the memory.
CHUNK_NUMBERS = 1_000_000


class Interval(NamedTuple):
    """An estimate and the bounds of its interval: three arrays of the same shape."""

    value: Float[np.ndarray, "*shape"]
    low: Float[np.ndarray, "*shape"]
    high: Float[np.ndarray, "*shape"]


def bootstrap_rows(
    count: int, draws: int, seed: int | Sequence[int], width: int = 1
) -> Iterator[Int[np.ndarray, "draws count"]]:
    """Row numbers drawn with replacement, ``(draws, count)`` in total, in chunks of draws.

    The random numbers are those of ``scipy.stats.bootstrap`` with ``rng=seed``. They do not depend on the chunks.

    Args:
        count: number of rows to draw from, and to draw.
        width: how many numbers the caller holds for each drawn row. It decides the size of the chunks.
    """
    rng = np.random.default_rng(seed)
    for size in chunk_sizes(draws, count * width):
        yield rng.integers(0, count, (size, count))


def chunk_sizes(draws: int, width: int) -> Iterator[int]:
    """Divides ``draws`` into chunks that hold at most :data:`CHUNK_NUMBERS` numbers, ``width`` for each draw."""
    size = max(1, CHUNK_NUMBERS // width)
    yield from (min(size, draws - done) for done in range(0, draws, size))


def sum_by_place(
    places: Int[np.ndarray, "_draws _samples replicates"], weights: Float[np.ndarray, "draws samples"], size: int
) -> Float[np.ndarray, "draws size"]:
    """Sums of the weights by their places, which are below ``size``. A weight is
    split equally between its R places."""
    draws, _, share = places.shape
    rows = np.arange(draws)[:, None, None] * size
    shared = np.broadcast_to(weights[..., None] / share, places.shape)
    return np.bincount((rows + places).ravel(), shared.ravel(), draws * size).reshape(draws, size)


def percentile_bounds(draws: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The percentiles over axis 0 between which ``level`` of the draws lie. NaN draws are left out; the
    percentiles are NaN where all draws are."""
    ends = [50 * (1 - level), 50 * (1 + level)]
    missing = np.isnan(draws)
    if not missing.any():
        low, high = np.percentile(draws, ends, axis=0)
        return low, high
    none = missing.all(0)
    low, high = np.nanpercentile(np.where(none, 0, draws), ends, axis=0)
    return np.where(none, np.nan, low), np.where(none, np.nan, high)


def percentiles(draws: np.ndarray) -> dict:
    """The mean of bootstrap draws over axis 0 and their 95 % percentile interval, as ``mean``, ``low`` and ``high`` for
    JSON."""
    return _as_json(Interval(draws.mean(0), *percentile_bounds(draws)))


def mean_interval(values: ArrayLike, seed: int = 0) -> dict:
    """The mean of ``values (N, ...)`` over samples and its 95 % percentile bootstrap interval, as ``mean``, ``low`` and
    ``high`` for JSON. NaN values are left out. The bounds are None where fewer than six values are known
    (:data:`.proportions.LEAST`)."""
    values = np.asarray(values, float)
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    filled, chunks = np.where(known, flat, 0), []
    with np.errstate(invalid="ignore"):
        for rows in bootstrap_rows(len(flat), 2000, seed):
            times_drawn = sum_by_place(rows[..., None], np.ones(rows.shape), len(flat))
            chunks.append(times_drawn @ filled / (times_drawn @ known))
        mean = filled.sum(0) / known.sum(0)
    enough = known.sum(0) >= LEAST
    interval = Interval(mean, *(np.where(enough, end, np.nan) for end in percentile_bounds(np.concatenate(chunks))))
    return _as_json(Interval(*(part.reshape(values.shape[1:]) for part in interval)))


def _as_json(interval: Interval) -> dict:
    ends = (_nested(end.tolist()) for end in (interval.low, interval.high))
    return {"mean": interval.value.tolist(), **dict(zip(("low", "high"), ends, strict=True))}


def _nested(value: Any) -> Any:
    """Nested lists with None in place of NaN, which JSON lacks."""
    if isinstance(value, list):
        return [_nested(part) for part in value]
    return None if np.isnan(value) else value
