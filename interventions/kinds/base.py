"""The kinds of intervention: small frozen pytrees on the protocol of :mod:`vlm_jax.sites`.

Three rules hold for all of them. *Which layers*: a table with one entry per layer, either a strength or an int32
**slot table** ``slot (L,)``: the slot that a layer uses, or the number of slots where it uses none. Slots are compact:
what is not placed has no array. Sites outside of the layers have a scalar in its place. *Which tokens of the prompt*:
``where (B, T)`` bool; or ``group``, the name of a token group that :func:`interventions.kinds.groups.bind` looks up in
every batch; or, without both, all. *Generated tokens*: acted on where all are, else only if ``new``.
"""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from interventions.kinds.groups import members
from vlm_jax.errors import UserError
from vlm_jax.sites import Context, head_axis, token_axis


def option(default: Any = None) -> Any:
    """A static field."""
    return flax.struct.field(pytree_node=False, default=default)


def layer_table(depth: int, layers: Iterable[int] | None, on: float = 1.0, off: float = 0.0) -> np.ndarray:
    """``(depth,)`` float32: ``on`` at the layers (None: all), ``off`` elsewhere.

    Raises:
        UserError: for a layer that the model lacks, or for none at all.
    """
    layers = range(depth) if layers is None else list(layers)
    if not layers or not set(layers) <= set(range(depth)):
        raise UserError(f"layers {list(layers)} are not possible: name some of 0 to {depth - 1}")
    return np.where(np.isin(np.arange(depth), list(layers)), on, off).astype(np.float32)


def slots(depth: int, layers: Iterable[int] | None) -> np.ndarray:
    """The slot table ``(depth,)`` in which the layers (None: all), ascending, use slots 0, 1, ..."""
    used = layer_table(depth, layers) > 0
    return np.where(used, np.cumsum(used) - 1, used.sum()).astype(np.int32)


def slot_at(slot: jax.Array, count: int, ctx: Context) -> tuple[jax.Array, jax.Array]:
    """The slot that is used here, and whether any is."""
    slot = slot if ctx.layer is None else slot[ctx.layer]
    return jnp.minimum(slot, count - 1), slot < count


def beside_tokens(tokens: jax.Array, site: str, ndim: int) -> jax.Array:
    """``(B, S)`` in the shape that broadcasts against a value at the site."""
    axis = token_axis(site)
    shape = [1] * ndim
    shape[axis - 1 if site.endswith("deepstack_merger_list") else 0], shape[axis] = tokens.shape
    return tokens.reshape(shape)


def beside_heads(heads: jax.Array, site: str, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[head_axis(site)] = -1
    return heads.reshape(shape)


@flax.struct.dataclass(kw_only=True)
class OnTokens:
    """What the kinds share that act on some of the tokens."""

    where: jax.Array | None = None
    group: str | None = option()
    new: bool = option(False)

    def tokens(self) -> jax.Array | None:
        return self.where

    def bound(self, labels: np.ndarray):
        """With ``where`` taken from the labels ``(B, T)`` of a batch."""
        if self.group is None:
            return self
        if other := sorted(site for site in self.sites if not site.startswith("text.")):
            raise UserError(f"{type(self).__name__} is on tokens of the prompt, which {other[0]!r} does not have")
        where = np.isin(labels, members(self.group))
        if not where.any():
            raise UserError(f"{type(self).__name__} is on the tokens {self.group!r}, of which this batch has none")
        return self.replace(where=where)

    def only(self, site: str, changed: jax.Array, value: jax.Array, ctx: Context) -> jax.Array:
        """``changed`` at the tokens that are meant, ``value`` elsewhere."""
        if self.where is None:
            if self.group is not None:
                raise UserError(f"{type(self).__name__} is on the tokens {self.group!r}: bind it to a batch first")
            return changed
        here = ctx.tokens(self.where, value.shape[token_axis(site)], self.new)
        return jnp.where(beside_tokens(here, site, value.ndim), changed, value)
