"""Low-rank adapters of linears: LoRA, and DoRA, which also trains the size of each column of the kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from interventions.kinds.base import kind, option
from interventions.kinds.layers import slot_at
from vlm_jax.errors import UserError
from vlm_jax.sites import PROJECTOR_LINEARS, TEXT_LINEARS, VISUAL_LINEARS, Context, Intervention
from vlm_jax.typing import Array, ArrayLike


@kind
class LoRA(Intervention):
    """Low-rank adapters: ``y + scale * dropout(x) @ A @ B`` at placed linears (Hu et al. 2022), on every token.

    ``weights[site] = (A (K, in, r), B (K, r, out))`` are the trainable arrays. At a site outside of the layers, K is 1
    and the slot table a scalar. With a ``key``, the adapter's input gets dropout, as in PEFT.

    With ``magnitude[site] (K, out)``, for all sites, it is DoRA (Liu et al. 2024, equation 5): the linear computes with
    ``magnitude * (W + scale * A B) / |W + scale * A B|``, where ``|.|`` is the norm of each column (of each output).
    """

    weights: dict[str, tuple[Float[ArrayLike, "slots inputs rank"], Float[ArrayLike, "slots rank outputs"]]]
    slot: dict[str, Int[ArrayLike, "*layers"]]
    scale: Float[ArrayLike, ""]
    key: PRNGKeyArray | None = None
    magnitude: dict[str, Float[ArrayLike, "slots outputs"]] | None = None
    dropout: float = option(default=0.0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.weights)

    def active(self) -> dict[str, jax.Array]:
        return {site: slot < len(self.weights[site][0]) for site, slot in self.slot.items()}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        a, b = self.weights[site]
        slot, used = slot_at(self.slot[site], len(a), ctx)
        key = None if self.key is None else jax.random.fold_in(self.key, 0 if ctx.layer is None else ctx.layer)

        def delta(x):
            magnitude = None if self.magnitude is None else self.magnitude[site][slot]
            adapter = Adapter(a[slot], b[slot], self.scale, magnitude)
            return adapter.added(x, value, ctx.linear, site, key, self.dropout).astype(value.dtype)

        if len(a) == np.size(self.slot[site]):  # as many slots as layers: a branch would cost more than it saves
            return value + jnp.where(used, delta(ctx.input), 0)
        return value + jax.lax.cond(used, delta, lambda x: jnp.zeros_like(value), ctx.input)


class Adapter(NamedTuple):
    """The adapter of one linear, or of a stack of linears."""

    a: Float[ArrayLike, "*layers inputs rank"]
    b: Float[ArrayLike, "*layers rank outputs"]
    scale: Float[ArrayLike, ""]
    magnitude: Float[ArrayLike, "*layers outputs"] | None = None

    def added(
        self,
        x: Float[ArrayLike, "*rows inputs"],
        value: Float[ArrayLike, "*rows outputs"],
        linear: Any,
        site: str,
        key: PRNGKeyArray | None = None,
        rate: float = 0.0,
    ) -> Float[Array, "*rows outputs"]:
        """What is added to the output ``value`` of a linear with the input ``x``.

        LoRA adds ``scale * x A B``. DoRA adds ``(factor - 1) * x W + factor * scale * x A B``, see :meth:`factor`; the
        bias keeps its size.

        Args:
            linear: the linear (:attr:`vlm_jax.sites.Context.linear`). LoRA does not read it.
            key: the layer's key, from which the key of the dropout at this ``site`` is derived; None: no dropout.
            rate: the probability that dropout sets a number of x to 0. As in PEFT, of DoRA's ``x W`` too.
        """
        dropping = False
        if key is not None and rate > 0:
            dropping = True
            x = _drop(x, rate, jax.random.fold_in(key, _LINEARS.index(site)))
        flat = x.reshape(-1, x.shape[-1])
        low = ((flat @ self.a) @ self.b * self.scale).reshape(*x.shape[:-1], -1)
        if self.magnitude is None:
            return low
        if linear is None:
            raise UserError("DoRA needs the kernel of the linear that it adapts: let the model or Probe.linear call it")
        bias = 0 if linear.bias is None else linear.bias[...]
        plain = (linear(x) if dropping else value) - bias
        factor = self.factor(linear.kernel[...])
        return (factor - 1) * plain + factor * low

    def factor(self, kernel: Float[ArrayLike, "*layers inputs outputs"]) -> Float[Array, "*layers outputs"]:
        """DoRA's factor of each output, ``magnitude / |W + scale * A B|`` in float32. The norm is a constant for the
        gradient, as in the paper's section 4.3 and in PEFT."""
        whole = jnp.asarray(kernel).astype(jnp.float32) + self.scale * (self.a @ self.b)
        return self.magnitude / jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=-2))

    def merged(self, kernel: Float[ArrayLike, "*layers inputs outputs"]) -> Float[Array, "*layers inputs outputs"]:
        """The kernel of the linear that computes the same as the linear with the adapter."""
        whole = kernel + (self.scale * (self.a @ self.b)).astype(kernel.dtype)
        if self.magnitude is None:
            return whole
        return (whole * self.factor(kernel)[..., None, :]).astype(kernel.dtype)


#: The linears that may have adapters. The index of a linear seeds its dropout, so it may not depend on the placement.
_LINEARS = [
    *sorted(f"text.{name}" for names in TEXT_LINEARS.values() for name in names),
    *sorted({f"visual.{name}" for names in VISUAL_LINEARS.values() for name in names}),
    *sorted(f"projector.{name}" for name in PROJECTOR_LINEARS),
]


def _drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout with one random byte per number, because random words cost more than a small model's layers. The rate is
    rounded to a multiple of 1 / 256 above 0 and below 1; the kept numbers are scaled by the rounded rate."""
    words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
    noise = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
    dropped = min(max(round(rate * 256), 1), 255)
    return jnp.where(noise >= dropped, x * (256 / (256 - dropped)), 0)
