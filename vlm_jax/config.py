"""What a model looks like: frozen, hashable dataclasses whose fields carry the Hugging Face names.

A family file (``vlm_jax/families``) fills them from a ``config.json``. A vision tower's file adds its own fields.
"""

import dataclasses
from typing import Any

from vlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """One entry of ``rope_parameters``.

    ``rope_type``: "default"; "linear" (positions shrunk by ``factor``); "llama3" (long wavelengths shrunk).
    ``mrope_section``: frequencies that turn by the temporal, height and width position, in turn where
    ``mrope_interleaved`` (Qwen3-VL), else in three blocks (Qwen2.5-VL); None turns all by the one position.
    """

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    mrope_section: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. Every option is off unless a family sets it.

    rope: the :class:`Rope` of each kind of layer; layer_types: the kind of every layer.
    attention_bias: the attention linears that have a bias.
    qk_norm: RMS norms on each head's queries and keys. sandwich_norm: norms after attention and MLP too.
    unit_offset_norm: norms scale by ``1 + weight``. embed_scale: token embeddings are multiplied by it.
    query_pre_attn_scalar: scores are divided by its root; head_dim where None.
    attn_logit_softcapping: for families that apply it, of which none is here yet.
    bidirectional_images: tokens of one image see each other in both directions.
    max_position_embeddings: most tokens of a prompt; the tokeniser may set a lower bound.
    attention: what computes it, "xla" or a kernel (:mod:`vlm_jax.nn.kernels`) for windows whose scores nobody sees.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: tuple[tuple[str, Rope], ...]
    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    hidden_act: str = "silu"
    attention_bias: tuple[str, ...] = ()
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False
    unit_offset_norm: bool = False
    embed_scale: float = 1.0
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    bidirectional_images: bool = False
    max_position_embeddings: int | None = None
    attention: str = "xla"

    @property
    def only_causal(self) -> bool:
        """Whether every token sees all real tokens before it and no other, in every layer."""
        return {kind for kind, _ in self.rope} == {"full_attention"} and not self.bidirectional_images

    @property
    def mrope(self) -> bool:
        """Whether positions have three axes that differ."""
        return any(rope.mrope_section is not None for _, rope in self.rope)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What all vision towers have. A tower's own config also says how to build it and how to feed it:

    ``tower(key)``: the module; ``size_of(image_processor, image)``: the patches that an image takes, padding included,
    and its visual tokens, known without processing it;
    ``images(pixel_values, image_grid_thw)``: :class:`vlm_jax.inputs.Images` and the visual tokens of each, in order;
    ``blank(count, tokens)``: what its image processor would return for so many blank square images of at most so many
    visual tokens each, or of the only size there is.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    hidden_act: str
    out_hidden_size: int

    @property
    def conv_shape(self) -> tuple[int, ...]:
        """Shape of one patch: what the patch embedding's convolution spans."""
        return self.in_channels, self.patch_size, self.patch_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        size = 1
        for side in self.conv_shape:
            size *= side
        return size

    def limit_pixels(self, image_processor, min_pixels: int | None, max_pixels: int | None) -> None:
        """Sets the image processor's pixel budget, where the tower takes images of any size."""
        raise UserError("this model's vision tower takes images of one size: drop --min-pixels and --max-pixels")

    def tower(self, key) -> Any:
        raise NotImplementedError

    def size_of(self, image_processor, image) -> tuple[int, int]:
        raise NotImplementedError

    def images(self, pixel_values, image_grid_thw) -> Any:
        raise NotImplementedError

    def blank(self, count: int, tokens: int) -> dict[str, Any]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole model. ``vision`` and ``image_token_id`` are None for a text-only backbone. ``hf`` is the
    ``config.json`` it came from, with the end and padding tokens of ``generation_config.json``, so that saving loses
    nothing."""

    family: str
    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    hf: str = ""


def with_attention(config: Config, attention: str) -> Config:
    """The config of the same model with another implementation of its attention.

    Raises:
        UserError: if that cannot do what the model asks for.
    """
    if attention not in ("xla", "splash"):
        raise UserError(f"unknown attention {attention!r}: use 'xla' or 'splash'")
    if attention == "splash" and not config.text.only_causal:
        raise UserError(
            f"attention 'splash' is causal and nothing else, but a {config.family} has sliding layers or images that "
            "see both ways: use 'xla'"
        )
    return dataclasses.replace(config, text=dataclasses.replace(config.text, attention=attention))
