"""Which tokens are edited: those of the object and of the instruction, as in P4, and the controls that it lacks."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool

from interventions.kinds.groups import label, tokens_of
from train.editors import Mark
from vlm_jax.errors import UserError
from vlm_jax.model import Model
from vlm_jax.prompts import Batch

#: A patch belongs to the object if its brightness varies by more than this (of 2, from black to white), or if it
#: differs by more than this from the picture's median patch.
_CONTRAST = 0.5


def check_grid(model: Model) -> None:
    """Refuses a model whose visual tokens are not one for each patch, so that the object's tokens are not known."""
    vision: Any = model.config.vision
    side = getattr(vision, "side", None)
    if side is None or vision.tokens != side**2:
        raise UserError("controllability needs one visual token for each patch: choose a LLaVA")


def object_tokens(batch: Batch) -> Bool[np.ndarray, "batch tokens"]:
    """The visual tokens of the patches that show the object (P4's region of interest; it does not say how it was
    found). The object is what stands out from the rest of the picture."""
    inputs = batch.inputs
    assert inputs.images is not None and inputs.image_index is not None, "these questions are about pictures"
    pixels = np.asarray(inputs.images.pixel_values, np.float32)  # (images, patches, channels x pixels)
    spread = pixels.max(-1) - pixels.min(-1)
    level = pixels.mean(-1)
    stands_out = (spread > _CONTRAST) | (np.abs(level - np.median(level, 1, keepdims=True)) > _CONTRAST)
    index = np.asarray(inputs.image_index)
    return (index >= 0) & stands_out.reshape(-1)[np.maximum(index, 0)]


def _paper(batch: Batch) -> np.ndarray:
    return object_tokens(batch) | tokens_of("question", label(batch))


def _everywhere(batch: Batch) -> np.ndarray:
    return tokens_of("prompt", label(batch))


def _random(batch: Batch) -> np.ndarray:
    """As many tokens of the prompt as the paper's, at random. They depend only on the row's tokens and picture."""
    wanted, prompt = _paper(batch), _everywhere(batch)
    chosen = np.zeros_like(prompt)
    for row, (some, all_) in enumerate(zip(wanted, prompt, strict=True)):
        rng = np.random.default_rng(
            zlib.crc32(np.asarray(batch.inputs.input_ids[row][all_]).tobytes() + some[all_].tobytes())
        )
        chosen[row, rng.choice(np.flatnonzero(all_), int(some.sum()), replace=False)] = True
    return chosen


#: Condition -> which tokens are edited.
PLACES: dict[str, Callable[[Batch], np.ndarray]] = {
    "object and instruction": _paper,
    "all tokens": _everywhere,
    "random tokens": _random,
    "shuffled labels": _paper,
}


def mark_of(condition: str) -> Mark:
    """The function that marks the tokens of the editor "steering"."""
    return lambda batch: {"steering": PLACES[condition](batch)}
