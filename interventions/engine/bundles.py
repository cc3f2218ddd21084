"""Bundles: the variants of a sweep, sorted by the token at which they begin to differ from the base run.

Attention is causal, so a variant that first acts on token t equals the base run before t. A bundle carries only the
tokens from the first one on which any of its variants acts. In a grid over every token this halves the work.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import numpy as np
from jaxtyping import Int

from interventions.engine.chunks import chunk_of
from interventions.engine.prefix import outside_blocks
from interventions.engine.variants import Variants, first_tokens
from vlm_jax import Inputs, Model
from vlm_jax.mesh.sharding import shards
from vlm_jax.nn.visibility import both_ways

#: Bytes that the states of the variants in one sweep may take.
LIVE_BYTES = 2**30
#: A sweep has at most this many bundles, because each is one more copy of the layer to compile. It has one bundle
#: unless more save this share of the variants' tokens.
_MOST, _WORTH = 6, 0.25


@flax.struct.dataclass
class Bundle:
    """Variants that equal the base run before the token ``begin``. ``chunk`` of them are worked on together."""

    variants: Variants
    begin: int = flax.struct.field(pytree_node=False)
    chunk: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """The sweeps that a set of variants needs: more than one if their states take too much memory at once. Their
    bundles have the same sizes, so that all are one program.

    position: the place of every variant among the bundles' variants, sweep after sweep and bundle after bundle.
    """

    bundles: list[tuple[Bundle, ...]]
    position: Int[np.ndarray, "variants"]


def bundled(
    model: Model, inputs: Inputs, variants: Variants, start: int, chunk: int | None = None, backend: str | None = None
) -> Sweeps:
    """Bundles variants that share the tokens before ``start``.

    Args:
        chunk, backend: see :func:`interventions.engine.sweep.sweep_runs` and
            :func:`interventions.engine.chunks.chunk_of`.
    """
    batch, length = inputs.input_ids.shape
    rows = _by_token(model, inputs, first_tokens(variants, length), start)
    tokens = batch * sum(len(numbers) * (length - begin) for begin, numbers in rows.items())
    most = LIVE_BYTES * shards("batch", batch) // (4 * model.config.text.hidden_size)
    sweeps = -(-tokens // most)
    sizes = {begin: -(-len(numbers) // sweeps) for begin, numbers in rows.items()}
    bundles, order = [], []
    for sweep in range(sweeps):
        bundles.append([])
        for begin, size in sizes.items():
            at = np.arange(sweep * size, (sweep + 1) * size)
            numbers = rows[begin][np.minimum(at, len(rows[begin]) - 1)]  # the last variant fills up the last bundle
            order.extend(numbers.tolist())
            whole = len(numbers) == len(variants)
            bundles[-1].append(
                Bundle(
                    variants if whole else variants.take(numbers),
                    begin,
                    min(size, chunk_of(inputs, begin, backend) if chunk is None else chunk),
                )
            )
    return Sweeps([tuple(of_sweep) for of_sweep in bundles], np.unique(order, return_index=True)[1])


def _by_token(
    model: Model, inputs: Inputs, firsts: Sequence[int], start: int
) -> dict[int, Int[np.ndarray, "some_variants"]]:
    """The first token of every bundle -> the numbers of its variants."""
    length, firsts = inputs.input_ids.shape[1], np.asarray(firsts)
    everyone = np.arange(len(firsts))
    step = -(-(length - start) // _MOST)
    begins = start + (np.clip(firsts, start, length - 1) - start) // step * step
    text = model.config.text
    if (block := both_ways(inputs.tokens, text.registers, text.bidirectional_images)) is not None:
        outside = {begin: outside_blocks(np.asarray(block), int(begin)) for begin in np.unique(begins)}
        begins = np.array([outside[begin] for begin in begins])
    if (begins - start).sum() < _WORTH * len(firsts) * (length - start):
        return {start: everyone}
    return {int(begin): everyone[begins == begin] for begin in np.unique(begins)}
