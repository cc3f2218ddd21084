"""Changes which tokens read which: attention knock-outs between token groups, and uniform attention."""

from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt32

from interventions.kinds.base import OnTokens, kind, option
from interventions.kinds.groups import GROUPS, is_part, members, tokens_of
from interventions.kinds.layers import layer_table
from vlm_jax.errors import UserError, nearest
from vlm_jax.sites import Context, Intervention
from vlm_jax.typing import Array, ArrayLike

MODES = ("post_softmax", "pre_softmax", "value_norm", "random_mass")


@kind
class AttentionKnockout(Intervention):
    """Removes attention between token groups. ``keep (L, G, G)`` is the share of the attention that is kept: by layer,
    by the query's group and by the key's group. ``groups (B, T)`` are the tokens' labels
    (:func:`interventions.kinds.groups.label`). Generated tokens belong to the group ``new``.

    ``group_names`` names the G groups in the order of ``keep``'s axes and of the labels. The names are saved too, so a
    file keeps its meaning when the library gets another group: :meth:`bound` and loading sort the table into the order
    of :data:`interventions.kinds.groups.GROUPS`. A group that the file does not know keeps its attention. Parts of
    groups, such as "first4:question", can have rows and columns too. Binding gives the tokens with several names a
    label of their own, whose attention is cut if it is cut under any of the names.

    mode:
        post_softmax: the probabilities are multiplied by ``keep``, so they do not sum to 1 any more (P1, equations 3
            and 4).
        pre_softmax: the keys are masked before the softmax, so the remaining probabilities sum to 1 (Geva et al. 2023).
            This equals post_softmax, renormalised.
        value_norm: a control. Every key is read, but the head's output is scaled to the norm that it has under
            post_softmax. It separates the effect of a smaller output from the effect of missing information.
        random_mass: a control. The same mass of attention is removed from other keys. They lose their attention one
            after another, in a random order (by ``key``), until the mass is reached. If they hold less than this mass,
            they lose all of it.
    """

    keep: Float[ArrayLike, "layers groups groups"]
    groups: Int[ArrayLike, "batch tokens"] | None = None
    key: UInt32[ArrayLike, "2"] | None = None
    mode: str = option(default="post_softmax")
    new: str = option(default="answer")
    group_names: tuple[str, ...] = option(default=GROUPS)
    by_query = True

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
        """A knock-out of the attention from the queries of one token group to the keys of another.

        Args:
            depth: the model's number of layers.
            query, key: token groups, such as "text", "image" or "first4:question".
            layers: the layers in which attention is cut; None: all.
            keep: the share of the attention that is kept.
            seed: of the mode "random_mass".
        """
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
        parts = sorted({name for group in (query, key) for name in group.split("+") if is_part(name)})
        names = (*GROUPS, *parts)
        queries, keys = (_rows(group, names) for group in (query, key))
        block = np.zeros((len(names), len(names)), bool)
        block[np.ix_(queries, keys)] = True
        kept = np.where(layer_table(depth, layers)[:, None, None] * block > 0, keep, 1).astype(np.float32)
        random = np.asarray(jax.random.key_data(jax.random.key(seed))) if mode == "random_mass" else None
        return cls(kept, key=random, mode=mode, group_names=names)

    @property
    def sites(self) -> frozenset[str]:
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}: use one of {', '.join(MODES)}")
        return frozenset({"text.attn_scores" if self.mode == "pre_softmax" else "text.attn_probs"})

    def active(self) -> dict[str, Any]:
        return dict.fromkeys(self.sites, (self.keep != 1).any((1, 2)))

    def tokens(self) -> Bool[Array, "batch tokens"] | None:
        if self.groups is None:
            return None
        groups, length = jnp.asarray(self.groups), self.groups.shape[1]
        is_member = groups[:, :, None] == jnp.arange(len(self.group_names))  # (B, T, G)
        first_key = jnp.where(is_member.any(1), is_member.argmax(1), length)  # (B, G): each group's first token
        cut = (jnp.asarray(self.keep) != 1).any(0)[groups]  # (B, T, G)
        return (cut & (first_key[:, None] <= jnp.arange(length)[:, None])).any(-1)  # no token sees a later one

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of groups in the table."""
        return tuple(name for name in self.group_names if is_part(name))

    def bound(self, labels: Int[ArrayLike, "batch tokens"]) -> "AttentionKnockout":
        ordered, labels = self.in_order_of((*GROUPS, *self.parts)), np.asarray(labels)
        if not self.parts:
            return ordered.replace(groups=labels)
        marked = [tokens_of(part, labels) for part in self.parts]
        # A token's label counts up over its parts in binary, on top of its group.
        labels = labels + len(GROUPS) * sum(mark.astype(np.int32) << i for i, mark in enumerate(marked))
        names = [{group} for group in GROUPS]
        for part in self.parts:
            names += [{*known, part} for known in names]
        has = np.array([[name in known for name in ordered.group_names] for known in names])
        keep = jnp.where(has[None, :, :, None], jnp.asarray(ordered.keep)[:, None], 1).min(2)
        keep = jnp.where(has[None, None], keep[:, :, None], 1).min(3)
        return ordered.replace(keep=keep, groups=labels, group_names=tuple("&".join(sorted(known)) for known in names))

    @classmethod
    def restored(cls, fields: dict[str, Any]) -> "AttentionKnockout":
        if "group_names" not in fields:
            raise UserError(
                "the file's AttentionKnockout does not name the token groups of its table: make it again with "
                "AttentionKnockout.between and save it"
            )
        read = cls(**fields)
        return read.in_order_of((*GROUPS, *read.parts))

    def in_order_of(self, names: tuple[str, ...]) -> "AttentionKnockout":
        """The same knock-out with ``keep`` and ``groups`` in the order of these group names. New groups keep their
        attention.

        Raises:
            UserError: if the shape of ``keep`` does not fit ``group_names``, or if one of them is not in ``names``.
        """
        known = self.group_names
        if np.shape(self.keep)[1:] != (len(known),) * 2 or len(set(known)) != len(known):
            raise UserError(
                f"AttentionKnockout names the token groups {', '.join(known)}, but its table has the shape "
                f"{np.shape(self.keep)}: give one row and one column for each group"
            )
        if unknown := [name for name in known if name not in names]:
            raise UserError(
                f"AttentionKnockout has a table for the unknown token group {unknown[0]!r}{nearest(unknown[0], names)}"
            )
        if known == names:
            return self
        index = np.array([names.index(name) for name in known])
        keep = jnp.ones((len(self.keep), len(names), len(names)), self.keep.dtype)
        keep = keep.at[:, index[:, None], index].set(self.keep)
        groups = None if self.groups is None else jnp.asarray(index.astype(np.int32))[self.groups]
        return self.replace(keep=keep, groups=groups, group_names=names)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if self.groups is None:
            raise UserError("AttentionKnockout must know the token groups: bind it to a batch first")
        groups, new = self.groups, self.group_names.index(self.new)
        queries = ctx.tokens(groups, value.shape[2], new)
        keys = ctx.keys(groups, value.shape[3], new)
        # A product with one-hot vectors, because gathering (B, S, keys) entries one by one is slow.
        rows = jnp.asarray(self.keep)[ctx.layer][queries]
        keep = jnp.einsum("bsg,bkg->bsk", rows, jax.nn.one_hot(keys, rows.shape[-1], dtype=rows.dtype))[:, None]
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

    def _without_mass(
        self,
        value: Float[Array, "batch heads queries keys"],
        keep: Float[Array, "batch 1 queries keys"],
        keys: Int[Array, "batch keys"],
        layer: Int[ArrayLike, ""] | int,
    ) -> Float[Array, "batch heads queries keys"]:
        """The probabilities ``value`` after as much mass as ``keep`` would remove is removed from other
        keys, in a random order. ``keys`` are the keys' groups."""
        if self.key is None:
            raise UserError("AttentionKnockout has no key for random_mass: make it with AttentionKnockout.between")
        mass = (value * (1 - keep)).sum(-1, keepdims=True)
        # One order for all rows, heads and queries. It depends on a key's number among the real tokens of its row, so
        # padding has no effect.
        random = jax.random.fold_in(jax.random.wrap_key_data(self.key), layer)
        draw = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(random, number)))
        number = jnp.cumsum(keys != self.group_names.index("padding"), 1)
        order = jnp.argsort(draw(jnp.arange(value.shape[-1] + 1))[number], 1)
        others = jnp.where(keep == 1, value, 0)
        others = jnp.take_along_axis(others, order[:, None, None], -1)
        taken = jnp.clip(mass - (jnp.cumsum(others, -1) - others), 0, others)
        return value - jnp.take_along_axis(taken, jnp.argsort(order, 1)[:, None, None], -1)


def _rows(group: str, names: tuple[str, ...]) -> list[int]:
    """The rows of ``group`` in a table with these names."""
    rows: set[int] = set()
    for name in group.split("+"):
        rows |= {names.index(name)} if is_part(name) else set(members(name))
    return sorted(rows)


@kind
class UniformAttention(OnTokens):
    """Makes attention uniform over the visible keys in layers whose ``strength (L,)`` is 1 (P3, TaLo's other cut). The
    scores are scaled by ``1 - strength``; at 1 this equals zeroing q_proj."""

    strength: Float[ArrayLike, "layers"]
    site: str = option(default="text.attn_scores")
    by_query = True

    @property
    def sites(self) -> frozenset[str]:
        return frozenset({self.site})

    def active(self) -> dict[str, jax.Array]:
        return {self.site: self.strength != 0}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        return self.only(site, value * (1 - self.strength[ctx.layer]), value, ctx)
