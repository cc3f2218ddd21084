"""A function as an intervention, for a change that is tried once. docs/interventions.md shows how to write a kind."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from interventions.kinds.base import OnTokens, option
from interventions.kinds.layers import Layers, slot_at
from interventions.kinds.packed import short
from vlm_jax.errors import UserError
from vlm_jax.sites import Context, layered, stage
from vlm_jax.typing import ArrayLike


@flax.struct.dataclass
class Hook(OnTokens):
    """Calls ``fn(value, ctx)`` at a site; see :func:`hook`."""

    fn: Callable[[jax.Array, Context], jax.Array] = option()
    site: str = option(default="text.resid_post")
    slot: Int[ArrayLike, "*layers"] | Layers = flax.struct.field(default_factory=lambda: Layers.of(None))

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, Any]:
        return {self.site: self.slot < 1}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        changed = self.fn(value, ctx)
        if np.shape(changed) != value.shape:
            name = getattr(self.fn, "__name__", "the hook")
            raise UserError(
                f"{name} returns the shape {np.shape(changed)} at {site!r}, where the value has {value.shape}: return "
                "a new value of that shape"
            )
        _, used = slot_at(self.slot, 1, ctx)
        return self.only(site, jnp.where(used, changed, value), value, ctx)

    def __repr__(self) -> str:
        return short(self)


def hook(
    site: str,
    fn: Callable[[jax.Array, Context], jax.Array],
    layers: int | Iterable[int] | None = None,
    tokens: str | Bool[ArrayLike, "batch tokens"] | None = None,
    **options: Any,
) -> Hook:
    """A function as an intervention: the value at ``site`` becomes ``fn(value, ctx)``.

    Args:
        fn: a function of the value and its :class:`vlm_jax.sites.Context` that JAX can trace; it returns the new value,
            of the same shape. A program is compiled for every function and keeps what the function read from outside:
            a new value there needs a new function, and arrays that change belong in a kind of your own.
        layers: in which layers, counted from the end if negative; None: in all.
        tokens: on which tokens: a token group such as "question", or a mask ``(B, T)``; None: on all, generated ones
            included. A token's new value may depend on that token alone.
        options: ``new``: with ``tokens``, whether it acts on generated tokens too.

    Raises:
        UserError: for an unknown site, layers at a site outside of the layers, or an ``fn`` that is no function.
    """
    stage(site)
    if not callable(fn):
        raise UserError(f"hook got a {type(fn).__name__} in place of a function: pass fn(value, ctx)")
    if layers is not None and not layered(site):
        raise UserError(f"{site!r} is outside of the layers: drop layers={layers}")
    slot = Layers.of(layers) if layered(site) else np.int32(0)
    where = {"group": tokens} if isinstance(tokens, str) else {"where": tokens}
    return Hook(fn=fn, site=site, slot=slot, **where, **options)
