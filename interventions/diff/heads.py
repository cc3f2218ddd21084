"""Which attention heads drive a feature: attribution patching, and exact patching to check it (P2).

A feature's activation is read linearly, as in P2: ``L = sum_t <h_t, d>`` over the text behind the image, where h is the
residual stream at the feature's layer and d its decoder row. The clean run sees the picture; in the corrupt run all
image embeddings are one mean embedding. In a model with DeepStack that run still gets the picture's features behind its
first layers, so there the scores are those of the embeddings alone.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Bool, Float

from interventions.engine.grids import patch_grid
from interventions.engine.read import Projections
from interventions.engine.sweep import sweep_runs
from interventions.kinds.add import Add
from interventions.kinds.groups import GROUPS, bind, label, members
from interventions.kinds.patch import Replace
from interventions.kinds.up_to import up_to
from vlm_jax import Inputs, Model
from vlm_jax.acting import acting
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.sites import Intervention

_HEADS, _EMBEDDINGS = "text.head_out", "text.embeddings"
#: A: the clean run's gradient. B: the corrupt run's.
Direction = Literal["A", "B"]
_LENGTH_STEP = 32


class Scores(NamedTuple):
    """The effect of each head on each feature, mean over samples; positive where the picture makes a head raise it."""

    signed: Float[np.ndarray, "features layers heads"]
    """Attribution patching, summed over tokens."""
    absolute: Float[np.ndarray, "features layers heads"]
    """The same with the absolute value of every token, as in P2's code, mean over tokens. It has no sign."""
    exact: Float[np.ndarray, "features layers heads"]
    """The change of L when only this head's output is the corrupt run's, with the opposite sign."""


class Agreement(NamedTuple):
    """How well attribution agrees with exact patching, for one feature."""

    rank: float
    """Spearman's correlation of the signed scores over all heads."""
    absolute_rank: float
    """The same of P2's absolute scores with the size of the exact effect."""
    first_five: float
    """The share of the five heads with the largest exact effect that are among the five largest signed scores."""


def mean_image_embedding(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    batch: int = 32,
    *,
    base: Sequence[Intervention] = (),
) -> Float[np.ndarray, " width"]:
    """The mean embedding of all image tokens of some examples."""
    total, count = 0.0, 0
    for rows, encoded in batches(examples, processor, model.config, batch, with_answer=False):
        image = _of_group(encoded, "image")
        image[len(rows) :] = False
        embeddings = np.asarray(_embeddings(model, encoded.inputs, acting(bind(base, encoded), model.depths)))
        total, count = total + embeddings[image].sum(0, dtype=np.float64), count + image.sum()
    if not count:
        raise UserError("no example has an image, so there is no mean image embedding: give examples with images")
    return np.asarray(total / count, np.float32)


@jax.jit
def _embeddings(
    model: Model, inputs: Inputs, base: tuple[Intervention, ...] = ()
) -> Float[Array, "batch tokens width"]:
    return model.embed(inputs, base)[0].x


def head_scores(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    directions: Float[np.ndarray, "features width"],
    layer: int,
    mean_image: Float[np.ndarray, " width"],
    *,
    at: Direction = "A",
    steps: int = 1,
    base: Sequence[Intervention] = (),
    batch: int = 8,
    label: str = "",
) -> Scores:
    """The scores of all heads up to ``layer`` for features of that layer.

    Args:
        directions: their decoder rows.
        at: where the gradient is taken: in the clean run (A) or in the corrupt run (B).
        steps: with more than one, gradients are averaged over runs whose image embeddings lie between those of the two
            runs (integrated gradients); ``at`` then makes no difference.
        base: interventions that act in every run.
    """
    short = model.up_to(layer + 1)
    sums: list[Any] = [0.0, 0.0, 0.0]
    with progress(total=len(examples), desc=f"heads {label}".strip(), unit="sample", leave=False) as bar:
        for rows, encoded in batches(examples, processor, model.config, batch, step=_LENGTH_STEP, with_answer=False):
            text, image = _of_group(encoded, "text"), _of_group(encoded, "image")
            weight = (np.arange(len(text)) < len(rows)).astype(np.float32)
            where = text & (weight > 0)[:, None]
            always = up_to(acting(bind(base, encoded), model.depths), layer + 1)
            corrupt = Replace(mean_image, _EMBEDDINGS, where=image)
            inputs, shares = encoded.inputs, _shares(at, steps)
            attributed = fetch(_attribution(short, inputs, always, mean_image, image, where, directions, shares))
            read = Projections.of(directions, text)
            grid, shape = patch_grid([_HEADS], layer + 1, heads=model.config.text.num_attention_heads, tokens=[text])
            runs = fetch(sweep_runs(short, inputs, grid, read, base=always, clean=(*always, corrupt)))
            change = (runs.base - runs.variants) * weight[:, None]  # (N, B, features)
            exact = change.sum(1).T.reshape(len(directions), *shape[1:3])
            for number, part in enumerate((*attributed, exact)):
                sums[number] = sums[number] + np.asarray(part, np.float64)
            bar.update(len(rows))
    return Scores(*(np.asarray(part) / len(examples) for part in sums))


def _shares(at: Direction, steps: int) -> Float[np.ndarray, " runs"]:
    """How corrupt the runs are in which gradients are taken; 0 is the clean run and 1 the corrupt one."""
    return (np.arange(steps, dtype=np.float32) + 0.5) / steps if steps > 1 else np.array([at == "B"], np.float32)


@jax.jit
def _attribution(
    model: Model,
    inputs: Inputs,
    base: tuple[Intervention, ...],
    mean_image: Float[Array, " width"],
    image: Bool[Array, "batch tokens"],
    where: Bool[Array, "batch tokens"],
    directions: Float[Array, "features width"],
    shares: Float[Array, " runs"],
) -> tuple[Float[Array, "features layers heads"], Float[Array, "features layers heads"]]:
    """The signed and the absolute scores, summed over the batch. The model ends at the features' layer."""
    depth = model.config.text.num_hidden_layers
    embeddings = model.embed(inputs, base)[0].x
    away = jnp.where(image[..., None], mean_image - embeddings, 0)

    def heads(share):
        return model(inputs, [*base, Add(share * away, _EMBEDDINGS)], taps={_HEADS: None}).taps[_HEADS]

    difference = heads(jnp.float32(0)) - heads(jnp.float32(1))  # clean minus corrupt, (L, B, T, H, d)

    def read(zeros, share):
        interventions = [*base, Add(share * away, _EMBEDDINGS), Add(zeros, _HEADS, jnp.arange(depth))]
        x, _ = model.hidden(inputs, interventions)
        return jnp.einsum("btd,bt,nd->n", x, where.astype(x.dtype), directions)

    def gradient(share):
        _, pull = jax.vjp(lambda zeros: read(zeros, share), jnp.zeros_like(difference))
        return jax.lax.map(lambda one: pull(one)[0], jnp.eye(len(directions)))

    gradients = jax.lax.map(gradient, shares).mean(0)  # (features, L, B, T, H, d)
    by_token = (gradients * difference).sum(-1) * where[None, None, :, :, None]
    count = jnp.maximum(where.sum(-1), 1)[None, None, :, None, None]
    return by_token.sum((2, 3)), (jnp.abs(by_token) / count).sum((2, 3))


def agreement(scores: Scores) -> list[Agreement]:
    """How well attribution agrees with exact patching, feature by feature."""
    found = []
    for signed, absolute, exact in zip(*scores, strict=True):
        signed, absolute, exact = (part.ravel() for part in (signed, absolute, exact))
        five = min(5, len(exact))
        largest = [set(np.argsort(-np.abs(part), kind="stable")[:five].tolist()) for part in (signed, exact)]
        shared = len(largest[0] & largest[1]) / five
        found.append(Agreement(_rank(signed, exact), _rank(absolute, np.abs(exact)), shared))
    return found


def _rank(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's correlation; NaN if one of the two is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(scipy.stats.rankdata(a), scipy.stats.rankdata(b))[0, 1])


def _of_group(batch: Batch, group: str) -> Bool[np.ndarray, "batch tokens"]:
    return np.isin(label(batch), members(group)) & (label(batch) != GROUPS.index("padding"))
