"""Steering vectors: the direction in which activations of one set of prompts differ from those of another."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from interventions.kinds.groups import bind, label, tokens_of
from interventions.kinds.layers import numbered
from vlm_jax import Inputs, Model, Tap
from vlm_jax.acting import acting
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch
from vlm_jax.runs.processes import fetch
from vlm_jax.sites import Stage, stage, token_axis
from vlm_jax.typing import Array, ArrayLike


def difference_of_means(
    model: Model,
    batch_a: Batch,
    batch_b: Batch,
    site: str = "text.resid_post",
    layers: int | Iterable[int] | None = None,
    *,
    tokens: str = "last",
    interventions=(),
) -> Float[np.ndarray, "layers width"]:
    """The mean activation in one batch minus that in another: a vector for each layer, to steer with
    (:meth:`interventions.Add.steer`). A sample counts by the mean of its tokens, so long prompts do not weigh more.

    Args:
        batch_a, batch_b: encoded prompts (:func:`vlm_jax.prompts.encode`).
        site: a site of the decoder's layers with one vector for each token.
        layers: which of the layers, counted from the end if negative; None: all.
        tokens: the token group whose activations are compared.
        interventions: those that act on the model; token groups are bound to each batch.

    Raises:
        UserError: for a site without such vectors, a layer that the model lacks, or a row without a token of the group.
    """
    if stage(site) is not Stage.LAYERS or token_axis(site) != 1 or site == "text.deepstack":
        raise UserError(f"{site!r} has no vector for each token in every layer: use a site such as text.resid_post")
    chosen = tuple(numbered(layers, model.depths["text"]))
    means = []
    for name, batch in (("first", batch_a), ("second", batch_b)):
        where = tokens_of(tokens, label(batch))
        if not where.any(1).all():
            row = int(where.any(1).argmin())
            raise UserError(f"row {row} of the {name} batch has no token of the group {tokens!r}: choose another group")
        bound = acting(bind(interventions, batch), model.depths)
        means.append(fetch(_mean(model, batch.inputs, where, bound, site=site, layers=chosen)))
    return means[0] - means[1]


@functools.partial(jax.jit, static_argnames=("site", "layers"))
def _mean(
    model: Model, inputs: Inputs, where: Bool[ArrayLike, "batch tokens"], interventions, *, site: str, layers
) -> Float[Array, "layers width"]:
    """The mean over rows of each row's mean over its marked tokens."""
    weights = where / where.sum(1, keepdims=True) / len(where)

    def reduced(value: jax.Array) -> jax.Array:
        return jnp.einsum("bt,btd->d", weights, value.reshape(*value.shape[:2], -1).astype(jnp.float32))

    return model(inputs, interventions, {site: Tap(layers, reduced)}).taps[site]
