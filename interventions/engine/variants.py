"""Variants of a run: N interventions that differ only in values, as one pytree, and where in a pass they act."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from vlm_jax import UserError
from vlm_jax.runs.processes import fetch
from vlm_jax.sites import NO_TAPS, Context, Intervention, Probe, Stage, stage
from vlm_jax.typing import Array


@flax.struct.dataclass
class Variants:
    """N variants: a tuple of interventions whose ``mapped`` leaves have a leading axis of N; the others are shared."""

    interventions: tuple
    mapped: tuple[bool, ...] = flax.struct.field(pytree_node=False)

    def __len__(self) -> int:
        leaves = zip(jax.tree.leaves(self.interventions), self.mapped, strict=True)
        sizes = {len(leaf) for leaf, is_mapped in leaves if is_mapped}
        if len(sizes) != 1:
            raise UserError(
                f"the variants' arrays have {sorted(sizes) or 'no'} leading sizes: stack at least one variant"
            )
        return sizes.pop()

    @property
    def axes(self) -> tuple:
        """``in_axes`` of the interventions for ``jax.vmap``."""
        axes = [0 if is_mapped else None for is_mapped in self.mapped]
        return jax.tree.structure(self.interventions).unflatten(axes)

    def take(self, rows) -> "Variants":
        """The variants ``rows``: an index (the result has no axis of variants) or an array of them."""
        leaves, structure = jax.tree.flatten(self.interventions)
        leaves = [leaf[rows] if is_mapped else leaf for leaf, is_mapped in zip(leaves, self.mapped, strict=True)]
        return Variants(structure.unflatten(leaves), self.mapped)

    def chunk(self, at: jax.Array, size: int) -> tuple:
        """The interventions of ``size`` variants from a traced index on."""
        leaves, structure = jax.tree.flatten(self.interventions)
        return structure.unflatten(
            jax.lax.dynamic_slice_in_dim(leaf, at, size) if is_mapped else leaf
            for leaf, is_mapped in zip(leaves, self.mapped, strict=True)
        )

    @property
    def sites(self) -> frozenset[str]:
        return frozenset().union(*(i.sites for i in self.interventions))

    @property
    def missing(self) -> frozenset[str]:
        """The sites at which they take the clean run's values."""
        return frozenset().union(*(i.missing for i in self.interventions))


def stack(variants: Sequence[Any]) -> Variants:
    """Variants, each an intervention or a tuple of them, as one batch. An array that is the same object in all of them
    (a donor) stays shared.

    Raises:
        UserError: if the variants differ in more than their arrays' values.
    """
    tuples = [v if isinstance(v, tuple) else (v,) for v in variants]
    if not tuples:
        raise UserError("there is no variant to stack: give at least one")
    leaves, structures = zip(*(jax.tree.flatten(v) for v in tuples), strict=True)
    shapes = [[(np.shape(a), jnp.result_type(a)) for a in arrays] for arrays in leaves]
    odd = [i for i in range(len(tuples)) if structures[i] != structures[0] or shapes[i] != shapes[0]]
    if odd:
        raise UserError(
            f"variant {odd[0]} differs from variant 0 in more than values (kind, site, option, shape): use two sweeps"
        )
    columns = list(zip(*leaves, strict=True))  # per array, its values in all variants
    mapped = tuple(any(a is not column[0] for a in column) for column in columns)
    if mapped and not any(mapped):
        mapped = (True, *mapped[1:])
    stacked = [jnp.stack(column) if is_mapped else column[0] for is_mapped, column in zip(mapped, columns, strict=True)]
    return Variants(structures[0].unflatten(stacked), mapped)


@dataclasses.dataclass(frozen=True)
class PerVariant(Intervention):
    """The interventions of N variants as one intervention, on values ``(B * N, ...)`` that hold the rows of all
    variants, sample by sample: on a mesh that splits the samples, all variants of a sample are on one device."""

    interventions: tuple
    axes: tuple
    count: int

    @property
    def sites(self) -> frozenset[str]:
        return frozenset().union(*(i.sites for i in self.interventions))

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        def by_variant(x):
            return None if x is None else x.reshape(-1, self.count, *x.shape[1:])

        def one_variant(interventions, value, input, values_read):
            read = None if values_read is None else ctx.read.replace(own=values_read)
            return Probe(interventions, NO_TAPS, ctx)(site, value, input, read)

        input, values_read = by_variant(ctx.input), by_variant(None if ctx.read is None else ctx.read.own)
        axes = (self.axes, 1, None if input is None else 1, None if values_read is None else 1)
        mapped = jax.vmap(one_variant, in_axes=axes, out_axes=1)
        return mapped(self.interventions, by_variant(value), input, values_read).reshape(value.shape)


def first_layers(variants: Variants, depth: int) -> Int[Array, "variants"]:
    """The layer in which each variant first acts: 0 where it changes what enters the layers, ``depth`` where
    it acts behind them."""

    def first(interventions):
        lowest = jnp.int32(depth)
        for i in interventions:
            active = i.active()
            for site in i.sites:
                lowest = jnp.minimum(lowest, _first_layer(site, active, depth))
        return lowest

    return jax.vmap(first, in_axes=(variants.axes,))(variants.interventions)


def _first_layer(site: str, active: Mapping[str, jax.Array], depth: int) -> jax.Array | int:
    match stage(site):
        case Stage.EXIT:
            return depth
        case Stage.LAYERS if site in active:
            table = jnp.asarray(active[site])
            return jnp.where(table.any(), jnp.argmax(table), depth)
        case _:
            return 0


def first_token(variants: Variants, length: int) -> int:
    """The first token of the prompt that any variant changes (concrete arrays only)."""
    firsts = []
    for intervention, axes in zip(variants.interventions, variants.axes, strict=True):
        if intervention.missing == intervention.sites:
            continue  # the clean run's values differ from the base run's only where those two differ
        if Stage.VISION in map(stage, intervention.sites):
            return 0
        is_mapped = bool(jax.tree.leaves(axes))
        where = jax.vmap(lambda i: i.tokens(), in_axes=(axes,))(intervention) if is_mapped else intervention.tokens()
        if where is None:
            firsts.append(intervention.start)
            continue
        marked = fetch(where).reshape(-1, length).any(0)
        firsts.append(int(marked.argmax()) if marked.any() else length)
    return min(firsts, default=length)


def check_acts(variants: Variants) -> None:
    """Refuses variants with an intervention that acts nowhere."""

    def acts(interventions):
        return jnp.array([_acts(i) for i in interventions], bool)

    for number, acting in enumerate(fetch(jax.vmap(acts, in_axes=(variants.axes,))(variants.interventions))):
        if not acting.all():
            kind = type(variants.interventions[int(acting.argmin())]).__name__
            raise UserError(f"variant {number} touches nothing: its {kind} acts in no layer or head, or on no token")


def _acts(intervention: Intervention) -> jax.Array | bool:
    active, tokens = intervention.active(), intervention.tokens()
    everywhere = not intervention.sites <= active.keys()
    in_a_layer = functools.reduce(jnp.logical_or, map(jnp.any, active.values()), everywhere)
    return in_a_layer if tokens is None else in_a_layer & jnp.any(tokens)
