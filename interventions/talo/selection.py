"""TaLo's choice of a layer, how far it can be trusted, and task-layer interaction vectors (P3), in plain NumPy.

All of it works on a table of what the model gets right: ``base (N,)`` of N samples, and ``correct (L, N)`` with each of
L layers cut, bool. No model is run, so a thousand probe sets or null draws cost next to nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from interventions.statistics import percentiles
from vlm_jax.errors import UserError
from vlm_jax.runs.ranges import Range, check_ranges

Ties = Literal["first", "last", "more_samples", "median"]
Similarity = Literal["pearson", "cosine"]
#: The layer of a choice that leaves the model as it is.
BASE = -1


@dataclasses.dataclass(frozen=True)
class SelectOptions:
    """How a layer is chosen; the defaults are those of the paper's released code."""

    shot: Annotated[int, Range(least=1)] = 10
    """How many samples a layer is chosen on (the probe set). They come from a pool of up to 4 times as many."""
    ties: Ties = "first"
    """Which of several layers to take that gain equally: the first, the last or the middle one (median).
    more_samples: score them on more samples of the pool, half and then a quarter as many as --shot, then take the last
    (the older released script)."""
    layer_0: bool = False
    """Whether layer 0 may be cut too. The released code never tries it."""
    rounds: Annotated[int, Range(least=0)] = 5
    """How often a new, larger probe set is drawn where no layer gains. After that the model is left as it is."""

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

    def layers(self, depth: int) -> np.ndarray:
        """Those of ``depth`` layers that may be cut."""
        if depth == 1 and not self.layer_0:
            raise UserError("the model's only layer is layer 0, which is not tried: pass --layer-0")
        return np.arange(0 if self.layer_0 else 1, depth)


class Choice(NamedTuple):
    """A chosen layer (or ``BASE``), its gain in accuracy on the probe set, the indices of the pool and of the probe set
    that decided, and how often that was drawn anew because no layer gained."""

    layer: int
    gain: float
    pool: np.ndarray
    probe: np.ndarray
    rounds: int


def stratified(rng: np.random.Generator, among: np.ndarray, strata: np.ndarray, size: int) -> np.ndarray:
    """``size`` of the indices ``among``, of each stratum ``strata[index]`` as large a share as it has there, rounded at
    random; all of them where there are fewer."""
    among = rng.permutation(among)
    _, which, counts = np.unique(strata[among], return_inverse=True, return_counts=True)
    rank = np.empty(len(among))
    rank[np.argsort(which, kind="stable")] = np.concatenate([*map(np.arange, counts), []])
    # Every stratum is spread evenly over [0, 1) with a random offset, and the first ``size`` places are taken.
    return among[np.argsort((rank + rng.random(len(counts))[which]) / counts[which])[:size]]


def select(
    base: np.ndarray, correct: np.ndarray, strata: np.ndarray, how: SelectOptions, rng: np.random.Generator
) -> Choice:
    """One run of TaLo's procedure on the table ``base (N,)``, ``correct (L, N)`` with the strata ``(N,)``.

    Evaluate its choice on the samples outside of its pool, none of which it looks at.

    Raises:
        UserError: for fewer than three times ``how.shot`` samples.
    """
    count, delta = len(base), correct.astype(int) - base
    how.check(count)
    layers = how.layers(len(delta))
    pool = stratified(rng, np.arange(count), strata, min(count // 3, 4 * how.shot))
    unused = pool

    def draw(size: int) -> np.ndarray:
        nonlocal unused
        drawn = stratified(rng, unused, strata, size)
        unused = np.setdiff1d(unused, drawn)
        return drawn

    probe = draw(how.shot)
    if base[probe].all() and len(unused):  # nothing to gain there
        probe = draw(how.shot)
    for rounds in range(how.rounds + 1):
        gain = delta[layers][:, probe].sum(1)
        if gain.max() > 0:
            tied = layers[gain == gain.max()]
            for extra in (how.shot // 2, how.shot // 4) if how.ties == "more_samples" else ():
                if len(tied) > 1:
                    probe = np.concatenate([probe, draw(extra)])
                    gain = delta[tied][:, probe].sum(1)
                    tied = tied[gain == gain.max()]
            layer = tied[{"first": 0, "median": (len(tied) - 1) // 2}.get(how.ties, -1)]
            return Choice(int(layer), float(delta[layer, probe].mean()), pool, probe, rounds)
        if rounds == how.rounds or not len(unused):
            return Choice(BASE, 0.0, pool, probe, rounds)
        probe = draw(how.shot + rounds + 1)
    raise AssertionError("the last round returns")


def outside(count: int, choice: Choice) -> np.ndarray:
    """The eval set of a choice: the samples outside of its pool."""
    return np.setdiff1d(np.arange(count), choice.pool)


def gains(base: np.ndarray, correct: np.ndarray, layer: int) -> np.ndarray:
    """What cutting a layer gains on each sample ``(N,)``: 1, 0 or -1; nothing for ``BASE``."""
    return np.zeros(len(base)) if layer == BASE else correct[layer].astype(float) - base


def assess(
    base: np.ndarray, correct: np.ndarray, strata: np.ndarray, how: SelectOptions, draws: int, seed: int
) -> dict:
    """How far the procedure can be trusted, over ``draws`` runs of it, each with a pool and probe sets of its own.

    Every run is evaluated on a bootstrap resample of its own eval set, so the 95 % percentile intervals hold the chance
    of the probe set and that of the eval set.

    Returns:
        ``probe_gain``: mean gain on the samples that chose; ``held_out``: mean and interval of the gain on those that
        did not; ``random_layer``: the same of a random layer; ``over_random``: of the gain less what a random layer
        is expected to; ``chosen``: how often each was (``base``: none); ``stability``: how often the most frequent.
    """
    rng = np.random.default_rng(seed)
    strata = np.unique(strata, return_inverse=True)[1]  # numbers sort faster than names
    layers, runs = how.layers(len(correct)), []
    for _ in range(draws):
        choice = select(base, correct, strata, how, rng)
        rest = rng.choice(outside(len(base), choice), len(base) - len(choice.pool))
        held = gains(base, correct, choice.layer)[rest].mean()
        others = correct[layers][:, rest].mean(1) - base[rest].mean()
        runs.append((choice.layer, choice.gain, held, rng.choice(others), held - others.mean()))
    chosen, probe, held, random, over_random = np.array(runs).T
    values, counts = np.unique(chosen.astype(int), return_counts=True)
    return {
        "probe_gain": float(probe.mean()),
        "held_out": percentiles(held),
        "random_layer": percentiles(random),
        "over_random": percentiles(over_random),
        "stability": float(counts.max() / draws),
        "chosen": {layer_name(v): int(c) for v, c in zip(values, counts, strict=True)},
    }


def layer_name(layer: int) -> str:
    return "base" if layer == BASE else f"L{layer}"


def permuted(base: np.ndarray, correct: np.ndarray, layers: np.ndarray, draws: int, seed: int) -> dict:
    """Does any layer hurt? The permuted-label null, on all samples: in every sample the labels "base" and "cut" are
    swapped or not, for all layers alike, and the best layer is sought again.

    The statistic is McNemar's, ``(gained - lost) / sqrt(gained + lost)``, at its largest over the layers, so ``p``
    allows for the choice of the best of them.
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


def resampled_vectors(delta: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Interaction vectors ``(draws, L)`` of bootstrap resamples of the samples of ``delta (L, N)``."""
    count = delta.shape[1]
    return rng.multinomial(count, np.full(count, 1 / count), draws) @ delta.T / count


def similarity(vectors: np.ndarray, kind: Similarity = "pearson") -> np.ndarray:
    """``(T, T)`` correlations or cosines of the vectors ``(T, L)``; 0 with one that has no direction."""
    x = vectors - vectors.mean(1, keepdims=True) if kind == "pearson" else vectors
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.where(norm > 1e-9, x / np.maximum(norm, 1e-9), 0)
    matrix = np.clip(x @ x.T, -1, 1)
    np.fill_diagonal(matrix, 1)
    return matrix


def tree(matrix: np.ndarray) -> np.ndarray:
    """SciPy's linkage of tasks with the similarities ``(T, T)``: average linkage of 1 - similarity."""
    return linkage(squareform(1 - matrix, checks=False), "average")


def in_two(vectors: np.ndarray, kind: Similarity) -> np.ndarray:
    """``(T, T)`` bool: which tasks are in the same half of the tree."""
    if len(vectors) == 1:
        return np.ones((1, 1), bool)
    half = fcluster(tree(similarity(vectors, kind)), 2, "maxclust")
    return half[:, None] == half


def together(deltas: Sequence[np.ndarray], kind: Similarity, draws: int, seed: int) -> np.ndarray:
    """How often two tasks are in the same half of the tree ``(T, T)`` when every task's samples ``delta (L, N)`` are
    resampled."""
    rng = np.random.default_rng(seed)
    vectors = np.stack([resampled_vectors(delta, draws, rng) for delta in deltas], 1)
    return np.mean([in_two(drawn, kind) for drawn in vectors], 0)
