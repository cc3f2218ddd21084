"""Interventions on a model that ends at an earlier layer (:meth:`vlm_jax.Model.up_to`)."""

from collections.abc import Mapping, Sequence

import flax.struct
import jax
import numpy as np

from interventions.kinds.base import option
from vlm_jax.sites import TEXT_SITES, Context, Intervention, Stage, layered, splits_queries, stage


def up_to(interventions: Sequence[Intervention], layers: int) -> tuple[Intervention, ...]:
    """The interventions for a model that has only the first ``layers`` of their model's layers. Those that act in later
    layers alone are left out."""
    kept = []
    for intervention in interventions:
        shorter = UpTo(intervention, layers)
        tables = shorter.active()
        if any(site not in tables or np.any(tables[site]) for site in shorter.sites):
            kept.append(shorter)
    return tuple(kept)


@flax.struct.dataclass
class UpTo(Intervention):
    """``whole`` in the first ``layers`` layers. It changes there what ``whole`` changes."""

    whole: Intervention
    layers: int = option(default=0)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(site for site in self.whole.sites if stage(site) is not Stage.EXIT)

    @property
    def start(self) -> int:
        return self.whole.start

    @property
    def by_query(self) -> bool:
        return splits_queries((self.whole,), *self.whole.sites)

    def active(self) -> Mapping[str, jax.Array]:
        tables = {site: table for site, table in self.whole.active().items() if site in self.sites}
        of_layers = TEXT_SITES & set(filter(layered, tables))
        return {site: table[: self.layers] if site in of_layers else table for site, table in tables.items()}

    def tokens(self) -> jax.Array | None:
        return self.whole.tokens()

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        return self.whole(site, value, ctx)
