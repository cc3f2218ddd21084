"""In which layers an intervention acts.

A **slot table** ``(L,)`` int32 holds the number of the slot that each layer uses, or a number that is too large where a
layer uses none. So a layer without a slot needs no array. :class:`Layers` names layers before the model's depth is
known.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from vlm_jax.errors import UserError
from vlm_jax.sites import Context, layered, stack_of
from vlm_jax.typing import Array, ArrayLike


def layer_table(
    depth: int, layers: Iterable[int] | None, on: float = 1.0, off: float = 0.0
) -> Float[np.ndarray, "layers"]:
    """``(depth,)`` float32: ``on`` at the layers (None: all), ``off`` elsewhere.

    Raises:
        UserError: for a layer that the model lacks, or for an empty list.
    """
    layers = range(depth) if layers is None else list(layers)
    if not layers or not set(layers) <= set(range(depth)):
        raise UserError(f"layers {list(layers)} are not possible: name some of 0 to {depth - 1}")
    return np.where(np.isin(np.arange(depth), list(layers)), on, off).astype(np.float32)


def slots(depth: int, layers: Iterable[int] | None) -> Int[np.ndarray, "layers"]:
    """The slot table ``(depth,)`` in which the layers (None: all), ascending, use slots 0, 1, ..."""
    used = layer_table(depth, layers) > 0
    return np.where(used, np.cumsum(used) - 1, used.sum()).astype(np.int32)


#: The slot of a layer that uses none; more than any number of slots.
_NONE = 2**30


@flax.struct.dataclass
class Layers:
    """Layers by their numbers, in place of a slot table: a table of the model's depth is made of it when an
    intervention meets a model.

    numbers: ``(n,)``, counted from the end if negative; None for all layers. slots: ``(n,)``, the slot that each uses.
    """

    numbers: Int[ArrayLike, "*variants chosen"] | None
    slots: Int[ArrayLike, "*variants chosen"]

    @classmethod
    def of(cls, layers: int | Iterable[int] | None, count: int = 1) -> "Layers":
        """The layers (None: all), in the order of ``count`` slots; one slot is for all of them.

        Raises:
            UserError: for no layer, one that is named twice, or another number of layers than of slots.
        """
        if layers is None:
            if count > 1:
                raise UserError(f"{count} slots are given, but not for which layers: name {count} layers")
            return cls(None, np.zeros(1, np.int32))
        numbers = np.array(_listed(layers), np.int32)
        if count not in (1, len(numbers)):
            raise UserError(f"{count} slots are given for {len(numbers)} layers: give one for all, or one for each")
        return cls(numbers, np.arange(count, dtype=np.int32).repeat(len(numbers) if count == 1 else 1))

    def table(self, depth: int) -> Int[Array, "*variants layers"]:
        """The slot table of a model with ``depth`` layers.

        Raises:
            UserError: for a layer that the model lacks.
        """
        if self.numbers is None:
            return jnp.zeros((*np.shape(self.slots)[:-1], depth), jnp.int32)
        if not isinstance(self.numbers, jax.core.Tracer):
            for row in np.reshape(self.numbers, (-1, np.shape(self.numbers)[-1])).tolist():
                numbered(row, depth)
        numbers = jnp.where(self.numbers < 0, self.numbers + depth, self.numbers)
        chosen = numbers[..., None, :] == jnp.arange(depth)[:, None]
        slots = (chosen * jnp.asarray(self.slots)[..., None, :]).sum(-1)
        return jnp.where(chosen.any(-1), slots, _NONE).astype(jnp.int32)

    def __str__(self) -> str:
        return "" if self.numbers is None else f"L{','.join(map(str, np.ravel(self.numbers)))}"

    def __lt__(self, count: int) -> Bool[np.ndarray, "layers"]:
        """Which layers use a slot, as far as they are counted from the start: for descriptions."""
        if self.numbers is None:
            return np.ones(1, bool)
        numbers = np.asarray(self.numbers)
        return np.isin(np.arange(max(numbers.max(), 0) + 1), numbers)


def _listed(layers: int | Iterable[int]) -> list[int]:
    """Layers as a list of whole numbers; one number may stand alone."""
    alone = isinstance(layers, int | np.integer) or (isinstance(layers, np.ndarray) and layers.ndim == 0)
    named: Any = [layers] if alone else layers
    numbers = [operator.index(layer) for layer in named]
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"layers {numbers} are not possible: name at least one, and none twice")
    return numbers


def numbered(layers: int | Iterable[int] | None, depth: int) -> list[int]:
    """The numbers of some layers (None: all) of a model with ``depth`` layers, where negative ones count from the end.

    Raises:
        UserError: for no layer, one that the model lacks, or one that is named twice.
    """
    numbers = list(range(depth)) if layers is None else _listed(layers)
    if lacking := [number for number in numbers if not -depth <= number < depth]:
        raise UserError(f"the model has no layer {lacking[0]}: name some of 0 to {depth - 1}")
    found = [number % depth for number in numbers]
    if len(set(found)) < len(found):
        raise UserError(f"layers {numbers} name a layer twice in a model of {depth}: name each once")
    return found


def at(site: str, layers: int | Iterable[int] | None = None, count: int = 1) -> dict[str, Layers]:
    """The argument ``slot`` of kinds that act at several sites: at this one, in these layers (None: all).

    Args:
        count: the number of slots: one for all layers, or one for each.
    """
    return {site: Layers.of(layers, count)}


def sized_slots(intervention: Any, depths: Mapping[str, int]) -> Any:
    """An intervention with tables in place of the :class:`Layers` of its field ``slot``."""

    def table(site: str, slot: Any) -> Any:
        if not isinstance(slot, Layers):
            return slot
        if layered(site):
            return slot.table(depths[stack_of(site)])
        if slot.numbers is not None:
            raise UserError(f"{site!r} is outside of the layers: drop the layers {np.ravel(slot.numbers).tolist()}")
        return jnp.int32(0)

    slot = intervention.slot
    if isinstance(slot, Layers):
        return intervention.replace(slot=table(intervention.site, slot))
    if isinstance(slot, Mapping) and any(isinstance(one, Layers) for one in slot.values()):
        return intervention.replace(slot={site: table(site, one) for site, one in slot.items()})
    return intervention


def slot_at(slot: Any, count: int, ctx: Context) -> tuple[jax.Array, jax.Array]:
    """The slot that this layer uses, and whether it uses one. If not, the slot is ``count - 1``, so that it is still a
    valid index."""
    slot = slot if ctx.layer is None else slot[ctx.layer]
    return jnp.minimum(slot, count - 1), slot < count
