"""From what a caller passes as interventions to what a model applies."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from vlm_jax.errors import UserError
from vlm_jax.sites import Intervention

_HOW = "derive its class from vlm_jax.Intervention and decorate it with @interventions.kinds.base.kind"


def acting(interventions: Any, depths: Mapping[str, int]) -> tuple[Any, ...]:
    """The interventions as a tuple, with tables for a model of these depths.

    Args:
        interventions: one intervention, or several in the order in which they are applied.
        depths: tower -> the number of its layers (:attr:`vlm_jax.Model.depths`).

    Raises:
        UserError: for something that is no intervention, or whose class lacks something that every kind needs.
    """
    return tuple(one.sized(depths) for one in checked(interventions))


def checked(interventions: Any) -> tuple[Intervention, ...]:
    """The interventions as a tuple.

    Raises:
        UserError: as :func:`acting`, but for a model of any depth.
    """
    return tuple(map(_checked, several(interventions)))


def several(interventions: Any) -> Sequence[Any]:
    """Interventions in a sequence; one alone may be given without."""
    if isinstance(interventions, Intervention) or callable(interventions) or not isinstance(interventions, Iterable):
        return (interventions,)
    return tuple(interventions)


def _checked(one: Any) -> Intervention:
    name = getattr(one, "__name__", type(one).__name__)
    if isinstance(one, type):
        raise UserError(f"{name} is a class, not an intervention: pass an instance of it")
    if not isinstance(one, Intervention):
        if callable(one):
            raise UserError(f"{name} is a function, not an intervention: wrap it with interventions.hook(site, {name})")
        raise UserError(f"a {name} is no intervention: {_HOW}")
    if jax.tree_util.all_leaves([one]):
        raise UserError(f"{name} is not a pytree: decorate its class with @interventions.kinds.base.kind")
    sites = getattr(one, "sites", None)
    if sites is None or isinstance(sites, str):
        raise UserError(
            f'{name} does not say where it acts: give its class sites, such as sites = frozenset({{"text.attn_out"}})'
        )
    return one
