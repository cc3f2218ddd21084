"""Qwen3-VL: its config, its key table, its processor and where its token spans lie."""

import json
from pathlib import Path

from vlm_jax.config import Config, TextConfig, VisionConfig
from vlm_jax.errors import UserError
from vlm_jax.table import CONV, KEEP, TRANSPOSE, Row, linear, norm

MODEL_TYPE = "qwen3_vl"
#: Prefix of a decoder layer in Hugging Face (and PEFT) module names.
LAYER_PREFIX = "model.language_model.layers"
#: Text of the image token, of the token that closes an image, and of the one that ends a turn.
IMAGE, IMAGE_END, TURN_END = "<|image_pad|>", "<|vision_end|>", "<|im_end|>"

_TEXT = "model.language_model"
_BLOCK, _OURS = "model.visual.blocks.{}", "visual.blocks"


def _merger(hf: str, ours: str) -> tuple[Row, ...]:
    return (
        *norm(f"{hf}.norm", f"{ours}.norm"),
        *linear(f"{hf}.linear_fc1", f"{ours}.linear_fc1"),
        *linear(f"{hf}.linear_fc2", f"{ours}.linear_fc2"),
    )


#: Every tensor of a checkpoint: Hugging Face key, path in our model, how they relate.
TABLE: tuple[Row, ...] = (
    Row(f"{_TEXT}.embed_tokens.weight", "text.embed_tokens.weight", KEEP),
    *(
        Row(f"{LAYER_PREFIX}.{{}}.{name}.weight", f"text.layers.{name}.kernel", TRANSPOSE)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
    *(
        Row(f"{LAYER_PREFIX}.{{}}.{name}.weight", f"text.layers.{name}.weight", KEEP)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
    ),
    Row(f"{_TEXT}.norm.weight", "text.norm.weight", KEEP),
    Row("lm_head.weight", "text.lm_head.kernel", TRANSPOSE),
    Row("model.visual.patch_embed.proj.weight", "visual.patch_embed.kernel", CONV),
    Row("model.visual.patch_embed.proj.bias", "visual.patch_embed.bias", KEEP),
    Row("model.visual.pos_embed.weight", "visual.pos_embed.weight", KEEP),
    *norm(f"{_BLOCK}.norm1", f"{_OURS}.norm1"),
    *norm(f"{_BLOCK}.norm2", f"{_OURS}.norm2"),
    *(
        row
        for name in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
        for row in linear(f"{_BLOCK}.{name}", f"{_OURS}.{name}")
    ),
    *_merger("model.visual.merger", "visual.merger"),
    *_merger("model.visual.deepstack_merger_list.{}", "visual.deepstack_merger_list"),
)


def read_config(hf: dict, where: str) -> Config:
    """Our config from a Hugging Face ``config.json``; ``where`` names the file in errors."""

    def need(section: dict, name: str, expected=None):
        if name not in section:
            raise UserError(f"{where}: field {name!r} is missing; is this a whole Qwen3-VL folder?")
        if expected is not None and section[name] != expected:
            raise UserError(f"{where}: {name} = {section[name]!r} is not supported, only {expected!r}")
        return section[name]

    text, vision = need(hf, "text_config"), need(hf, "vision_config")
    rope = text.get("rope_parameters") or {**(text.get("rope_scaling") or {}), "rope_theta": text.get("rope_theta")}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise UserError(f"{where}: rope_type = {rope_type!r} is not supported, only 'default'")
    need(text, "hidden_act", "silu")
    need(vision, "hidden_act", "gelu_pytorch_tanh")
    if text.get("attention_bias"):
        raise UserError(f"{where}: attention_bias = true is not supported, only false")
    eos = hf.get("eos_token_id", text.get("eos_token_id"))
    eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    pad = next((p for p in (hf.get("pad_token_id"), text.get("pad_token_id"), *eos) if p is not None), 0)
    return Config(
        family=MODEL_TYPE,
        text=TextConfig(
            **{
                name: need(text, name)
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "head_dim",
                    "rms_norm_eps",
                )
            },
            rope_theta=float(need(rope, "rope_theta")),
            mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        ),
        vision=VisionConfig(
            **{
                name: need(vision, name)
                for name in (
                    "depth",
                    "hidden_size",
                    "intermediate_size",
                    "num_heads",
                    "in_channels",
                    "patch_size",
                    "temporal_patch_size",
                    "spatial_merge_size",
                    "out_hidden_size",
                    "num_position_embeddings",
                )
            },
            deepstack_visual_indexes=tuple(need(vision, "deepstack_visual_indexes")),
            rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
        ),
        image_token_id=need(hf, "image_token_id"),
        vision_end_token_id=need(hf, "vision_end_token_id"),
        eos_token_ids=eos,
        pad_token_id=pad,
        hf=json.dumps(hf),
    )


def load_processor(folder: Path):
    """The folder's processor without its video part, which alone would need torchvision."""
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.processing_utils import ProcessorMixin

    class ImageOnlyProcessor(Qwen3VLProcessor):
        """``ProcessorMixin`` loads what ``__init__`` names, so naming no video processor leaves it out."""

        def __init__(self, image_processor, tokenizer, chat_template=None, **ignored):
            for name, token in (
                ("image", IMAGE),
                ("video", "<|video_pad|>"),
                ("vision_start", "<|vision_start|>"),
                ("vision_end", IMAGE_END),
            ):
                setattr(self, f"{name}_token", token)
                setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = folder / "chat_template.jinja"
    return ImageOnlyProcessor(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer,
        chat_template=template.read_text() if template.exists() else tokenizer.chat_template,
    )
