"""The shape of a model: frozen, hashable dataclasses whose fields have the Hugging Face names.

A family's file (``vlm_jax/families``) fills them from a ``config.json``. A vision tower's file adds the tower's fields.
"""

import dataclasses
from typing import Any

from jaxtyping import PRNGKeyArray

from vlm_jax.errors import UserError
from vlm_jax.registers import Registers


@dataclasses.dataclass(frozen=True)
class Rope:
    """One entry of ``rope_parameters``.

    rope_type: "default"; "linear", which divides all frequencies by ``factor``; "llama3", which divides only low ones.
    mrope_section: how many frequencies the temporal, the height and the width position turn. None: there is one
    position, which turns all of them.
    mrope_interleaved: the three take turns (Qwen3-VL); otherwise they are three blocks (Qwen2.5-VL).
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

    rope: the :class:`Rope` of each kind of layer. layer_types: the kind of every layer.
    sliding_window: how many tokens a token of a sliding layer sees, itself included.
    attention_bias: names of the attention linears that have a bias. mlp_bias: whether the MLP's linears have one.
    qk_norm: RMS norms on each head's queries and keys. sandwich_norm: norms also after attention and after the MLP.
    unit_offset_norm: norms scale by ``1 + weight``. embed_scale: factor of the token embeddings.
    query_pre_attn_scalar: attention scores are divided by its square root; None stands for head_dim.
    attn_logit_softcapping, final_logit_softcapping: squash the attention scores and the logits into (-cap, cap). No
    supported family uses the first.
    bidirectional_images: the tokens of an image see each other in both directions.
    max_position_embeddings: the most tokens that a prompt may have; the tokenizer may set a lower limit.
    attention: "xla" or "splash", a kernel for passes that do not look at the scores (:mod:`vlm_jax.nn.kernels`).
    registers: the register tokens behind every image; None if there are none.
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
    registers: Registers | None = None

    @property
    def only_causal(self) -> bool:
        """Whether in every layer each token sees itself, all real tokens before it, and nothing else."""
        masked = self.registers is not None and self.registers.mask != "none"
        return {kind for kind, _ in self.rope} == {"full_attention"} and not self.bidirectional_images and not masked

    @property
    def mrope(self) -> bool:
        """Whether tokens have different temporal, height and width positions."""
        return any(rope.mrope_section is not None for _, rope in self.rope)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The fields that all vision towers have. The subclass of a tower says how to build it and how to feed it."""

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
        """Shape of one patch, which is that of the patch embedding's convolution kernel."""
        return self.in_channels, self.patch_size, self.patch_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        size = 1
        for side in self.conv_shape:
            size *= side
        return size

    @property
    def any_size(self) -> bool:
        """Whether the tower takes images of any size."""
        return False

    @property
    def class_tokens(self) -> int:
        """How many tokens come before the patches in the tower's sequence."""
        return 0

    def limit_pixels(self, image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
        """Sets the image processor's pixel budget, for towers that take images of any size.

        Raises:
            UserError: for other towers, or an impossible budget.
        """
        raise UserError("this model's vision tower takes images of one size: drop --min-pixels and --max-pixels")

    def check_processor(self, image_processor: Any, where: str) -> None:
        """Refuses an image processor whose fields are those of another tower.

        Args:
            where: name of its file, for errors.
        """

    def tower(self, key: PRNGKeyArray) -> Any:
        """The tower's module, with random parameters."""
        raise NotImplementedError

    def size_of(self, image_processor: Any, image: Any) -> tuple[int, int]:
        """How many patches (padding included) and visual tokens a PIL image becomes, without processing it."""
        raise NotImplementedError

    def images(self, pixel_values: Any, image_grid_thw: Any) -> tuple[Any, list[int]]:
        """:class:`vlm_jax.inputs.Images` from the image processor's arrays, and each image's visual tokens."""
        raise NotImplementedError

    def blank(self, count: int, tokens: int) -> dict[str, Any]:
        """The image processor's arrays for ``count`` blank images of at most ``tokens`` visual tokens each.

        Towers that take images of one size ignore ``tokens``.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole model.

    vision, image_token_id: None for a text-only model.
    eos_token_ids: the tokens that end an answer.
    hf: text of the ``config.json`` that it came from, with the end and padding tokens of ``generation_config.json``. It
    is written back when the model is saved, so that no field is lost.
    """

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
        UserError: if the implementation is unknown or cannot compute this model's attention.
    """
    if attention not in ("xla", "splash"):
        raise UserError(f"unknown attention {attention!r}: use 'xla' or 'splash'")
    if attention == "splash" and not config.text.only_causal:
        why = f"a {config.family} has sliding layers or images that see both ways"
        if dataclasses.replace(config.text, registers=None).only_causal:
            why = "this model has registers that hide images"
        raise UserError(f"attention 'splash' is causal and nothing else, but {why}: use 'xla'")
    return dataclasses.replace(config, text=dataclasses.replace(config.text, attention=attention))


def with_registers(config: Config, registers: Registers | None) -> Config:
    """The config of the same model with registers behind every image.

    Raises:
        UserError: for a text-only model, for a token that the model lacks, or if the model's attention cannot do it.
    """
    if registers is not None and config.vision is None:
        raise UserError(f"{config.family} is a text-only model, so there are no images for registers: choose another")
    if registers is not None and not 0 <= registers.token_id < config.text.vocab_size:
        raise UserError(
            f"the registers are copies of token {registers.token_id}, but the model has {config.text.vocab_size} "
            "tokens: they belong to another model"
        )
    changed = dataclasses.replace(config, text=dataclasses.replace(config.text, registers=registers))
    return with_attention(changed, config.text.attention)
