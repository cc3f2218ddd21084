"""Where ablated values come from: means of reference prompts, and other samples' values."""

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from interventions.kinds.ablation import Means
from interventions.kinds.groups import GROUPS, bind, label
from vlm_jax import Inputs, Model, Tap
from vlm_jax.acting import acting
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch
from vlm_jax.runs.processes import fetch
from vlm_jax.sites import Stage, stage, token_axis
from vlm_jax.typing import Array, ArrayLike

_PADDING = GROUPS.index("padding")


def reference_means(
    model: Model, batches: Iterable[tuple[Sequence[int], Batch]], sites: Sequence[str], interventions=()
) -> Means:
    """The mean values at some sites over all tokens of each token group, by layer.

    Args:
        batches: reference prompts, as :func:`vlm_jax.prompts.batches` yields them.
        sites: sites of the decoder's layers with a value for each token.
        interventions: those that act on the model; token groups are bound to each batch.

    Raises:
        UserError: for a site without a value for each token in every layer.
    """
    _check(sites)
    sums: dict[str, np.ndarray] = {}
    counts = np.zeros(len(GROUPS))
    for rows, batch in batches:
        labels = label(batch)
        labels[len(rows) :] = _PADDING  # rows that only fill the batch
        bound = acting(bind(interventions, batch), model.depths)
        found = fetch(_sums(model, batch.inputs, labels, bound, sites=tuple(sites)))
        sums = {site: sums.get(site, 0) + np.asarray(value, np.float64) for site, value in found.items()}
        counts += np.bincount(labels.ravel(), minlength=len(GROUPS))
    known = (counts > 0) & (np.arange(len(GROUPS)) != _PADDING)
    divisor = np.maximum(counts, 1)
    values = {
        site: (total / divisor.reshape(-1, *[1] * (total.ndim - 2))).astype(np.float32) for site, total in sums.items()
    }
    return Means(values, known)


def _check(sites: Sequence[str]) -> None:
    for site in sites:
        if stage(site) is not Stage.LAYERS or token_axis(site) != 1:
            raise UserError(f"{site!r} has no value for each token in every layer: use a site such as text.attn_out")


@functools.partial(jax.jit, static_argnames="sites")
def _sums(
    model: Model, inputs: Inputs, labels: Int[ArrayLike, "batch tokens"], interventions, *, sites: tuple[str, ...]
) -> dict[str, Float[Array, "layers groups ..."]]:
    groups = jax.nn.one_hot(labels, len(GROUPS))

    def summed(value: jax.Array) -> jax.Array:
        return jnp.einsum("btg,bt...->g...", groups, value.astype(jnp.float32))

    return model(inputs, interventions, dict.fromkeys(sites, Tap(reduce=summed))).taps


def resampled(
    model: Model, batch: Batch, donors: Batch, sites: Sequence[str], interventions=()
) -> dict[str, Float[np.ndarray, "layers batch tokens ..."]]:
    """For each token the value, in another sample's run, of a token of the same group: the donors of resample
    ablations. The i-th of n tokens of a group gets the value of the token that is as far into the donor's group. Tokens
    of a group that the donor lacks, and padding, get zeros; :func:`has_donor` tells which.

    Args:
        batch, donors: encoded samples; row ``i`` of ``donors`` is the donor of row ``i`` of ``batch``.
        interventions: those that act on the model.

    Raises:
        UserError: for a site without a value for each token in every layer.
    """
    _check(sites)
    bound = acting(bind(interventions, donors), model.depths)
    values = _values(model, donors.inputs, bound, sites=tuple(sites))
    index = _aligned(label(batch), label(donors))
    rows = np.arange(len(index))[:, None]
    return {
        site: fetch(jnp.where(_beside(index >= 0, value), value[:, rows, index], 0)) for site, value in values.items()
    }


def has_donor(batch: Batch, donors: Batch) -> Bool[np.ndarray, "batch tokens"]:
    """The tokens for which :func:`resampled` has another sample's value."""
    return _aligned(label(batch), label(donors)) >= 0


@functools.partial(jax.jit, static_argnames="sites")
def _values(model: Model, inputs: Inputs, interventions, *, sites: tuple[str, ...]) -> Mapping[str, jax.Array]:
    return model(inputs, interventions, sites).taps


def _beside(where: np.ndarray, value: jax.Array) -> np.ndarray:
    return where.reshape(1, *where.shape, *[1] * (value.ndim - 3))


def _aligned(
    labels: Int[np.ndarray, "batch tokens"], donors: Int[np.ndarray, "batch donor_tokens"]
) -> Int[np.ndarray, "batch tokens"]:
    """For each token the donor's token of the same group, as far into it; -1 where there is none."""
    index = np.full(labels.shape, -1)
    for row, (own, other) in enumerate(zip(labels, donors, strict=True)):
        for group in set(own.tolist()) - {_PADDING}:
            places, sources = np.flatnonzero(own == group), np.flatnonzero(other == group)
            if len(sources):
                index[row, places] = sources[np.arange(len(places)) * len(sources) // len(places)]
    return index
