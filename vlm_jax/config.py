"""What a model looks like: frozen, hashable dataclasses whose fields carry the Hugging Face names.

A family file (``vlm_jax/families``) fills them from a ``config.json``.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its mergers."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    rope_theta: float

    @property
    def patch_dim(self) -> int:
        """Numbers in one row of ``pixel_values``."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole model. ``hf`` is the ``config.json`` it came from, verbatim, so that saving loses nothing."""

    family: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    hf: str
