"""Low-rank adapters of the decoder's linears."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from interventions.kinds.base import kind, option
from interventions.kinds.layers import slot_at
from vlm_jax.sites import TEXT_LINEARS, Context, Intervention
from vlm_jax.typing import Array, ArrayLike


@kind
class LoRA(Intervention):
    """Low-rank adapters: ``y + scale * dropout(x) @ A @ B`` at placed linears (Hu et al. 2022), on every token.

    ``weights[site] = (A (K, in, r), B (K, r, out))`` are the trainable arrays. With a ``key``, the adapter's input gets
    dropout, as in PEFT.
    """

    weights: dict[str, tuple[Float[ArrayLike, "slots inputs rank"], Float[ArrayLike, "slots rank outputs"]]]
    slot: dict[str, Int[ArrayLike, "layers"]]
    scale: Float[ArrayLike, ""]
    key: PRNGKeyArray | None = None
    dropout: float = option(default=0.0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def active(self) -> dict[str, jax.Array]:
        return {site: slot < len(self.weights[site][0]) for site, slot in self.slot.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        a, b = self.weights[site]
        slot, used = slot_at(self.slot[site], len(a), ctx)

        def delta(x):
            key = None if self.key is None else jax.random.fold_in(self.key, 0 if ctx.layer is None else ctx.layer)
            return low_rank(x, a[slot], b[slot], self.scale, site, key, self.dropout).astype(value.dtype)

        if len(a) == np.size(self.slot[site]):  # as many slots as layers: a branch would cost more than it saves
            return value + jnp.where(used, delta(ctx.input), 0)
        return value + jax.lax.cond(used, delta, lambda x: jnp.zeros_like(value), ctx.input)


def low_rank(
    x: Float[ArrayLike, "*rows inputs"],
    a: Float[ArrayLike, "inputs rank"],
    b: Float[ArrayLike, "rank outputs"],
    scale: Float[ArrayLike, ""],
    site: str,
    key: PRNGKeyArray | None,
    rate: float,
) -> Float[Array, "*rows outputs"]:
    """The output that LoRA adds to a linear's output: ``scale * dropout(x) @ a @ b``.

    Args:
        key: the layer's key, from which the key of the dropout at this ``site`` is derived; None: no dropout.
        rate: the probability that dropout sets a number to 0.
    """
    if key is not None and rate:
        x = _drop(x, rate, jax.random.fold_in(key, _LINEARS.index(site)))
    flat = x.reshape(-1, x.shape[-1])
    return ((flat @ a) @ b * scale).reshape(*x.shape[:-1], -1)


#: The linears that may have adapters. The index of a linear seeds its dropout, so it may not depend on the placement.
_LINEARS = sorted(f"text.{name}" for names in TEXT_LINEARS.values() for name in names)


def _drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout with one random byte per number, because random words cost more than a small model's layers. The rate is
    rounded to a multiple of 1 / 256 above 0 and below 1; the kept numbers are scaled by the rounded rate."""
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    noise = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    dropped = min(max(round(rate * 256), 1), 255)
    return jnp.where(noise >= dropped, x * (256 / (256 - dropped)), 0)
