"""Grids of variants: a patch or a cut in every layer, head, window of layers or token group, as one batch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from interventions.engine.variants import Variants
from interventions.kinds.ablation import Ablation
from interventions.kinds.gates import Gate, HeadGate
from interventions.kinds.patch import Patch
from vlm_jax import UserError
from vlm_jax.typing import Array, ArrayLike


def layer_windows(depth: int, width: int = 1) -> Bool[np.ndarray, "layers layers"]:
    """Windows of layers: row l marks the ``width`` layers around l, cut off at the ends. With an even width, the window
    has one more layer before l than after it (ROME's windows of 10: [l - 5, l + 5))."""
    if not 1 <= width <= depth:
        raise UserError(f"a window of {width} layers is not possible: choose 1 to {depth}")
    low = np.arange(depth)[:, None] - width // 2
    return (np.arange(depth) >= low) & (np.arange(depth) < low + width)


def each_token(mask: Bool[np.ndarray, "batch tokens"]) -> list[Bool[np.ndarray, "batch tokens"]]:
    """Every token that ``mask`` marks in any row by itself, as a mask of the rows that have it: the ``tokens`` of a
    :func:`patch_grid` over every token."""
    return [mask & (np.arange(mask.shape[1]) == token) for token in np.flatnonzero(mask.any(0))]


def patch_grid(
    sites: Sequence[str],
    depth: int,
    *,
    window: int = 1,
    heads: int | None = None,
    tokens: Sequence[Bool[ArrayLike, "batch tokens"]] | None = None,
    donor: Mapping[str, Float[ArrayLike, "layers batch tokens ..."]] | None = None,
) -> tuple[Variants, tuple[int, ...]]:
    """A patch of the clean run's values, or a donor's, for every site, layer, head and token group.

    Args:
        window: how many layers around each layer a variant patches.
        heads: patch each of this many heads by itself (sites that have heads); None: all at once.
        tokens: masks, each patched by itself (:func:`each_token` for every token); None: all tokens at once.
        donor: site -> the values to patch in every layer; None: those of the clean run, which the sweep computes.

    Returns:
        The variants, and the shape of their grid: ``(sites, L)``, then heads, then token groups where given.
    """
    cells = _cells(sites, depth, window, heads, tokens, own_slots=donor is not None)
    values = dict.fromkeys(sites) if donor is None else {site: jnp.asarray(donor[site]) for site in sites}
    patch = Patch(values, cells.slot, cells.where, cells.heads)
    varied = patch.replace(donor=dict.fromkeys(sites))
    return Variants((patch,), _mapped(patch, varied)), cells.shape


def ablation_grid(
    ablation: Ablation,
    sites: Sequence[str],
    depth: int,
    *,
    window: int = 1,
    heads: int | None = None,
    tokens: Sequence[Bool[ArrayLike, "batch tokens"]] | None = None,
) -> tuple[Variants, tuple[int, ...]]:
    """An :class:`Ablation` of every site, layer, head and token group; arguments and results as for :func:`patch_grid`.

    Args:
        ablation: zeros, or means of all layers (slot l for layer l), bound to the batch.
    """
    by_mean = ablation.known is not None
    cells = _cells(sites, depth, window, heads, tokens, own_slots=by_mean)
    one = ablation.replace(slot=cells.slot, where=cells.where, heads=cells.heads)
    varied = one.replace(mean=dict.fromkeys(sites), known=None, labels=None)
    return Variants((one,), _mapped(one, varied)), cells.shape


class _Cells(NamedTuple):
    """Where each of N variants of a grid acts."""

    shape: tuple[int, ...]
    slot: dict[str, Int[Array, "variants layers"]]
    where: Bool[Array, "variants batch tokens"] | None
    heads: Bool[Array, "variants heads"] | None


def _mapped(one: Any, varied: Any) -> tuple[bool, ...]:
    """For each leaf of an intervention whether it is one of ``varied``, the same intervention without shared arrays."""
    own = {id(leaf) for leaf in jax.tree.leaves(varied)}
    return tuple(id(leaf) in own for leaf in jax.tree.leaves(one))


def _cells(
    sites: Sequence[str],
    depth: int,
    window: int,
    heads: int | None,
    tokens: Sequence[Bool[ArrayLike, "batch tokens"]] | None,
    own_slots: bool,
) -> _Cells:
    """The cells of a grid. ``own_slots``: layer l uses slot l, instead of slot 0."""
    shape = (len(sites), depth, *(() if heads is None else (heads,)), *(() if tokens is None else (len(tokens),)))
    cells = np.indices(shape).reshape(len(shape), -1)  # (axes of the grid, N)
    in_window = layer_windows(depth, window)[cells[1]]  # (N, L)
    used, none = (np.arange(depth), depth) if own_slots else (0, 1)  # the number of slots means no slot
    slot = {
        site: jnp.asarray(np.where(in_window & (cells[0] == number)[:, None], used, none), jnp.int32)
        for number, site in enumerate(sites)
    }
    one_hot = None if heads is None else jnp.arange(heads) == cells[2][:, None]
    where = None if tokens is None else jnp.stack([jnp.asarray(mask) for mask in tokens])[cells[-1]]
    return _Cells(shape, slot, where, one_hot)


def cut_grid(depth: int, modules: Sequence[str] = ("attn", "mlp"), window: int = 1, scale: float = 0.0) -> Variants:
    """A :class:`Gate` for every module and window of layers, ``len(modules) * depth`` of them, module by module."""
    in_window = layer_windows(depth, window)
    scales = {
        f"text.{module}_out": np.concatenate(
            [np.where(in_window & (m == number), scale, 1) for m in range(len(modules))]
        )
        for number, module in enumerate(modules)
    }
    gate = Gate({site: jnp.asarray(value, jnp.float32) for site, value in scales.items()})
    return Variants((gate,), (True,) * len(modules))


def head_grid(depth: int, heads: int, scale: float = 0.0) -> Variants:
    """A :class:`HeadGate` for every head of every layer, ``depth * heads`` of them, layer by layer."""
    scales = 1 - (1 - scale) * np.eye(depth * heads, dtype=np.float32)
    return Variants((HeadGate(jnp.asarray(scales.reshape(-1, depth, heads))),), (True,))
