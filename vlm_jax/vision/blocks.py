"""What the vision towers share: the features that they return, and a loop over their blocks."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from vlm_jax.mesh.sharding import constrain
from vlm_jax.sites import BLOCK_SITES, NO_TAPS, Context, Probe, Tap, scan_layers
from vlm_jax.typing import Array, ArrayLike


class Features(NamedTuple):
    """What a vision tower gives to the decoder. ``width`` is the decoder's width."""

    merged: Float[Array, "images tokens width"]
    """The visual tokens. They replace the embeddings of the image tokens."""
    deepstack: Float[Array, "levels images tokens width"] | None = None
    """Outputs of intermediate vision blocks. DeepStack adds the first level to the image tokens after the decoder's
    layer 0, the second after layer 1, and so on. None if the model has no DeepStack."""


def scan_blocks(
    blocks: Any,
    x: Float[ArrayLike, "images patches width"],
    call: Callable[[Any, jax.Array, Any, Probe], jax.Array],
    *,
    each: Any = None,
    keep: tuple[int, ...] = (),
    interventions: Sequence[Any] = (),
    taps: Mapping[str, Tap] = NO_TAPS,
    frozen: int = 0,
) -> tuple[Float[Array, "images patches width"], Float[Array, "kept images patches width"], dict[str, Any]]:
    """Runs all blocks on ``x``, one after the other.

    Args:
        blocks: the stacked blocks: a pytree like one block, whose arrays have a leading axis of blocks.
        call: a function that runs one block, ``(block, x, entry, probe) -> x``. ``entry`` is the block's entry of
            ``each``.
        each: a pytree of arrays with one entry for each block; None if ``call`` needs none.
        keep: the numbers of the blocks whose outputs are returned too, each at most once.
        interventions: the interventions of the forward pass; those at sites of the blocks act here.
        taps: site -> tap; those at sites of the blocks are collected here.
        frozen: a backward pass does not run through the blocks before this one. No intervention and no tap may act
            there.

    Returns:
        The output of the last block, the outputs of the blocks in ``keep`` (in its order), and the tapped values, site
        -> values with a leading axis of blocks.
    """
    depth, kept_count = len(jax.tree.leaves(blocks)[0]), len(keep)
    # Block -> its index in the array ``kept``. For other blocks the index is too large, so nothing is written.
    slots = jnp.full(depth, kept_count).at[jnp.array(keep, int)].set(jnp.arange(kept_count))

    taps = {site: tap for site, tap in taps.items() if site in BLOCK_SITES}

    def body(carry, scanned, index, acting=interventions):
        x, kept = carry
        block, slot, entry = scanned
        probe = Probe(acting, taps, Context(index))
        x = call(block, constrain(x, "batch", None, None), entry, probe)
        return (x, kept.at[slot].set(x, mode="drop") if kept_count else kept), None, probe.taps

    # A backward pass needs the attention of thousands of patches in each block. With jax.checkpoint only the input of
    # each block is stored, and the rest is computed again.
    run = jax.checkpoint(body)
    carry = x, jnp.zeros((kept_count, *x.shape), x.dtype)
    scanned = blocks, slots, each
    if frozen:
        below, scanned = (jax.tree.map(lambda a, s=s: a[s], scanned) for s in (slice(frozen), slice(frozen, None)))
        carry, _, _ = scan_layers(functools.partial(body, acting=()), carry, below, jnp.arange(frozen), {})
    (x, kept), _, tapped = scan_layers(run, carry, scanned, jnp.arange(frozen, depth), taps)
    return x, kept, tapped
