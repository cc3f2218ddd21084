"""Ablation: values become zeros, or the mean of other prompts."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from interventions.kinds.base import OnTokens, beside_heads, beside_tokens, kind
from interventions.kinds.groups import GROUPS
from interventions.kinds.layers import Layers, numbered, slot_at
from vlm_jax.errors import UserError
from vlm_jax.sites import Context, Intervention, layered, stack_of, token_axis
from vlm_jax.typing import ArrayLike


class Means(NamedTuple):
    """The mean values of reference prompts by layer and token group (:data:`interventions.GROUPS`)."""

    values: Mapping[str, Float[np.ndarray, "layers groups ..."]]
    """Site -> means."""
    known: Bool[np.ndarray, " groups"]
    """Which token groups the reference prompts have."""


@kind
class Ablation(OnTokens):
    """Replaces values by zeros, or by the mean of reference prompts at tokens of the same group.

    ``mean[site] (K, G, ..., D)`` holds K slots of a vector for each of the G token groups; None stands for zeros.
    ``known (G,)`` says of which groups there is a mean. ``labels (B, T)`` is the group of each token, which
    :func:`interventions.bind` looks up. ``heads (H,)`` bool restricts it to some heads. Generated tokens count as
    "answer"; if there is no mean of answers, they keep their values.
    """

    mean: dict[str, Float[ArrayLike, "slots groups ..."] | None]
    slot: dict[str, Int[ArrayLike, "*layers"] | Layers]
    known: Bool[ArrayLike, "groups"] | None = None
    labels: Int[ArrayLike, "batch tokens"] | None = None
    heads: Bool[ArrayLike, "heads"] | None = None

    @classmethod
    def zero(cls, sites: str | Iterable[str], layers: int | Iterable[int] | None = None, **tokens) -> "Ablation":
        """Zeros at some sites in some layers (None: all). ``tokens``: where, group, new."""
        names = [sites] if isinstance(sites, str) else list(sites)
        shared = Layers.of(layers)
        slot = dict.fromkeys(names, shared)
        return cls(dict.fromkeys(names), slot, **tokens)

    @classmethod
    def by_mean(cls, means: Means, layers: int | Iterable[int] | None = None, **tokens) -> "Ablation":
        """The means of reference prompts (:func:`interventions.ablations.reference_means`) in some layers (None: all).
        ``tokens``: where, group, new."""
        if not means.values:
            raise UserError("the means are of no site: give reference_means at least one")
        depth = len(next(iter(means.values.values())))
        slots = np.array(numbered(layers, depth), np.int32)
        slot = {site: Layers(slots, slots) for site in means.values}
        return cls(dict(means.values), slot, means.known, **tokens)

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.slot)

    def active(self) -> dict[str, Any]:
        any_head = True if self.heads is None else self.heads.any()
        return {site: (slot < self._count(site)) & any_head for site, slot in self.slot.items()}

    def _count(self, site: str) -> int:
        mean = self.mean[site]
        return 1 if mean is None else len(mean)

    def sized(self, depths: Mapping[str, int]) -> Intervention:
        for site, slot in self.slot.items():
            mean, depth = self.mean[site], depths[stack_of(site)] if layered(site) else None
            if isinstance(slot, Layers) and mean is not None and len(mean) != depth:
                raise UserError(f"the means are of {len(mean)} layers, but the model has {depth}: take its own means")
        return super().sized(depths)

    def tokens(self) -> jax.Array | None:
        if self.where is not None or self.labels is None:
            return self.where
        return self.labels != GROUPS.index("padding")

    def bound(self, labels: Int[ArrayLike, "batch tokens"]) -> Intervention:
        bound = super().bound(labels)
        if self.known is None:
            return bound
        where = np.asarray(labels) != GROUPS.index("padding")
        if bound.where is not None:
            where &= np.asarray(bound.where)
        lacking = [GROUPS[group] for group in np.unique(np.asarray(labels)[where]) if not self.known[group]]
        if lacking:
            raise UserError(f"the reference prompts have no token of the group {lacking[0]!r}: give others, or a group")
        return bound.replace(labels=labels)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        mean = self.mean[site]
        slot, used = slot_at(self.slot[site], self._count(site), ctx)
        if mean is None:
            new = jnp.zeros_like(value)
        elif self.labels is None:
            raise UserError("Ablation by a mean must know the tokens' groups: bind it to a batch first")
        else:
            labels = ctx.tokens(self.labels, value.shape[token_axis(site)], GROUPS.index("answer"))
            new = mean[slot][labels].astype(value.dtype)
            if self.known is not None:  # generated tokens keep their values where the reference has no answers
                used = used & beside_tokens(self.known[labels], site, value.ndim)
        if self.heads is not None:
            used = used & beside_heads(self.heads, site, value.ndim)
        return self.only(site, jnp.where(used, new, value), value, ctx)
