"""The shared prefix: how many tokens are the same in all runs of a sweep, and so are computed once."""

import numpy as np
from jaxtyping import Bool

from interventions.engine.read import ReadOut
from interventions.engine.variants import Variants, first_token, stack
from vlm_jax import Inputs, Model

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
    if model.config.text.bidirectional_images and inputs.is_image is not None:
        start = outside_images(np.asarray(inputs.is_image), start)
    return start


def outside_images(is_image: Bool[np.ndarray, "batch tokens"], start: int) -> int:
    """The nearest index at or before ``start`` that is not inside an image. The tokens of an image see each other, so a
    prefix must not end between them."""
    while start and (is_image[:, start - 1] & is_image[:, start]).any():
        start -= 1
    return start
