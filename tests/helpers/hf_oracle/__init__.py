"""transformers as an oracle: tiny random models of every family, ragged batches, every site by forward hooks, and
interventions as hooks.

Nothing here knows how vlm_jax computes; only the names and shapes of its taps are shared with it. A family's file says
how it differs from the others.
"""

from hf_oracle.batches import make_batch, part_masks, positions, tensors
from hf_oracle.edits import attention_edited, edited, reader, text_layers, writer
from hf_oracle.family import IMAGE, PAD, TEXT_TOKENS, VISION_END
from hf_oracle.float64 import computing_in, exact
from hf_oracle.models import FAMILIES, exact_model, tiny_config, tiny_model
from hf_oracle.recording import Recorder
from hf_oracle.sites import oracle_sites

__all__ = [
    "FAMILIES",
    "IMAGE",
    "PAD",
    "TEXT_TOKENS",
    "VISION_END",
    "Recorder",
    "attention_edited",
    "computing_in",
    "edited",
    "exact",
    "exact_model",
    "make_batch",
    "oracle_sites",
    "part_masks",
    "positions",
    "reader",
    "tensors",
    "text_layers",
    "tiny_config",
    "tiny_model",
    "writer",
]
