"""What the vision towers share: the features they return, and a scan over blocks that keeps some blocks' outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.sites import BLOCK_SITES, Context, Probe


class Features(NamedTuple):
    """Visual tokens in the decoder's width: merged ``(I, tokens, D)``, deepstack ``(K, I, tokens, D)`` or None."""

    merged: jax.Array
    deepstack: jax.Array | None = None


def scan_blocks(
    blocks: Any,
    x: jax.Array,
    call: Callable[[Any, jax.Array, Any, Probe], jax.Array],
    *,
    each: Any = None,
    keep: tuple[int, ...] = (),
    interventions=(),
    taps: frozenset[str] = frozenset(),
):
    """Runs stacked blocks on ``x (I, P, W)``.

    Args:
        call: ``(block, x, each, probe) -> x``; each: arrays with one entry per block.
        keep: the blocks whose outputs to keep, each once.

    Returns:
        The last output, the kept ones ``(len(keep), I, P, W)``, and the taps with a leading block axis.
    """
    depth, count = len(jax.tree.leaves(blocks)[0]), len(keep)
    slots = jnp.full(depth, count).at[jnp.array(keep, int)].set(jnp.arange(count))

    def body(carry, scanned):
        x, kept = carry
        block, index, slot, each = scanned
        probe = Probe(interventions, taps & BLOCK_SITES, Context(layer=index))
        x = call(block, x, each, probe)
        return (x, kept.at[slot].set(x, mode="drop") if count else kept), probe.taps

    kept = jnp.zeros((count, *x.shape), x.dtype)
    (x, kept), tapped = jax.lax.scan(body, (x, kept), (blocks, jnp.arange(depth), slots, each))
    return x, kept, tapped
