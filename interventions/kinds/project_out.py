"""Removes directions from values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from interventions.kinds.base import OnTokens, kind
from interventions.kinds.layers import Layers, slot_at
from vlm_jax.errors import UserError
from vlm_jax.sites import Context
from vlm_jax.typing import ArrayLike


@kind
class ProjectOut(OnTokens):
    """Removes directions: ``y - (y V^T) V`` with K slots of R orthonormal rows ``directions (K, R, D)`` (P2)."""

    directions: Float[ArrayLike, "slots rank width"]
    slot: dict[str, Int[ArrayLike, "*layers"] | Layers]

    @classmethod
    def of(cls, vectors: Float[ArrayLike, "slots rank width"], slot: dict[str, Any], **tokens: Any) -> "ProjectOut":
        """From any vectors: each slot removes the span of its R vectors."""
        _, singular, rows = np.linalg.svd(np.asarray(vectors, np.float64), full_matrices=False)
        is_direction = singular > 1e-6 * singular.max(-1, keepdims=True)
        if not is_direction.any(-1).all():
            raise UserError("ProjectOut has a slot whose vectors are all zero: they span no direction")
        return cls((rows * is_direction[..., None]).astype(np.float32), slot, **tokens)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.slot)

    def active(self) -> dict[str, Any]:
        return {site: slot < len(self.directions) for site, slot in self.slot.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        slot, used = slot_at(self.slot[site], len(self.directions), ctx)
        v = self.directions[slot].astype(value.dtype)
        return self.only(site, jnp.where(used, value - (value @ v.T) @ v, value), value, ctx)
