"""TaLo's choice of a layer, how reliable it is, and task-layer interaction vectors (P3), in plain NumPy.

Everything is computed from a table of correct answers: ``base (N,)`` bool for N samples, and ``correct (L, N)`` bool
with each of L layers cut. No model is run, so thousands of probe sets or null draws take little time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int, Shaped

from interventions.statistics import exact_bound, percentiles
from vlm_jax.errors import UserError
from vlm_jax.runs.ranges import Range, check_ranges

Ties = Literal["first", "last", "more_samples", "median"]
Similarity = Literal["pearson", "cosine"]
#: Stands for "no layer" in a choice that leaves the model unchanged.
BASE = -1


@dataclasses.dataclass(frozen=True)
class SelectOptions:
    """How a layer is chosen; the defaults are those of the paper's released code."""

    shot: Annotated[int, Range(least=1)] = 10
    """How many samples a layer is chosen on (the probe set). They come from a pool of up to 4 times as many."""
    ties: Ties = "first"
    """Which layer to take if several gain equally: the first, the last or the middle one (median).
    more_samples: score them on more samples of the pool, half and then a quarter as many as --shot, then take the last
    (the older released script)."""
    layer_0: bool = False
    """Whether layer 0 may be cut too. The released code never tries it."""
    rounds: Annotated[int, Range(least=0)] = 5
    """How often a new, larger probe set is drawn if no layer gains. After that the model is left as it is."""

    def check(self, count: int) -> None:
        """Checks the options for a task of ``count`` samples.

        Raises:
            UserError: for a number outside its range, or too few samples.
        """
        check_ranges(self)
        if count < 3 * self.shot:
            raise UserError(
                f"{count} samples are too few for probe sets of {self.shot}, drawn from a third of them: "
                f"give at least {3 * self.shot}, or lower --shot"
            )

    def layers(self, depth: int) -> Int[np.ndarray, "tried"]:
        """The numbers of the layers, out of ``depth``, that may be cut."""
        if depth == 1 and not self.layer_0:
            raise UserError("the model's only layer is layer 0, which is not tried: pass --layer-0")
        return np.arange(0 if self.layer_0 else 1, depth)


class Choice(NamedTuple):
    """The result of :func:`select`."""

    layer: int
    """The chosen layer, or ``BASE``."""
    gain: float
    """Its gain in accuracy on the probe set."""
    pool: Int[np.ndarray, "pool"]
    """Sample numbers of the pool."""
    probe: Int[np.ndarray, "probe"]
    """Sample numbers of the last probe set, which decided."""
    rounds: int
    """How often a new probe set was drawn because no layer had a gain."""


def stratified(
    rng: np.random.Generator, among: Int[np.ndarray, "pool"], strata: Shaped[np.ndarray, "samples"], size: int
) -> Int[np.ndarray, "drawn"]:
    """A stratified random sample of ``size`` of the indices ``among``, or all of them if there are fewer.

    Each stratum, given by ``strata[index]``, keeps its share; fractions are rounded at random.
    """
    among = rng.permutation(among)
    _, stratum, counts = np.unique(strata[among], return_inverse=True, return_counts=True)
    rank = np.empty(len(among))
    rank[np.argsort(stratum, kind="stable")] = np.concatenate([*map(np.arange, counts), []])
    # The members of every stratum get evenly spaced positions in [0, 1) with a random offset. The ``size`` smallest
    # positions are taken.
    return among[np.argsort((rank + rng.random(len(counts))[stratum]) / counts[stratum])[:size]]


def select(
    base: Bool[np.ndarray, "samples"],
    correct: Bool[np.ndarray, "layers samples"],
    strata: Shaped[np.ndarray, "samples"],
    options: SelectOptions,
    rng: np.random.Generator,
) -> Choice:
    """One run of TaLo's procedure on a table of correct answers, whose samples are in ``strata``.

    It uses only the samples of its pool, so its choice can be evaluated on the others (:func:`outside`).

    Raises:
        UserError: for fewer than three times ``options.shot`` samples.
    """
    count, delta = len(base), correct.astype(int) - base
    options.check(count)
    layers = options.layers(len(delta))
    pool = stratified(rng, np.arange(count), strata, min(count // 3, 4 * options.shot))
    unused = pool

    def draw(size: int) -> np.ndarray:
        nonlocal unused
        drawn = stratified(rng, unused, strata, size)
        unused = np.setdiff1d(unused, drawn)
        return drawn

    probe = draw(options.shot)
    if base[probe].all() and len(unused):  # no layer can have a gain on this probe set
        probe = draw(options.shot)
    for rounds in range(options.rounds + 1):
        gain = delta[layers][:, probe].sum(1)
        if gain.max() > 0:
            tied = layers[gain == gain.max()]
            for extra in (options.shot // 2, options.shot // 4) if options.ties == "more_samples" else ():
                if len(tied) > 1:
                    probe = np.concatenate([probe, draw(extra)])
                    gain = delta[tied][:, probe].sum(1)
                    tied = tied[gain == gain.max()]
            layer = tied[{"first": 0, "median": (len(tied) - 1) // 2}.get(options.ties, -1)]
            return Choice(int(layer), float(delta[layer, probe].mean()), pool, probe, rounds)
        if rounds == options.rounds or not len(unused):
            return Choice(BASE, 0.0, pool, probe, rounds)
        probe = draw(options.shot + rounds + 1)
    raise AssertionError("the last round returns")


def outside(count: int, choice: Choice) -> Int[np.ndarray, "evaluated"]:
    """The eval set of a choice: the numbers of the samples outside its pool."""
    return np.setdiff1d(np.arange(count), choice.pool)


def gains(
    base: Bool[np.ndarray, "samples"], correct: Bool[np.ndarray, "layers samples"], layer: int
) -> Float[np.ndarray, "samples"]:
    """The gain from cutting a layer on each sample: 1, 0 or -1; 0 for ``BASE``."""
    return np.zeros(len(base)) if layer == BASE else correct[layer].astype(float) - base


def assess(
    base: Bool[np.ndarray, "samples"],
    correct: Bool[np.ndarray, "layers samples"],
    strata: Shaped[np.ndarray, "samples"],
    options: SelectOptions,
    draws: int,
    seed: int,
) -> dict:
    """How reliable the procedure is, from ``draws`` runs of it, each with a pool and probe sets of its own.

    Every run is evaluated on a bootstrap resample of its eval set. So the 95 % percentile intervals cover the
    chance of the probe set and of the eval set.

    Returns:
        ``probe_gain``: mean gain on the probe sets. ``held_out``: mean and interval of the gain on the eval sets.
        ``random_layer``: the same for a random layer. ``over_random``: the gain on the eval sets minus the expected
        gain of a random layer. ``chosen``: how often each layer was chosen (``base``: none). ``stability``: the share
        of the most frequent choice.
    """
    rng = np.random.default_rng(seed)
    strata = np.unique(strata, return_inverse=True)[1]  # numbers sort faster than names
    layers, runs = options.layers(len(correct)), []
    for _ in range(draws):
        choice = select(base, correct, strata, options, rng)
        rest = rng.choice(outside(len(base), choice), len(base) - len(choice.pool))
        held = gains(base, correct, choice.layer)[rest].mean()
        others = correct[layers][:, rest].mean(1) - base[rest].mean()
        runs.append((choice.layer, choice.gain, held, rng.choice(others), held - others.mean()))
    chosen, probe, held, random, over_random = np.array(runs).T
    values, counts = np.unique(chosen.astype(int), return_counts=True)
    # If no run cuts a layer, the gain is 0, and nothing is uncertain.
    evaluated = None if (chosen == BASE).all() else len(rest)
    return {
        "probe_gain": float(probe.mean()),
        "held_out": _spread(held, evaluated),
        "random_layer": _spread(random, evaluated),
        "over_random": _spread(over_random, evaluated),
        "stability": float(counts.max() / draws),
        "chosen": {layer_name(v): int(c) for v, c in zip(values, counts, strict=True)},
    }


def _spread(gains: Float[np.ndarray, "runs"], evaluated: int | None) -> dict:
    """Mean and percentiles of the runs' gains. If all are equal, no sample of the eval set changed; the interval then
    reaches as far as ``evaluated`` samples without a change allow."""
    found = percentiles(gains)
    if evaluated is not None and found["low"] == found["high"]:
        bound = exact_bound(0, evaluated)
        found |= {"low": max(found["low"] - bound, -1.0), "high": min(found["high"] + bound, 1.0)}
    return found


def layer_name(layer: int) -> str:
    """The name of a choice: "base" or, say, "L3"."""
    return "base" if layer == BASE else f"L{layer}"


def permuted(
    base: Bool[np.ndarray, "samples"],
    correct: Bool[np.ndarray, "layers samples"],
    layers: Int[np.ndarray, "tried"],
    draws: int,
    seed: int,
) -> dict:
    """Does any layer hurt the task? A permutation test on all samples.

    In each draw the labels "base" and "cut" of every sample are swapped with probability 1/2, for all layers alike. The
    statistic is the largest over the layers of McNemar's ``(gained - lost) / sqrt(gained + lost)``, so ``p`` accounts
    for the choice of the best layer.

    Returns:
        The best ``layer``, the number of samples that it ``gained`` and ``lost``, its mean gain ``delta``, and ``p``.
    """
    delta = (correct.astype(float) - base)[layers]
    scale = np.sqrt(np.maximum((delta != 0).sum(1), 1))
    z = delta.sum(1) / scale
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(base)))
    null = (signs @ delta.T / scale).max(1)
    best = int(z.argmax())
    return {
        "layer": int(layers[best]),
        "gained": int((delta[best] > 0).sum()),
        "lost": int((delta[best] < 0).sum()),
        "delta": float(delta[best].mean()),
        "p": float((1 + (null >= z[best] - 1e-9).sum()) / (1 + draws)),
    }


# Task-layer interaction vectors.


def resampled_vectors(
    delta: Float[np.ndarray, "layers samples"], draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws layers"]:
    """Interaction vectors of bootstrap resamples of the samples of ``delta``."""
    count = delta.shape[1]
    return rng.multinomial(count, np.full(count, 1 / count), draws) @ delta.T / count


def similarity(
    vectors: Float[np.ndarray, "tasks layers"], kind: Similarity = "pearson"
) -> Float[np.ndarray, "tasks tasks"]:
    """Correlations or cosines of the vectors; 0 where a vector has length 0."""
    x = vectors - vectors.mean(1, keepdims=True) if kind == "pearson" else vectors
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.where(norm > 1e-9, x / np.maximum(norm, 1e-9), 0)
    matrix = np.clip(x @ x.T, -1, 1)
    np.fill_diagonal(matrix, 1)
    return matrix


def tree(matrix: Float[np.ndarray, "tasks tasks"]) -> Float[np.ndarray, "merges 4"]:
    """SciPy's linkage matrix of tasks with these similarities: average linkage of 1 - similarity."""
    return scipy.cluster.hierarchy.linkage(scipy.spatial.distance.squareform(1 - matrix, checks=False), "average")


def in_two(vectors: Float[np.ndarray, "tasks layers"], kind: Similarity) -> Bool[np.ndarray, "tasks tasks"]:
    """Whether two tasks are in the same one of the tree's two main branches."""
    if len(vectors) == 1:
        return np.ones((1, 1), bool)
    half = scipy.cluster.hierarchy.fcluster(tree(similarity(vectors, kind)), 2, "maxclust")
    return half[:, None] == half


def together(
    deltas: Sequence[Float[np.ndarray, "layers _samples"]], kind: Similarity, draws: int, seed: int
) -> Float[np.ndarray, "tasks tasks"]:
    """The share of bootstrap resamples in which two tasks are in the same main branch of the tree.

    Args:
        deltas: for each task the gains of its samples, which are resampled.
    """
    rng = np.random.default_rng(seed)
    vectors = np.stack([resampled_vectors(delta, draws, rng) for delta in deltas], 1)
    return np.mean([in_two(drawn, kind) for drawn in vectors], 0)
