"""Qwen2.5-VL and Qwen2.5."""

from pathlib import Path
from typing import Any

from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.families.base import (
    Chat,
    Family,
    decoder_rows,
    load_parts,
    load_tokenizer,
    read_backbone,
    read_text,
    tied,
    token_ids,
    without_video,
)
from vlm_jax.families.key_table import CONV, KEEP, Row, linear
from vlm_jax.families.qwen import read_tower
from vlm_jax.processor import Processor
from vlm_jax.vision.qwen2_5 import Qwen25Vision

_BLOCK, _OURS = "model.visual.blocks.{}", "visual.blocks"
_BIAS = ("q_proj", "k_proj", "v_proj")  # never o_proj, whatever the config says


def read_config(hf: dict, config: Any, where: str) -> Config:
    text, vision = config.text_config, config.vision_config
    tower = read_tower(vision, where, "window_size")
    if tower["window_size"] < tower["patch_size"] * tower["spatial_merge_size"]:
        raise UserError(
            f"{where}: window_size = {tower['window_size']} is not supported, only one visual token or more"
        )
    return Config(
        family="qwen2_5_vl",
        text=read_text(text, where, tied=tied(hf), mrope=((16, 24, 24), False), attention_bias=_BIAS),
        vision=Qwen25Vision(
            **tower,
            fullatt_block_indexes=tuple(vision.fullatt_block_indexes),
        ),
        **token_ids(hf, config, where),
    )


def load_processor(folder: Path) -> Processor:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    return without_video(Qwen2_5_VLProcessor)(**load_parts(folder))


FAMILY = Family(
    model_type="qwen2_5_vl",
    read_config=read_config,
    table=(
        *decoder_rows("model.language_model"),
        Row("model.visual.patch_embed.proj.weight", "visual.patch_embed.kernel", CONV),
        Row(f"{_BLOCK}.norm1.weight", f"{_OURS}.norm1.weight", KEEP),
        Row(f"{_BLOCK}.norm2.weight", f"{_OURS}.norm2.weight", KEEP),
        *(
            row
            for name in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            for row in linear(f"{_BLOCK}.{name}", f"{_OURS}.{name}")
        ),
        Row("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight", KEEP),
        *linear("model.visual.merger.mlp.0", "visual.merger.linear_1"),
        *linear("model.visual.merger.mlp.2", "visual.merger.linear_2"),
    ),
    layers="model.language_model.layers",
    load_processor=load_processor,
    flat_text=True,
    # Published files lack the prefixes "model.language_model." and "model.visual.", which transformers adds.
    spellings=(
        ("visual.", "model.visual."),
        ("model.embed_tokens.", "model.language_model.embed_tokens."),
        ("model.layers.", "model.language_model.layers."),
        ("model.norm.", "model.language_model.norm."),
    ),
    chat=Chat("<|image_pad|>", "<|image_pad|>", image_end="<|vision_end|>", turn_end="<|im_end|>"),
)
BACKBONE = Family(
    model_type="qwen2",
    read_config=read_backbone("qwen2", attention_bias=_BIAS),
    table=decoder_rows("model"),
    layers="model.layers",
    load_processor=load_tokenizer,
    chat=Chat(turn_end="<|im_end|>"),
)
