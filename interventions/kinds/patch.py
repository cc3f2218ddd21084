"""Replaces values by those of another run (patching) or by a fixed vector."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from interventions.kinds.base import OnTokens, beside_heads, beside_tokens, kind, option
from interventions.kinds.layers import Layers, sized_slots, slot_at
from vlm_jax.errors import UserError
from vlm_jax.sites import Context, Intervention, token_axis
from vlm_jax.typing import ArrayLike


@kind
class Patch(Intervention):
    """Replaces values by those of another run, the donor: causal patching (P0, section 2.2).

    ``donor[site] (K, B, T', ...)`` holds K slots of values of the tokens from ``start`` on. A donor of None counts as
    one slot: a sweep fills it with the clean run's value of the same layer. ``where (B, T)`` and ``heads (H,)``, both
    bool, restrict the patch to some tokens and heads. It does not change generated tokens.
    """

    donor: dict[str, Float[ArrayLike, "slots batch ..."] | None]
    slot: dict[str, Int[ArrayLike, "*layers"] | Layers]
    where: Bool[ArrayLike, "batch tokens"] | None = None
    heads: Bool[ArrayLike, "heads"] | None = None
    start: int = option(default=0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.donor)

    @property
    def missing(self) -> frozenset[str]:
        """The sites without a donor: a sweep takes the clean run's values there."""
        return frozenset(site for site, donor in self.donor.items() if donor is None)

    def filled(self, values: dict[str, jax.Array]) -> "Patch":
        """A copy whose missing donors are these values of every layer, site -> ``(L, B, T, ...)``."""
        depths = {site: len(values[site]) for site in self.missing}
        slot = {site: jnp.where(self.slot[site] == 0, jnp.arange(n), n) for site, n in depths.items()}
        return self.replace(donor=self.donor | {site: values[site] for site in depths}, slot=self.slot | slot)

    def active(self) -> dict[str, Any]:
        any_head = True if self.heads is None else self.heads.any()
        return {site: (slot < self._count(site)) & any_head for site, slot in self.slot.items()}

    def _count(self, site: str) -> int:
        donor = self.donor[site]
        return 1 if donor is None else len(donor)

    def tokens(self) -> jax.Array | None:
        return self.where

    def sized(self, depths: Mapping[str, int]) -> Intervention:
        return sized_slots(self, depths)

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
            patched = jax.lax.dynamic_slice_in_dim(donor[slot], ctx.start - self.start, value.shape[axis], axis)
        elif ctx.donors is not None:
            patched = ctx.donors[site]
        else:
            raise UserError(f"Patch has no donor at {site!r}: give its values, or sweep it beside a clean run")
        if self.where is not None:
            used = used & beside_tokens(ctx.tokens(self.where, value.shape[axis]), site, value.ndim)
        if self.heads is not None:
            used = used & beside_heads(self.heads, site, value.ndim)
        return jnp.where(used, patched, value)


@kind
class Replace(OnTokens):
    """Replaces values by a vector ``value (..., D)``, such as a mean image embedding (P2). At a site of the layers,
    ``value`` has a leading axis of K slots, and ``slot (L,)`` is the slot that each layer uses."""

    value: Float[ArrayLike, "..."]
    site: str = option(default="text.embeddings")
    slot: Int[ArrayLike, "layers"] | Layers | None = None

    @classmethod
    def by(
        cls,
        vector: Float[ArrayLike, "..."],
        layers: int | Iterable[int] | None = None,
        *,
        site: str = "text.resid_post",
        **tokens,
    ) -> "Replace":
        """Replaces values at a site of some layers (None: all) by one vector ``(..., D)``. ``tokens``: where, group,
        new."""
        return cls(jnp.asarray(vector)[None], site, Layers.of(layers), **tokens)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, Any]:
        return {self.site: jnp.asarray(True) if self.slot is None else self.slot < len(self.value)}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        vector, used = self.value, True
        if self.slot is not None:
            slot, used = slot_at(self.slot, len(vector), ctx)
            vector = vector[slot]
        return self.only(site, jnp.where(used, vector.astype(value.dtype), value), value, ctx)
