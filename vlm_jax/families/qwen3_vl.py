"""Qwen3-VL and Qwen3."""

from pathlib import Path
from typing import Any

from vlm_jax.config import Config
from vlm_jax.families.base import (
    Chat,
    Family,
    ascending,
    attention_bias,
    decoder_rows,
    load_parts,
    load_tokenizer,
    read_backbone,
    read_text,
    tied,
    token_ids,
    without_video,
)
from vlm_jax.families.key_table import CONV, KEEP, Row, linear, norm
from vlm_jax.families.qwen import read_tower
from vlm_jax.processor import Processor
from vlm_jax.vision.qwen3 import Qwen3Vision

_BLOCK, _OURS = "model.visual.blocks.{}", "visual.blocks"


def read_config(hf: dict, config: Any, where: str) -> Config:
    text, vision = config.text_config, config.vision_config
    tower = read_tower(vision, where, "num_position_embeddings")
    return Config(
        family="qwen3_vl",
        text=read_text(
            text, where, tied=tied(hf), mrope=((24, 20, 20), True), qk_norm=True, attention_bias=attention_bias(text)
        ),
        vision=Qwen3Vision(
            **tower,
            deepstack_visual_indexes=ascending(
                where, "deepstack_visual_indexes", vision.deepstack_visual_indexes, tower["depth"]
            ),
        ),
        **token_ids(hf, config, where),
    )


def load_processor(folder: Path) -> Processor:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    return without_video(Qwen3VLProcessor)(**load_parts(folder))


def _merger(hf: str, ours: str) -> tuple[Row, ...]:
    names = ("linear_fc1", "linear_fc2")
    return *norm(f"{hf}.norm", f"{ours}.norm"), *(r for n in names for r in linear(f"{hf}.{n}", f"{ours}.{n}"))


FAMILY = Family(
    model_type="qwen3_vl",
    read_config=read_config,
    table=(
        *decoder_rows("model.language_model"),
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
    ),
    layers="model.language_model.layers",
    load_processor=load_processor,
    chat=Chat("<|image_pad|>", "<|image_pad|>", image_end="<|vision_end|>", turn_end="<|im_end|>"),
)
BACKBONE = Family(
    model_type="qwen3",
    read_config=read_backbone("qwen3", qk_norm=True, attention_bias=attention_bias),
    table=decoder_rows("model"),
    layers="model.layers",
    load_processor=load_tokenizer,
    chat=Chat(turn_end="<|im_end|>"),
)
