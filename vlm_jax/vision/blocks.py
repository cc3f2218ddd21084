"""What the vision towers share: the features they return, and a scan over blocks that keeps some blocks' outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from vlm_jax.mesh.sharding import constrain
from vlm_jax.sites import BLOCK_SITES, NO_TAPS, Context, Probe, Tap, scan_layers
from vlm_jax.typing import Array, ArrayLike


class Features(NamedTuple):
    """Visual tokens in the decoder's width, and what DeepStack adds after its first ``levels`` layers."""

    merged: Float[Array, "images tokens width"]
    deepstack: Float[Array, "levels images tokens width"] | None = None


def scan_blocks(
    blocks: Any,
    x: Float[ArrayLike, "images patches width"],
    call: Callable[[Any, jax.Array, Any, Probe], jax.Array],
    *,
    each: Any = None,
    keep: tuple[int, ...] = (),
    interventions: Sequence[Any] = (),
    taps: Mapping[str, Tap] = NO_TAPS,
) -> tuple[Float[Array, "images patches width"], Float[Array, "kept images patches width"], dict[str, Any]]:
    """Runs stacked blocks on ``x``.

    Args:
        blocks: one block whose arrays have a leading axis of blocks.
        call: ``(block, x, its entry of each, probe) -> x``.
        each: a pytree of arrays with one entry per block.
        keep: the blocks whose outputs to keep; name each once.

    Returns:
        The last output, the kept outputs in the order of ``keep``, and the taps with a leading axis of blocks.
    """
    depth, count = len(jax.tree.leaves(blocks)[0]), len(keep)
    slots = jnp.full(depth, count).at[jnp.array(keep, int)].set(jnp.arange(count))

    taps = {site: tap for site, tap in taps.items() if site in BLOCK_SITES}

    def body(carry, scanned, index):
        x, kept = carry
        block, slot, entry = scanned
        probe = Probe(interventions, taps, Context(index))
        x = call(block, constrain(x, "batch", None, None), entry, probe)
        return (x, kept.at[slot].set(x, mode="drop") if count else kept), None, probe.taps

    # For a backward pass each block keeps only its input; the attention of thousands of patches is computed again.
    body = jax.checkpoint(body)
    kept = jnp.zeros((count, *x.shape), x.dtype)
    (x, kept), _, tapped = scan_layers(body, (x, kept), (blocks, slots, each), jnp.arange(depth), taps)
    return x, kept, tapped
