"""How close features come to what is known about the pictures: whether a relation holds.

The best direction that supervision finds in the same activations is the ceiling, and the best latent of random
dictionaries is the floor.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import mannwhitneyu

from interventions.dictionary import Dictionary
from interventions.diff.activations import Computed
from interventions.diff.crosscoder import Paired
from vlm_jax.runs.processes import progress

#: Tokens whose codes are computed together.
_CHUNK = 4096
#: Sets the seeds of random dictionaries apart from those with which trainings begin.
_RANDOM = 7_919
#: Strength of the penalty on the supervised direction's squared norm.
_PENALTY = 1.0


class Half(NamedTuple):
    """The activations of some questions about one relation, and whether it holds."""

    x: Float[np.ndarray, "samples width"]
    """Mean over the tokens of the text."""
    holds: Bool[np.ndarray, " samples"]


class Recall(NamedTuple):
    """AUROC on questions that selected nothing: how well one number tells whether a relation holds."""

    ceiling: float
    """Of logistic regression on the activations."""
    features: float | None
    """Of the best feature that passed every filter; None if there is none."""
    best: float
    """Of the best latent of the dictionary."""
    random: list[float]
    """Of the best latent of each random dictionary."""
    as_good: float
    """The share of random dictionaries that do as well as the trained one."""


class Rows(NamedTuple):
    """The tokens of a group in some examples."""

    x: Float[np.ndarray, "layers rows width"]
    example: Int32[np.ndarray, " rows"]
    """The number of the example of each row."""
    examples: int

    @classmethod
    def of(cls, source: Computed | Paired, tokens: str, label: str = "") -> "Rows":
        """The activations of a source with one site."""
        (site,), wanted, parts, numbers = source.options.sites, source.index.among(tokens), [], []
        for block in progress(range(len(source.blocks)), desc=f"read {label}".strip(), unit="block", leave=False):
            rows = source.index.block == block
            parts.append(source.read(block)[site][:, wanted[rows]])
            numbers.append(source.index.example[rows & wanted])
        return cls(np.concatenate(parts, 1), np.concatenate(numbers), len(source.examples))

    def mean(self, values: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "samples width"]:
        """The mean of the rows of each example."""
        sums = np.zeros((self.examples, values.shape[1]))
        np.add.at(sums, self.example, values)
        return sums / np.bincount(self.example, minlength=self.examples)[:, None]

    def mean_codes(self, dictionary: Dictionary, layer: int) -> Float[np.ndarray, "samples latents"]:
        """The mean codes of each example. ``layer`` is the number of the layer in ``x``."""
        sums = np.zeros((self.examples, dictionary.latents))
        for at in range(0, self.x.shape[1], _CHUNK):
            x, number = self.x[layer, at : at + _CHUNK], self.example[at : at + _CHUNK]
            short = _CHUNK - len(x)
            x, number = np.pad(x, [(0, short), (0, 0)]), np.pad(number, (0, short), constant_values=self.examples)
            sums += np.asarray(_summed_codes(dictionary, x, number, self.examples))
        return sums / np.bincount(self.example, minlength=self.examples)[:, None]


@functools.partial(jax.jit, static_argnames="examples")
def _summed_codes(dictionary: Dictionary, x: jax.Array, number: jax.Array, examples: int) -> jax.Array:
    """The sums of codes of each example. Rows of no example have the number ``examples``."""
    return jax.ops.segment_sum(dictionary.codes(x), number, examples + 1)[:examples]


def auroc(scores: Float[np.ndarray, " samples"], holds: Bool[np.ndarray, " samples"]) -> float:
    """The chance that a sample for which it holds has the larger score; ties count half."""
    positive, negative = scores[holds], scores[~holds]
    return float(mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))


def supervised(half: Half) -> Float[np.ndarray, " width"]:
    """The direction of a logistic regression with a penalty, on standardised activations, in their own units."""
    mean, spread = half.x.mean(0), half.x.std(0) + 1e-9
    x, sign = (half.x - mean) / spread, np.where(half.holds, 1.0, -1.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ weights[:-1] + weights[-1])
        value = np.logaddexp(0, -margin).sum() + _PENALTY / 2 * (weights[:-1] ** 2).sum()
        push = -sign * expit(-margin)
        return value, np.append(push @ x + _PENALTY * weights[:-1], push.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return found[:-1] / spread


def best_of(
    codes: tuple[Float[np.ndarray, "selecting latents"], Float[np.ndarray, "measuring latents"]],
    selecting: Half,
    measuring: Half,
    among: Sequence[int] | None = None,
) -> float | None:
    """The AUROC, on the half that measures, of the latent that is best on the half that selects; a latent may also tell
    that the relation does not hold. None if there is no latent.

    Args:
        codes: the latents' mean codes on both halves.
        among: only these latents; None: all.
    """
    latents = np.arange(codes[0].shape[1]) if among is None else np.asarray(sorted(set(among)), int)
    latents = latents[np.ptp(codes[0][:, latents], axis=0) > 0] if len(latents) else latents
    if not len(latents):
        return None
    scores = np.array([auroc(codes[0][:, latent], selecting.holds) for latent in latents])
    number = int(np.argmax(np.abs(scores - 0.5)))
    found = auroc(codes[1][:, latents[number]], measuring.holds)
    return found if scores[number] >= 0.5 else 1 - found


def random_dictionary(like: Dictionary, mean: Float[np.ndarray, " width"], seed: int) -> Dictionary:
    """A dictionary as it is before training, of the shape of another one."""
    rng = np.random.default_rng([_RANDOM, seed])
    decoder = rng.standard_normal((like.latents, like.width), np.float32)
    decoder /= np.linalg.norm(decoder, axis=-1, keepdims=True)
    return like.replace(W_enc=decoder.T, b_enc=-(mean @ decoder.T).astype(np.float32), W_dec=decoder, b_dec=mean)
