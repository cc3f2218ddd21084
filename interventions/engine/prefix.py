"""The shared prefix: how many tokens are the same in all runs of a sweep, and so are computed once."""

import numpy as np
from jaxtyping import Int

from interventions.engine.read import ReadOut
from interventions.engine.variants import Variants, first_token, stack
from vlm_jax import Inputs, Model
from vlm_jax.nn.visibility import both_ways

#: The shared prefix ends at a multiple of this, so that prompts of nearly the same shape share a program.
PREFIX_BUCKET = 8


def shared_prefix(model: Model, inputs: Inputs, variants: Variants, read: ReadOut, base=(), clean=None) -> int:
    """How many tokens the runs of a sweep share: those before the first one that a run changes or the read-out needs.

    Without a clean run, ``base`` changes every run alike, so it does not matter.
    """
    length = inputs.input_ids.shape[1]
    runs = [variants] if clean is None else [variants, *(stack([i]) for i in (*base, *clean))]
    return possible_prefix(model, inputs, min(read.first, *(first_token(run, length) for run in runs)))


def possible_prefix(model: Model, inputs: Inputs, start: int) -> int:
    """The longest possible prefix of at most ``start`` tokens."""
    start = start // PREFIX_BUCKET * PREFIX_BUCKET
    text = model.config.text
    block = both_ways(inputs.tokens, text.registers, text.bidirectional_images)
    return start if block is None else outside_blocks(np.asarray(block), start)


def outside_blocks(block: Int[np.ndarray, "batch tokens"], start: int) -> int:
    """The nearest index at or before ``start`` that is not inside a block of tokens that see each other in both
    directions (:func:`vlm_jax.nn.visibility.both_ways`). A prefix must not end between them."""
    while start and ((block[:, start - 1] == block[:, start]) & (block[:, start] > 0)).any():
        start -= 1
    return start
