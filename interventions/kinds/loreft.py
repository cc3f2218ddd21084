"""Low-rank representation editors."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from interventions.kinds.base import OnTokens, kind, slot_at
from vlm_jax.sites import Context
from vlm_jax.typing import ArrayLike


@kind
class LoReFT(OnTokens):
    """Low-rank linear representation editors: ``h + (W h + b - U h) U^T`` (Wu et al. 2024; P4, equation 1).

    ``weights[site] = (R (K, D, r), W (K, D, r), b (K, r))`` are the trainable arrays; U^T is the orthonormal factor of
    R, its signs fixed, so that U stays orthonormal through training.
    """

    weights: dict[
        str,
        tuple[
            Float[ArrayLike, "slots width rank"], Float[ArrayLike, "slots width rank"], Float[ArrayLike, "slots rank"]
        ],
    ]
    slot: dict[str, Int[ArrayLike, "*layers"]]

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def active(self) -> dict[str, jax.Array]:
        return {site: slot < len(self.weights[site][0]) for site, slot in self.slot.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        r, w, b = self.weights[site]
        slot, used = slot_at(self.slot[site], len(r), ctx)
        u, upper = jnp.linalg.qr(r[slot].astype(jnp.float32))
        u = (u * jnp.where(jnp.diagonal(upper) < 0, -1, 1)).astype(value.dtype)
        edited = value + (value @ w[slot] + b[slot] - value @ u) @ u.T
        return self.only(site, jnp.where(used, edited, value), value, ctx)
