"""The sweep engine: N variants of one base run, exactly, at a fraction of the cost of N runs.

Three facts make it cheap. Attention is causal, so the tokens before the first one that any run changes are computed
once and only attended to (shared prefix). A variant that first acts in layer l equals its base run below l, so it
starts there from the base run's residual (shared depth). And only what ``read`` looks at is unembedded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.decoder import Decoder, Window
from vlm_jax.sites import Context, Probe

#: Tokens that one chunk of variants works on: large enough for full matmuls, small enough to stay in cache.
CHUNK_TOKENS = 4096


def sweep(
    text: Decoder,
    window: Window,
    past: tuple[jax.Array, jax.Array] | None,
    resid: jax.Array,
    deepstack: jax.Array | None,
    variants: Any,
    axes: Any,
    first_layer: jax.Array,
    read: Callable[[jax.Array], Any],
) -> Any:
    """What ``read`` makes of every variant's last hidden state.

    Args:
        window: the tokens that differ between runs; ``past``: keys and values ``(L, B, P, G, head_dim)`` of the
            tokens before them, the same in every run.
        resid: ``(L, B, S, D)``, the base run's ``resid_pre`` of every layer.
        deepstack: ``(K, B, S, D)`` or None, the same in every run.
        variants: an intervention with a leading axis of N on the arrays that ``axes`` (as in ``jax.vmap``) marks
            with 0; arrays marked None are shared.
        first_layer: ``(N,)`` int32, ascending: below this layer a variant equals its base run.
        read: ``(B, S, D)`` after the last layer (before the final norm) -> any pytree.

    Returns:
        The read-outs with a leading axis of N.
    """
    depth, batch, length, _ = resid.shape
    count = first_layer.shape[0]
    chunk = min(count, max(1, CHUNK_TOKENS // (batch * length)))
    padded = -(-count // chunk) * chunk

    def pad(array):
        return jnp.concatenate([array, jnp.repeat(array[-1:], padded - count, 0)])

    # A padding variant never comes alive: its first layer lies behind the last.
    first = jnp.where(jnp.arange(padded) < count, pad(first_layer), depth)
    leaves, treedef = jax.tree.flatten(variants)
    mapped = [axis == 0 for axis in _broadcast_axes(axes, variants)]
    leaves = [pad(leaf) if moves else leaf for leaf, moves in zip(leaves, mapped, strict=True)]
    in_axes = treedef.unflatten([0 if moves else None for moves in mapped])

    def through_layer(live, scanned):
        layer, index, past, base = scanned
        added = text.deepstack_at(deepstack, index)
        here = text.at(window, index)

        def one(x, variant):
            return layer(x, here, past, added, Probe((variant,), frozenset(), Context(index, None, window.start)))[0]

        def step(i, live):
            at = i * chunk
            starts = jax.lax.dynamic_slice_in_dim(first, at, chunk)
            x = jax.lax.dynamic_slice_in_dim(live, at, chunk)
            x = jnp.where((starts == index)[:, None, None, None], base, x)
            these = [
                jax.lax.dynamic_slice_in_dim(leaf, at, chunk) if moves else leaf
                for leaf, moves in zip(leaves, mapped, strict=True)
            ]
            x = jax.vmap(one, in_axes=(0, in_axes))(x, treedef.unflatten(these))
            return jax.lax.dynamic_update_slice_in_dim(live, x, at, 0)

        alive = jnp.sum(first <= index)
        return jax.lax.fori_loop(0, -(-alive // chunk), step, live), None

    live = jnp.zeros((padded, *resid.shape[1:]), resid.dtype)
    live, _ = jax.lax.scan(through_layer, live, (text.layers, jnp.arange(depth), past, resid))
    return jax.lax.map(read, live[:count], batch_size=chunk)


def _broadcast_axes(axes: Any, tree: Any) -> list[int | None]:
    """``axes``, a prefix of ``tree`` with 0 and None, as one entry per leaf of ``tree``."""
    out: list[int | None] = []

    def spread(axis, subtree):
        out.extend([axis] * len(jax.tree.leaves(subtree)))

    jax.tree.map(spread, axes, tree, is_leaf=lambda x: x is None)
    return out
