"""Batches of variants of one run, as one pytree; and the first layer and the first token that variants change.

A variant is a tuple of interventions. The variants of a batch differ only in the values of their arrays.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from interventions.kinds.layers import Layers
from vlm_jax import UserError
from vlm_jax.acting import acting, several
from vlm_jax.runs.processes import fetch
from vlm_jax.sites import NO_TAPS, Context, Intervention, Probe, Stage, splits_queries, stage
from vlm_jax.typing import Array


@flax.struct.dataclass
class Variants:
    """N variants as one tuple of interventions."""

    interventions: tuple
    mapped: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    """For each leaf of ``interventions``: whether it has a leading axis of N. All variants share the other leaves."""

    def __len__(self) -> int:
        leaves = zip(jax.tree.leaves(self.interventions), self.mapped, strict=True)
        sizes = {len(leaf) for leaf, is_mapped in leaves if is_mapped}
        if len(sizes) != 1:
            raise UserError(
                "the arrays of the variants need one common leading size, the number of variants, but they have "
                f"{sorted(sizes) or 'none'}: make the variants with stack"
            )
        return sizes.pop()

    @property
    def axes(self) -> tuple:
        """``in_axes`` of the interventions for ``jax.vmap``."""
        axes = [0 if is_mapped else None for is_mapped in self.mapped]
        return jax.tree.structure(self.interventions).unflatten(axes)

    def take(self, rows) -> "Variants":
        """The variants with the numbers ``rows``. For a single number the result has no axis of variants."""
        leaves, structure = jax.tree.flatten(self.interventions)
        leaves = [leaf[rows] if is_mapped else leaf for leaf, is_mapped in zip(leaves, self.mapped, strict=True)]
        return Variants(structure.unflatten(leaves), self.mapped)

    def chunk(self, at: jax.Array, size: int) -> tuple:
        """The interventions of ``size`` consecutive variants. ``at`` is the number of the first; it may be traced."""
        leaves, structure = jax.tree.flatten(self.interventions)
        return structure.unflatten(
            jax.lax.dynamic_slice_in_dim(leaf, at, size) if is_mapped else leaf
            for leaf, is_mapped in zip(leaves, self.mapped, strict=True)
        )

    @property
    def sites(self) -> frozenset[str]:
        """The sites that the variants change."""
        return frozenset().union(*(i.sites for i in self.interventions))

    @property
    def missing(self) -> frozenset[str]:
        """The sites for which the variants hold no values of a donor, so that they need the clean run's values."""
        return frozenset().union(*(i.missing for i in self.interventions))


def stack(variants: Sequence[Any]) -> Variants:
    """Joins variants into one batch.

    An array gets a leading axis of variants. The exception is an array that is the same object in all variants, such as
    a donor's values: it is stored once and shared.

    Args:
        variants: each is an intervention or a tuple of interventions.

    Raises:
        UserError: if the variants differ in more than their arrays' values.
    """
    tuples = [tuple(several(variant)) for variant in variants]
    if not tuples:
        raise UserError("there is no variant to stack: give at least one")
    leaves, structures = zip(*(jax.tree.flatten(v) for v in tuples), strict=True)
    shapes = [[(np.shape(a), jnp.result_type(a)) for a in arrays] for arrays in leaves]
    different = [i for i in range(len(tuples)) if structures[i] != structures[0] or shapes[i] != shapes[0]]
    if different:
        raise UserError(
            f"variant {different[0]} and variant 0 differ in kind, site, option or shape, but the variants of one "
            "sweep may differ only in the values of their arrays: use two sweeps"
        )
    by_leaf = list(zip(*leaves, strict=True))  # for each leaf, a tuple of its arrays in all variants
    mapped = tuple(any(array is not arrays[0] for array in arrays) for arrays in by_leaf)
    if mapped and not any(mapped):
        mapped = (True, *mapped[1:])  # at least one leaf must have the axis of variants, because it tells their number
    stacked = [jnp.stack(arrays) if is_mapped else arrays[0] for is_mapped, arrays in zip(mapped, by_leaf, strict=True)]
    return Variants(structures[0].unflatten(stacked), mapped)


def sized_variants(variants: Variants | Sequence[Any], depths: Mapping[str, int]) -> Variants:
    """The variants, stacked if they are a list, for a model with these depths
    (:meth:`vlm_jax.Intervention.sized`)."""
    if not isinstance(variants, Variants):
        return stack([acting(variant, depths) for variant in variants])
    flags = jax.tree.structure(variants.interventions).unflatten(variants.mapped)
    # A table has an axis of variants if one of the arrays that it is made of has one.
    joined = jax.tree.map(lambda flag: any(jax.tree.leaves(flag)), flags, is_leaf=lambda x: isinstance(x, Layers))
    return Variants(acting(variants.interventions, depths), tuple(jax.tree.leaves(joined)))


@dataclasses.dataclass(frozen=True)
class PerVariant(Intervention):
    """One intervention that applies the interventions of N variants. Each variant gets its own rows of a value.

    A value is ``(B * N, ...)``: the N variants of the first sample, then those of the second, and so on. So a mesh that
    splits the samples keeps all variants of a sample on one device.
    """

    interventions: tuple
    axes: tuple
    """``in_axes`` of the interventions for ``jax.vmap``."""
    count: int
    """The number N of variants."""

    @property
    def sites(self) -> frozenset[str]:
        return frozenset().union(*(i.sites for i in self.interventions))

    @property
    def by_query(self) -> bool:
        return splits_queries(self.interventions, "text.attn_scores", "text.attn_probs")

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        def split_rows(x):  # (B * N, ...) -> (B, N, ...)
            return None if x is None else x.reshape(-1, self.count, *x.shape[1:])

        def one_variant(interventions, value, input, own_values):
            read = None if own_values is None else ctx.read.replace(own=own_values)
            return Probe(interventions, NO_TAPS, ctx)(site, value, input, read, ctx.linear)

        # ``own_values`` are attention values (as in keys and values). They differ between variants; past ones do not.
        input, own_values = split_rows(ctx.input), split_rows(None if ctx.read is None else ctx.read.own)
        axes = (self.axes, 1, None if input is None else 1, None if own_values is None else 1)
        all_variants = jax.vmap(one_variant, in_axes=axes, out_axes=1)
        return all_variants(self.interventions, split_rows(value), input, own_values).reshape(value.shape)


def first_layers(variants: Variants, depth: int) -> Int[Array, "variants"]:
    """The first layer in which each variant acts. It is 0 if the variant acts before the layers, and ``depth`` if it
    acts only after the last layer or in no layer."""

    def first_of_variant(interventions):
        lowest = jnp.int32(depth)
        for i in interventions:
            active = i.active()
            for site in i.sites:
                lowest = jnp.minimum(lowest, _first_layer(site, active, depth))
        return lowest

    return jax.vmap(first_of_variant, in_axes=(variants.axes,))(variants.interventions)


def _first_layer(site: str, active: Mapping[str, jax.Array], depth: int) -> jax.Array | int:
    """The first layer in which an intervention acts at ``site``.

    Args:
        active: site -> in which layers it acts. At a site of the layers that is not listed, it acts in all layers.
    """
    match stage(site):
        case Stage.EXIT:
            return depth
        case Stage.LAYERS if site in active:
            table = jnp.asarray(active[site])
            return jnp.where(table.any(), jnp.argmax(table), depth)
        case _:
            return 0


def first_tokens(variants: Variants, length: int) -> Int[np.ndarray, "variants"]:
    """The index of the first prompt token on which each variant acts; ``length`` if it acts on no token.

    The arrays of the variants must be concrete, not traced, because the results are numbers for Python.
    """
    pairs = zip(variants.interventions, variants.axes, strict=True)
    return np.min([np.full(len(variants), _first_tokens(*pair, length)) for pair in pairs], 0)


def first_token(variants: Variants, length: int) -> int:
    """The index of the first prompt token that any variant changes; ``length`` if no token is changed.

    Interventions that only copy values of the clean run do not count. Before the first token at which the clean run and
    the base run differ, such a copy changes nothing. The caller finds that token from those two runs.
    """
    pairs = zip(variants.interventions, variants.axes, strict=True)
    changing = [pair for pair in pairs if pair[0].missing != pair[0].sites]
    return min((int(np.min(_first_tokens(*pair, length))) for pair in changing), default=length)


def _first_tokens(intervention: Intervention, axes: Any, length: int) -> Int[np.ndarray, "variants"] | int:
    """The first token on which an intervention acts: of each variant, or one number for all.

    Args:
        axes: ``in_axes`` of the intervention for ``jax.vmap``.
    """
    if Stage.VISION in map(stage, intervention.sites):
        return 0
    is_mapped = bool(jax.tree.leaves(axes))
    tokens = jax.vmap(lambda i: i.tokens(), in_axes=(axes,))(intervention) if is_mapped else intervention.tokens()
    if tokens is None:
        return intervention.start
    tokens = fetch(tokens)
    changed = tokens.reshape(len(tokens) if is_mapped else 1, -1, length).any(1)  # in any row
    firsts = np.where(changed.any(1), changed.argmax(1), length)
    return firsts if is_mapped else int(firsts[0])


def check_acts(variants: Variants) -> None:
    """Checks that every intervention of every variant acts somewhere.

    Raises:
        UserError: if one acts in no layer or head, or on no token.
    """

    def acts_of_variant(interventions):
        return jnp.array([_acts(i) for i in interventions], bool)

    for number, acts in enumerate(fetch(jax.vmap(acts_of_variant, in_axes=(variants.axes,))(variants.interventions))):
        if not acts.all():
            kind = type(variants.interventions[int(acts.argmin())]).__name__
            raise UserError(f"variant {number} touches nothing: its {kind} acts in no layer or head, or on no token")


def _acts(intervention: Intervention) -> jax.Array | bool:
    """Whether an intervention acts in at least one layer and on at least one token."""
    active, tokens = intervention.active(), intervention.tokens()
    in_all_layers = not intervention.sites <= active.keys()  # it acts in all layers of a site that is not listed
    in_a_layer = functools.reduce(jnp.logical_or, map(jnp.any, active.values()), in_all_layers)
    return in_a_layer if tokens is None else in_a_layer & jnp.any(tokens)
