"""Adds something to values: a vector (steering), an array, Gaussian noise."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

from interventions.kinds.base import OnTokens, kind, option
from interventions.kinds.layers import Layers, slot_at
from vlm_jax.errors import UserError
from vlm_jax.sites import Context, token_axis
from vlm_jax.typing import ArrayLike


@kind
class Noise(OnTokens):
    """Adds Gaussian noise of standard deviation ``scale (B,)`` at a site outside of the layers (P0, equation 5).

    ``key (B, 2)`` uint32 is :func:`jax.random.key_data` of one key per row, so a row's noise does not depend on its
    batch. It needs ``where`` or ``group``. It does not change generated tokens.
    """

    key: UInt32[ArrayLike, "batch 2"]
    scale: Float[ArrayLike, "batch"]
    site: str = option(default="text.embeddings")

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, Any]:
        return {self.site: (self.scale != 0).any()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if ctx.decoding:
            return value
        if self.where is None:
            raise UserError("Noise must know its tokens: give where, or a group and bind it to a batch")
        shape = self.where.shape[1], value.shape[-1]
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.wrap_key_data(key), shape))(self.key)
        noise = ctx.tokens(noise * self.scale[:, None, None], value.shape[1])
        return self.only(site, value + noise.astype(value.dtype), value, ctx)


@kind
class Add(OnTokens):
    """Adds ``value`` at one site: a vector ``(..., D)`` at every token (steering), or an array ``(B, T, ..., D)`` at
    the tokens of the prompt, which does not change generated tokens. At a site of the layers, ``value`` has a leading
    axis of K slots, and ``slot (L,)`` is the slot that each layer uses."""

    value: Float[ArrayLike, "..."]
    site: str = option(default="text.embeddings")
    slot: Int[ArrayLike, "layers"] | Layers | None = None

    @classmethod
    def steer(
        cls,
        vector: Float[ArrayLike, "*chosen width"],
        layer: int | None = None,
        *,
        layers: Iterable[int] | None = None,
        site: str = "text.resid_post",
        strength: float = 1.0,
        **tokens,
    ) -> "Add":
        """Steering: adds ``strength`` times a vector at a site of the layers.

        Args:
            vector: ``(D,)``; or ``(K, D)``, one for each of K ``layers``.
            layer, layers: where, counted from the end if negative; all layers if neither is given.
            tokens: on which tokens (where, group, new); by default all, generated ones included.

        Raises:
            UserError: for ``layer`` beside ``layers``, or another number of vectors than of layers.
        """
        if layer is not None and layers is not None:
            raise UserError("layer and layers are both given: give one of them")
        if np.ndim(vector) not in (1, 2):
            raise UserError(f"a steering vector of shape {np.shape(vector)} is not possible: give (D,) or (K, D)")
        vectors = jnp.asarray(vector, jnp.float32).reshape(-1, np.shape(vector)[-1])
        chosen = layers if layer is None else [layer]
        return cls(strength * vectors, site, Layers.of(chosen, len(vectors)), **tokens)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, Any]:
        return {self.site: jnp.asarray(True) if self.slot is None else self.slot < len(self.value)}

    def tokens(self) -> jax.Array | None:
        added = self.value if self.slot is None else self.value.any(0)
        if self.where is not None or added.ndim < 3:
            return self.where
        changed = (added != 0).any(tuple(set(range(1, added.ndim)) - {token_axis(self.site)}))
        return changed | ~changed.any()  # gradients are taken at an array of zeros, so it acts on all tokens

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        added, used = self.value, True
        if self.slot is not None:
            slot, used = slot_at(self.slot, len(added), ctx)
            added = added[slot]
        if added.ndim == value.ndim:
            if ctx.decoding:
                return value
            added = ctx.tokens(added, value.shape[token_axis(site)], axis=token_axis(site))
        return self.only(site, jnp.where(used, value + added, value), value, ctx)
