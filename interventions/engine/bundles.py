"""Bundles: the variants of a sweep, sorted by the token at which they begin to differ from the base run.

Attention is causal, so a variant that first acts on token t equals the base run before t. A bundle carries only the
tokens from the first one on which any of its variants acts. In a grid over every token this
saves nearly half of the work.
"""

import dataclasses
from collections.abc import Iterator

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
#: A sweep has at most this many bundles, because each is one more copy of the layer to compile. It has one bundle if
#: there are fewer variants than this, or if more bundles would save less than this share of the variants' tokens.
_MOST_BUNDLES, _FEWEST_VARIANTS, _LEAST_SAVING = 6, 64, 0.25


@flax.struct.dataclass
class Bundle:
    """Variants that equal the base run before the token ``begin``. ``chunk`` of them are worked on together."""

    variants: Variants
    begin: int = flax.struct.field(pytree_node=False)
    chunk: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """The sweeps that a set of variants needs: more than one if their states take too much memory at once. Iterating
    gives the bundles of each. Those of all sweeps have the same sizes, so one program runs all.

    numbers: the first token of a bundle -> the numbers of its variants, of all sweeps.
    chunks: the first token of a bundle -> how many of its variants are worked on together.
    count: the number of sweeps.
    """

    variants: Variants
    numbers: dict[int, Int[np.ndarray, "some_variants"]]
    chunks: dict[int, int]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Bundle, ...]]:
        for sweep in range(self.count):
            yield tuple(
                Bundle(self._taken(numbers), begin, min(len(numbers), self.chunks[begin]))
                for begin, numbers in self._part(sweep).items()
            )

    def _taken(self, numbers: Int[np.ndarray, "some_variants"]) -> Variants:
        return self.variants if len(numbers) == len(self.variants) else self.variants.take(numbers)

    def _part(self, sweep: int) -> dict[int, Int[np.ndarray, "some_variants"]]:
        part = {}
        for begin, numbers in self.numbers.items():
            size = -(-len(numbers) // self.count)
            at = np.arange(sweep * size, (sweep + 1) * size)
            part[begin] = numbers[np.minimum(at, len(numbers) - 1)]  # the last variant fills up the last bundle
        return part

    @property
    def position(self) -> Int[np.ndarray, "variants"]:
        """The place of every variant among the bundles' variants, sweep after sweep and bundle after bundle."""
        parts = [numbers for sweep in range(self.count) for numbers in self._part(sweep).values()]
        return np.unique(np.concatenate(parts), return_index=True)[1]


def bundled(
    model: Model, inputs: Inputs, variants: Variants, start: int, chunk: int | None = None, backend: str | None = None
) -> Sweeps:
    """Bundles variants that share the tokens before ``start``.

    Args:
        chunk, backend: see :func:`interventions.engine.sweep.sweep_runs` and
            :func:`interventions.engine.chunks.chunk_of`.
    """
    batch, length = inputs.input_ids.shape
    numbers = _by_token(model, inputs, first_tokens(variants, length), start)
    tokens = batch * sum(len(some) * (length - begin) for begin, some in numbers.items())
    most = LIVE_BYTES * shards("batch", batch) // (4 * model.config.text.hidden_size)
    count = min(-(-tokens // most), max(map(len, numbers.values())))
    chunks = {begin: chunk_of(inputs, begin, backend) if chunk is None else chunk for begin in numbers}
    return Sweeps(variants, numbers, chunks, count)


def _by_token(
    model: Model, inputs: Inputs, firsts: Int[np.ndarray, "variants"], start: int
) -> dict[int, Int[np.ndarray, "some_variants"]]:
    """The first token of every bundle -> the numbers of its variants."""
    length, everyone = inputs.input_ids.shape[1], np.arange(len(firsts))
    step = -(-(length - start) // _MOST_BUNDLES)
    begins = start + (np.clip(firsts, start, length - 1) - start) // step * step
    text = model.config.text
    if (block := both_ways(inputs.tokens, text.registers, text.bidirectional_images)) is not None:
        outside = {begin: outside_blocks(np.asarray(block), int(begin)) for begin in np.unique(begins)}
        begins = np.array([outside[begin] for begin in begins])
    saved = (begins - start).sum() / (len(firsts) * (length - start))
    if len(firsts) < _FEWEST_VARIANTS or saved < _LEAST_SAVING:
        return {start: everyone}
    return {int(begin): everyone[begins == begin] for begin in np.unique(begins)}
