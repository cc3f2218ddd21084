"""Several adapters with weights, as one."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from interventions.kinds.lora import LoRA
from vlm_jax.errors import UserError
from vlm_jax.sites import layered


def combine(loras: Sequence[LoRA], weights: Sequence[float], how: Literal["cat", "linear"] = "cat") -> LoRA:
    """The adapter that adds the weighted sum of what the adapters add, as PEFT's ``add_weighted_adapter`` makes it.

    Args:
        weights: one for each adapter; they may be negative.
        how: "cat" puts the matrices of the adapters side by side, which is exact: the new rank is the sum of their
            ranks. "linear" adds up their A and their B, each times the root of the weight and of the scale. This keeps
            the rank, but the product of the sums has mixed terms, so it is another function.

    Raises:
        UserError: for no adapter, DoRA, another number of weights, or with "linear" for other ranks.
    """
    if not loras or len(weights) != len(loras):
        raise UserError(f"{len(loras)} adapters got {len(weights)} weights: give each adapter one")
    if any(lora.magnitude is not None for lora in loras):
        raise UserError("DoRA scales whole kernels, so it has no weighted sum: merge the adapters one after the other")
    ranks = [next(iter(lora.weights.values()))[0].shape[-1] for lora in loras]
    if how == "linear" and len(set(ranks)) > 1:
        raise UserError(f"adapters of the ranks {', '.join(map(str, ranks))} have no linear combination: use 'cat'")
    factors = [float(weight) * float(lora.scale) for weight, lora in zip(weights, loras, strict=True)]
    new, slot = {}, {}
    for site in sorted(set().union(*(lora.weights for lora in loras))):
        tables = {i: np.atleast_1d(np.asarray(lora.slot[site])) for i, lora in enumerate(loras) if site in lora.slot}
        count = len(next(iter(tables.values())))
        used = {i: table < len(loras[i].weights[site][0]) for i, table in tables.items()}
        layers = np.flatnonzero(np.any(list(used.values()), 0))
        halves = []
        for i in tables:
            # Zeros where this adapter is on no linear of the layer.
            rows = [np.where(used[i], tables[i], -1)[layer] for layer in layers]
            a, b = (
                jnp.stack([half[row] if row >= 0 else jnp.zeros(half.shape[1:]) for row in rows])
                for half in loras[i].weights[site]
            )
            root = math.sqrt(abs(factors[i]))
            halves.append((math.copysign(root, factors[i]) * a, root * b) if how == "linear" else (factors[i] * a, b))
        new[site] = _together(halves, how, sum(ranks) if how == "cat" else ranks[0])
        table = np.full(count, len(layers), np.int32)
        table[layers] = np.arange(len(layers))
        slot[site] = jnp.asarray(table if layered(site) else table[0])
    return LoRA(new, slot, jnp.float32(1), dropout=max(lora.dropout for lora in loras))


def _together(
    halves: Sequence[tuple[jax.Array, jax.Array]], how: Literal["cat", "linear"], rank: int
) -> tuple[jax.Array, jax.Array]:
    """A ``(K, in, rank)`` and B ``(K, rank, out)`` of one linear."""
    if how == "linear":
        return functools.reduce(jnp.add, [a for a, _ in halves]), functools.reduce(jnp.add, [b for _, b in halves])
    a, b = jnp.concatenate([a for a, _ in halves], -1), jnp.concatenate([b for _, b in halves], -2)
    missing = rank - a.shape[-1]
    return jnp.pad(a, [(0, 0), (0, 0), (0, missing)]), jnp.pad(b, [(0, 0), (0, missing), (0, 0)])
