"""Puts other values in the place of values: another run's (patching), or a fixed vector."""

import flax.struct
import jax
import jax.numpy as jnp

from interventions.kinds.base import OnTokens, beside_heads, beside_tokens, option, slot_at
from vlm_jax.errors import UserError
from vlm_jax.sites import Context, token_axis


@flax.struct.dataclass
class Patch:
    """Replaces values by a donor's: causal patching (P0, section 2.2).

    ``donor[site] (K, B, T', ...)`` holds K slots of values of the tokens from ``start`` on; None is one slot that a
    sweep fills with its clean run's value of the same layer. ``heads (H,)`` bool keeps to some heads, at sites that
    have them. Generated tokens are left alone.
    """

    donor: dict[str, jax.Array | None]
    slot: dict[str, jax.Array]
    where: jax.Array | None = None
    heads: jax.Array | None = None
    start: int = option(0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.donor)

    @property
    def missing(self) -> frozenset[str]:
        """The sites whose donor is a sweep's clean run."""
        return frozenset(site for site, donor in self.donor.items() if donor is None)

    def filled(self, values: dict[str, jax.Array]) -> "Patch":
        """With the missing donors taken from the values of every layer ``(L, B, T, ...)``."""
        depth = {site: len(values[site]) for site in self.missing}
        slot = {site: jnp.where(self.slot[site] == 0, jnp.arange(n), n) for site, n in depth.items()}
        return self.replace(donor=self.donor | {site: values[site] for site in depth}, slot=self.slot | slot)

    def active(self) -> dict[str, jax.Array]:
        some = True if self.heads is None else self.heads.any()
        return {site: (slot < self._count(site)) & some for site, slot in self.slot.items()}

    def _count(self, site: str) -> int:
        return 1 if self.donor[site] is None else len(self.donor[site])

    def tokens(self) -> jax.Array | None:
        return self.where

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if ctx.decoding:
            return value
        donor, axis = self.donor[site], token_axis(site)
        slot, used = slot_at(self.slot[site], self._count(site), ctx)
        if donor is not None:
            begin, end = self.start, self.start + donor.shape[axis + 1]
            if ctx.start < begin or ctx.start + value.shape[axis] != end:
                raise UserError(
                    f"Patch holds a donor's tokens {begin} to {end} at {site!r}, but the run has "
                    f"{ctx.start} to {ctx.start + value.shape[axis]}: give values of a prompt of this shape"
                )
            here = jax.lax.dynamic_slice_in_dim(donor[slot], ctx.start - self.start, value.shape[axis], axis)
        elif ctx.donors is not None:
            here = ctx.donors[site]
        else:
            raise UserError(f"Patch has no donor at {site!r}: give its values, or sweep it beside a clean run")
        if self.where is not None:
            used = used & beside_tokens(ctx.tokens(self.where, value.shape[axis]), site, value.ndim)
        if self.heads is not None:
            used = used & beside_heads(self.heads, site, value.ndim)
        return jnp.where(used, here, value)


@flax.struct.dataclass
class Replace(OnTokens):
    """Puts a vector ``value (..., D)`` in the place of values, such as a mean image embedding (P2). In layers it has K
    slots in front and a ``slot (L,)``."""

    value: jax.Array
    site: str = option("text.embeddings")
    slot: jax.Array | None = None

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: jnp.asarray(True) if self.slot is None else self.slot < len(self.value)}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        put, used = self.value, True
        if self.slot is not None:
            slot, used = slot_at(self.slot, len(put), ctx)
            put = put[slot]
        return self.only(site, jnp.where(used, put.astype(value.dtype), value), value, ctx)
