"""Grids of variants: a patch or a cut in every layer, head, window of layers or token group, as one batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from interventions.engine.variants import Variants
from interventions.kinds.gates import Gate, HeadGate
from interventions.kinds.patch import Patch
from vlm_jax import UserError
from vlm_jax.typing import ArrayLike


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
) -> tuple[Variants, tuple[int, ...]]:
    """A patch of the clean run's values for every site, layer, head and token group.

    Args:
        window: how many layers around each layer a variant patches.
        heads: patch each of this many heads by itself (sites that have heads); None: all at once.
        tokens: masks, each patched by itself (:func:`each_token` for every token); None: all tokens at once.

    Returns:
        The variants, and the shape of their grid: ``(sites, L)``, then heads, then token groups where given.
    """
    shape = (len(sites), depth, *(() if heads is None else (heads,)), *(() if tokens is None else (len(tokens),)))
    cells = np.indices(shape).reshape(len(shape), -1)  # (axes of the grid, N)
    in_window = layer_windows(depth, window)[cells[1]]  # (N, L)
    # Slot 0 is the clean run's value. 1 is the number of slots, so it means no slot.
    slot = {
        site: jnp.asarray(~(in_window & (cells[0] == number)[:, None]), jnp.int32) for number, site in enumerate(sites)
    }
    one_hot = None if heads is None else jnp.arange(heads) == cells[2][:, None]
    where = None if tokens is None else jnp.stack([jnp.asarray(mask) for mask in tokens])[cells[-1]]
    patch = Patch(dict.fromkeys(sites), slot, where, one_hot)
    return Variants((patch,), (True,) * len(jax.tree.leaves(patch))), shape


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
