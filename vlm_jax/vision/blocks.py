"""What the vision towers share: the features they return, and a scan over blocks that keeps some blocks' outputs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.mesh.sharding import constrain
from vlm_jax.sites import BLOCK_SITES, NO_TAPS, Context, Probe, Tap, scan_layers


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
    taps: Mapping[str, Tap] = NO_TAPS,
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

    taps = {site: tap for site, tap in taps.items() if site in BLOCK_SITES}

    def body(carry, scanned, index):
        x, kept = carry
        block, slot, each = scanned
        probe = Probe(interventions, taps, Context(index))
        x = call(block, constrain(x, "batch", None, None), each, probe)
        return (x, kept.at[slot].set(x, mode="drop") if count else kept), None, probe.taps

    body = jax.checkpoint(body)  # trained towers keep what goes into a block, not the attention of thousands of patches
    kept = jnp.zeros((count, *x.shape), x.dtype)
    (x, kept), _, tapped = scan_layers(body, (x, kept), (blocks, slots, each), jnp.arange(depth), taps)
    return x, kept, tapped
