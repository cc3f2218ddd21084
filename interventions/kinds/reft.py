"""Representation editors: small trained functions that change hidden states in a subspace of low rank (ReFT).

All have the form ``h + U^T s(h)`` with a projection U of r rows. They differ in ``s``, and in whether U's rows are kept
orthonormal. The names and formulas are those of Wu et al. 2024 and of its released code; P4 (equation 1) uses LoReFT.
"""

import abc
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from interventions.kinds.base import OnTokens, kind
from interventions.kinds.layers import Layers, slot_at
from vlm_jax.errors import UserError
from vlm_jax.sites import Context
from vlm_jax.typing import ArrayLike


def orthonormal(projection: Float[ArrayLike, "width rank"]) -> Float[Array, "width rank"]:
    """The orthonormal factor of a projection's QR decomposition, in float32. Its signs are fixed, so it is a smooth
    function of the projection, and an orthonormal projection is its own factor."""
    u, upper = jnp.linalg.qr(projection.astype(jnp.float32))
    return u * jnp.where(jnp.diagonal(upper) < 0, -1, 1)


@flax.struct.dataclass
class Editor(OnTokens):
    """What the editors share.

    ``weights[site]`` are the trainable arrays, each with a leading axis of K slots: the projection ``(K, D, r)``, whose
    columns are U's rows, and then those in :attr:`sources`. For orthonormal kinds U^T is the orthonormal factor of the
    projection, its signs fixed, so U stays orthonormal through training.
    """

    #: The arrays that ``s`` reads: "W" is ``(K, D, r)``, "b" is ``(K, r)``.
    sources: ClassVar[tuple[str, ...]] = ("W", "b")
    orthonormal: ClassVar[bool] = True

    weights: dict[str, tuple[Float[ArrayLike, "slots ..."], ...]]
    slot: dict[str, Int[ArrayLike, "*layers"] | Layers]

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def active(self) -> dict[str, Any]:
        return {site: slot < len(self.weights[site][0]) for site, slot in self.slot.items()}

    @abc.abstractmethod
    def source(
        self, h: Float[Array, "*rows width"], u: Float[Array, "width rank"], *arrays: Array
    ) -> Float[Array, "*#rows rank"]:
        """``s(h)``. ``u`` is U^T; ``arrays`` are one slot of those in :attr:`sources`."""

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        projection, *arrays = self.weights[site]
        if projection.shape[-2] != value.shape[-1]:
            raise UserError(
                f"{type(self).__name__} at {site!r} is for a width of {projection.shape[-2]}, but this model's is "
                f"{value.shape[-1]}: use the model with which it was trained"
            )
        slot, used = slot_at(self.slot[site], len(projection), ctx)
        u = projection[slot]
        u = (orthonormal(u) if self.orthonormal else u).astype(value.dtype)
        edited = value + self.source(value, u, *(array[slot] for array in arrays)) @ u.T
        return self.only(site, jnp.where(used, edited, value), value, ctx)


@kind
class LoReFT(Editor):
    """``h + U^T (W h + b - U h)``: sets the coordinates of h in U's subspace to a linear function of h."""

    def source(self, h, u, w, b):
        return h @ w + b - h @ u


@kind
class NoReFT(Editor):
    """LoReFT with a free U: ``h + U^T (W h + b - U h)``."""

    orthonormal: ClassVar[bool] = False

    def source(self, h, u, w, b):
        return h @ w + b - h @ u


@kind
class DiReFT(Editor):
    """``h + U^T (W h + b)``: adds to the coordinates instead of setting them."""

    def source(self, h, u, w, b):
        return h @ w + b


@kind
class NodiReFT(Editor):
    """DiReFT with a free U: ``h + U^T (W h + b)``."""

    orthonormal: ClassVar[bool] = False

    def source(self, h, u, w, b):
        return h @ w + b


@kind
class ConsReFT(Editor):
    """``h + U^T (b - U h)``: sets the coordinates to constants."""

    sources: ClassVar[tuple[str, ...]] = ("b",)

    def source(self, h, u, b):
        return b - h @ u


@kind
class LobiReFT(Editor):
    """``h + U^T b``: adds the same vector everywhere."""

    sources: ClassVar[tuple[str, ...]] = ("b",)

    def source(self, h, u, b):
        return b


#: Name of the option -> the editors' kind.
EDITOR_KINDS: dict[str, type[Editor]] = {
    cls.__name__: cls for cls in (LoReFT, NoReFT, DiReFT, NodiReFT, ConsReFT, LobiReFT)
}
