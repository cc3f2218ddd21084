"""Changes who reads whom: attention knock-outs between token groups, and even attention."""

from collections.abc import Iterable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from interventions.kinds.base import OnTokens, layer_table, option
from interventions.kinds.groups import GROUPS, members
from vlm_jax.errors import UserError
from vlm_jax.sites import Context

MODES = ("post_softmax", "pre_softmax", "value_norm", "random_mass")


@flax.struct.dataclass
class AttentionKnockout:
    """Takes the attention of some token groups to others away: ``keep (L, G, G)``, by query's and key's group, is what
    is left of it. ``groups (B, T)`` are the labels of :func:`interventions.kinds.groups.label`; generated tokens are
    ``new``.

    mode:
        post_softmax: the probabilities are multiplied by ``keep`` and do not sum to 1 any more (P1, equations 3, 4).
        pre_softmax: the keys are masked, so what is left sums to 1 (Geva et al. 2023). The same as post_softmax,
            renormalised.
        value_norm: control: every key is read, but the head's output is scaled to the norm that post_softmax would
            leave it. What this changes, less norm explains and missing information does not.
        random_mass: control: the same mass of attention is taken from other keys, in a random order (``key``), the
            last of them in part; from all the others where they hold less.
    """

    keep: jax.Array
    groups: jax.Array | None = None
    key: jax.Array | None = None
    mode: str = option("post_softmax")
    new: str = option("answer")

    @classmethod
    def between(
        cls,
        depth: int,
        query: str,
        key: str,
        layers: Iterable[int] | None = None,
        *,
        mode: Literal["post_softmax", "pre_softmax", "value_norm", "random_mass"] = "post_softmax",
        keep: float = 0.0,
        seed: int = 0,
    ) -> "AttentionKnockout":
        """From the group ``query`` to the group ``key``, such as "text" and "image", in some layers (None: all)."""
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
        block = np.zeros((len(GROUPS), len(GROUPS)), bool)
        block[np.ix_(members(query), members(key))] = True
        kept = np.where(layer_table(depth, layers)[:, None, None] * block > 0, keep, 1).astype(np.float32)
        random = np.asarray(jax.random.key_data(jax.random.key(seed))) if mode == "random_mass" else None
        return cls(kept, key=random, mode=mode)

    @property
    def sites(self) -> frozenset[str]:
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}: use one of {', '.join(MODES)}")
        return frozenset({"text.attn_scores" if self.mode == "pre_softmax" else "text.attn_probs"})

    def active(self) -> dict[str, jax.Array]:
        return dict.fromkeys(self.sites, (self.keep != 1).any((1, 2)))

    def tokens(self) -> jax.Array | None:
        if self.groups is None:
            return None
        groups, length = jnp.asarray(self.groups), self.groups.shape[1]
        member = groups[:, :, None] == jnp.arange(len(GROUPS))
        first = jnp.where(member.any(1), member.argmax(1), length)  # (B, G): where the first key of a group is
        cut = (jnp.asarray(self.keep) != 1).any(0)[groups]  # (B, T, G)
        return (cut & (first[:, None] <= jnp.arange(length)[:, None])).any(-1)  # no token sees a later one

    def bound(self, labels: np.ndarray) -> "AttentionKnockout":
        return self.replace(groups=labels)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if self.groups is None:
            raise UserError("AttentionKnockout must know the token groups: bind it to a batch first")
        groups, new = self.groups, GROUPS.index(self.new)
        queries = ctx.tokens(groups, value.shape[2], new)
        keys = ctx.keys(groups, value.shape[3], new)
        # (B, S, G) by one-hot rather than by gathering (B, S, keys) entries one by one.
        rows = self.keep[ctx.layer][queries]
        keep = jnp.einsum("bsg,bkg->bsk", rows, jax.nn.one_hot(keys, len(GROUPS), dtype=rows.dtype))[:, None]
        match self.mode:
            case "pre_softmax":
                lowest = jnp.finfo(value.dtype).min
                return jnp.where(keep > 0, value + jnp.log(jnp.maximum(keep, 1e-30)), lowest)
            case "post_softmax":
                return value * keep
            case "value_norm":
                norms = [jnp.linalg.norm(ctx.read(p), axis=-1) for p in (value * keep, value)]
                ratio = norms[0] / jnp.maximum(norms[1], jnp.finfo(value.dtype).tiny)
                return value * ratio.transpose(0, 2, 1)[..., None]
        return self._without_mass(value, keep, keys, ctx.layer)

    def _without_mass(self, value: jax.Array, keep: jax.Array, keys: jax.Array, layer) -> jax.Array:
        """The probabilities less the mass that ``keep`` would take, taken from other keys in a random order."""
        mass = (value * (1 - keep)).sum(-1, keepdims=True)
        # One order for all rows, heads and queries; by a key's number in its row, so that padding does not matter.
        random = jax.random.fold_in(jax.random.wrap_key_data(self.key), layer)
        draw = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(random, number)))
        number = jnp.cumsum(keys != GROUPS.index("padding"), 1)
        order = jnp.argsort(draw(jnp.arange(value.shape[-1] + 1))[number], 1)
        others = jnp.where(keep == 1, value, 0)
        others = jnp.take_along_axis(others, order[:, None, None], -1)
        taken = jnp.clip(mass - (jnp.cumsum(others, -1) - others), 0, others)
        return value - jnp.take_along_axis(taken, jnp.argsort(order, 1)[:, None, None], -1)


@flax.struct.dataclass
class UniformAttention(OnTokens):
    """Makes attention uniform over the visible keys where ``strength (L,)`` is 1 (TaLo's other form, P3): the scores
    are scaled by ``1 - strength``, which is what zeroing q_proj does."""

    strength: jax.Array
    site: str = option("text.attn_scores")

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: self.strength != 0}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        return self.only(site, value * (1 - self.strength[ctx.layer]), value, ctx)
