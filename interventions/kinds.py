"""The kinds of intervention: small frozen pytrees on the protocol of :mod:`vlm_jax.sites`.

Where an intervention acts in the layers is an int32 **slot table** ``slot[site] (L,)``: the index of the slot that
layer uses, or the number of slots where it uses none. Slots are compact: what is not placed has no array.
"""

import flax.struct
import jax
import jax.numpy as jnp

from vlm_jax.sites import Context


@flax.struct.dataclass
class Add:
    """Adds ``value (B, T, D)`` at one site outside of the layers, such as noise to ``text.embeddings``.

    Generated tokens are left alone.
    """

    value: jax.Array
    site: str = flax.struct.field(pytree_node=False, default="text.embeddings")

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        return value if ctx.decoding else value + ctx.tokens(self.value, value)


@flax.struct.dataclass
class Patch:
    """Replaces the value at a site of a layer by a donor's, at every position (P0, section 2.2).

    ``donor[site] (K, B, T', ...)`` holds K slots of activations of the tokens from ``start`` on.
    Generated tokens are left alone.
    """

    donor: dict[str, jax.Array]
    slot: dict[str, jax.Array]
    start: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.donor)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if ctx.decoding:
            return value
        donor, slot = self.donor[site], self.slot[site][ctx.layer]
        here = jax.lax.dynamic_slice_in_dim(donor, ctx.start - self.start, value.shape[1], 2)
        return jnp.where(slot < len(donor), here[jnp.minimum(slot, len(donor) - 1)], value)


@flax.struct.dataclass
class LoRA:
    """Low-rank adapters: ``y + scale * dropout(x) @ A @ B`` at placed linears (Hu et al. 2022), on every token.

    ``weights[site] = (A (K, in, r), B (K, r, out))`` are the trainable arrays. Dropout (of the adapter's input, as
    PEFT does) happens only where a ``key`` is given.
    """

    weights: dict[str, tuple[jax.Array, jax.Array]]
    slot: dict[str, jax.Array]
    scale: jax.Array
    key: jax.Array | None = None
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        a, b = self.weights[site]
        slot = self.slot[site][ctx.layer]

        def delta(x):
            if self.key is not None and self.dropout:
                key = jax.random.fold_in(jax.random.fold_in(self.key, ctx.layer), sorted(self.weights).index(site))
                x = _drop(x, self.dropout, key)
            at = jnp.minimum(slot, len(a) - 1)
            flat = x.reshape(-1, x.shape[-1])
            return ((flat @ a[at]) @ b[at] * self.scale).reshape(value.shape).astype(value.dtype)

        if len(a) == len(self.slot[site]):  # every layer has one: nothing to decide
            return value + delta(ctx.input)
        return value + jax.lax.cond(slot < len(a), delta, lambda x: jnp.zeros_like(value), ctx.input)


def _drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout with one random byte per number, since random words cost more than a small model's layers: the rate is
    rounded to a multiple of 1 / 256 above 0 and below 1, and what is kept is scaled by the rounded rate."""
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    noise = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    dropped = min(max(round(rate * 256), 1), 255)
    return jnp.where(noise >= dropped, x * (256 / (256 - dropped)), 0)
