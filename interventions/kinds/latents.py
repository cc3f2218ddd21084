"""Changes the latents of a sparse dictionary (P2): ablates, clamps or steers some, or splices a reconstruction in."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from interventions.dictionary import Architecture, Dictionary
from interventions.kinds.base import OnTokens, kind, option
from interventions.kinds.layers import Layers, slot_at
from vlm_jax.errors import UserError
from vlm_jax.sites import Context
from vlm_jax.typing import ArrayLike


@kind
class Latents(OnTokens):
    """Maps the codes h of a dictionary to ``h' = scale h + shift`` and puts the change into the activations x.

    With ``error``, x becomes ``x + (h' - h) W_dec``: what the dictionary does not explain stays. Without, x becomes the
    reconstruction ``h' W_dec + b_dec``.

    There are K slots of dictionaries of one shape. ``weights`` are their arrays by name
    (:class:`~interventions.dictionary.Dictionary`), with a leading axis of K. Heads count as one activation: at
    ``head_out`` they are joined.
    """

    weights: dict[str, Float[ArrayLike, "slots ..."]]
    scale: Float[ArrayLike, "slots latents"]
    shift: Float[ArrayLike, "slots latents"]
    slot: dict[str, Int[ArrayLike, "*layers"] | Layers]
    architecture: Architecture = option(default="topk")
    k: int | None = option(default=None)
    error: bool = option(default=True)

    @classmethod
    def of(
        cls,
        dictionary: Dictionary,
        slot: dict[str, Any],
        *,
        scale: float = 1.0,
        shift: float = 0.0,
        latents: Sequence[int] | None = None,
        **options: Any,
    ) -> "Latents":
        """Scales and shifts some latents (None: all) of a dictionary.

        Args:
            dictionary: one dictionary, which becomes slot 0, or several with a leading axis of slots.
            slot: see :class:`Latents`.
            options: ``error``, and the tokens on which it acts (``group``, ``where``, ``new``).

        Raises:
            UserError: for a latent that the dictionary lacks.
        """
        arrays = {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
        single = np.ndim(dictionary.b_dec) == 1
        weights = {name: a[None] if single else a for name, a in arrays.items() if a is not None}
        count = dictionary.latents
        chosen = np.arange(count) if latents is None else np.asarray(latents, int)
        if not chosen.size or chosen.min() < 0 or chosen.max() >= count:
            raise UserError(f"latents {chosen.tolist()} are not possible: name some of 0 to {count - 1}")
        of = np.isin(np.arange(count), chosen)
        shape = len(weights["b_dec"]), count
        scales, shifts = (
            np.ascontiguousarray(np.broadcast_to(np.where(of, changed, kept), shape), np.float32)
            for changed, kept in ((scale, 1), (shift, 0))
        )
        return cls(weights, scales, shifts, slot, dictionary.architecture, dictionary.k, **options)

    @classmethod
    def ablate(cls, dictionary: Dictionary, slot: dict[str, Any], latents: Sequence[int], **options: Any) -> "Latents":
        """Sets latents to 0."""
        return cls.of(dictionary, slot, latents=latents, scale=0.0, **options)

    @classmethod
    def clamp(
        cls, dictionary: Dictionary, slot: dict[str, Any], latents: Sequence[int], value: float, **options: Any
    ) -> "Latents":
        """Sets latents to ``value``."""
        return cls.of(dictionary, slot, latents=latents, scale=0.0, shift=value, **options)

    @classmethod
    def steer(
        cls, dictionary: Dictionary, slot: dict[str, Any], latents: Sequence[int], strength: float, **options: Any
    ) -> "Latents":
        """Adds ``strength`` to latents, whether they are active or not."""
        return cls.of(dictionary, slot, latents=latents, shift=strength, **options)

    @classmethod
    def splice(cls, dictionary: Dictionary, slot: dict[str, Any], *, error: bool = False, **options: Any) -> "Latents":
        """Replaces activations by their reconstruction. With ``error`` nothing changes, which a test can check."""
        return cls.of(dictionary, slot, error=error, **options)

    @classmethod
    def each(
        cls,
        dictionary: Dictionary,
        slot: dict[str, Any],
        latents: Sequence[int],
        *,
        scale: float = 0.0,
        shift: float = 0.0,
        **options: Any,
    ) -> "list[Latents]":
        """For each latent an intervention that scales and shifts it alone, by default an ablation. They share the
        dictionary's arrays, so a sweep over them stores the dictionary once."""
        first, *others = (cls.of(dictionary, slot, latents=[n], scale=scale, shift=shift, **options) for n in latents)
        return [first, *(first.replace(scale=other.scale, shift=other.shift) for other in others)]

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.slot)

    def active(self) -> dict[str, Any]:
        return {site: slot < len(self.scale) for site, slot in self.slot.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        x = value.reshape(*value.shape[:2], -1).astype(jnp.float32)
        if x.shape[-1] != self.weights["b_dec"].shape[-1]:
            raise UserError(
                f"Latents at {site!r} has a dictionary for a width of {self.weights['b_dec'].shape[-1]}, but the "
                f"width here is {x.shape[-1]}: use the dictionary of this site and model"
            )
        slot, used = slot_at(self.slot[site], len(self.scale), ctx)
        arrays = {name: array[slot] for name, array in self.weights.items()}
        dictionary = Dictionary(**arrays, architecture=self.architecture, k=self.k)
        codes = dictionary.codes(x)
        changed = codes * self.scale[slot] + self.shift[slot]
        new = x + (changed - codes) @ dictionary.W_dec if self.error else dictionary.decode(changed)
        return self.only(site, jnp.where(used, new.reshape(value.shape).astype(value.dtype), value), value, ctx)
