"""Gemma 3, with and without its vision tower."""

from pathlib import Path
from typing import Any

from vlm_jax.config import Config, TextConfig
from vlm_jax.errors import UserError
from vlm_jax.families.base import (
    Chat,
    Family,
    above_zero,
    attention_bias,
    decoder_rows,
    load_parts,
    load_tokenizer,
    positive,
    read_text,
    supported,
    tied,
    token_ids,
)
from vlm_jax.families.key_table import KEEP, Row
from vlm_jax.families.vit import SPELLINGS, encoder_rows, read_tower
from vlm_jax.processor import Processor
from vlm_jax.vision.siglip import SiglipVision


def _text(hf: dict, text: Any, where: str, **options: Any) -> TextConfig:
    supported(where, "use_bidirectional_attention", bool(text.use_bidirectional_attention), (False,))
    # transformers reads these two fields but does not apply them, so it is unknown whether the weights expect them.
    supported(where, "attn_logit_softcapping", text.attn_logit_softcapping, (None,))
    if "bidirectional_images" in options:
        supported(where, "final_logit_softcapping", text.final_logit_softcapping, (None,))
    if text.final_logit_softcapping is not None:
        above_zero(where, "final_logit_softcapping", text.final_logit_softcapping)
    return read_text(
        text,
        where,
        tied=tied(hf, default=True),
        attention_bias=attention_bias(text),
        qk_norm=True,
        sandwich_norm=True,
        unit_offset_norm=True,
        embed_scale=text.hidden_size**0.5,
        query_pre_attn_scalar=float(positive(where, text, "query_pre_attn_scalar")["query_pre_attn_scalar"]),
        final_logit_softcapping=text.final_logit_softcapping,
        **options,
    )


def read_config(hf: dict, config: Any, where: str) -> Config:
    tower = read_tower(config.vision_config, where)
    pooled = positive(where, config, "mm_tokens_per_image")["mm_tokens_per_image"]
    side = int(pooled**0.5)
    if side**2 != pooled or side > tower["image_size"] // tower["patch_size"]:
        raise UserError(f"{where}: mm_tokens_per_image = {pooled} is not supported, only a square below the patches'")
    return Config(
        family="gemma3",
        text=_text(hf, config.text_config, where, bidirectional_images=True),
        vision=SiglipVision(**tower, out_hidden_size=config.text_config.hidden_size, mm_tokens_per_image=pooled),
        **token_ids(hf, config, where),
    )


def read_backbone(hf: dict, config: Any, where: str) -> Config:
    text = _text(hf, config, where)
    return Config("gemma3_text", text, None, **token_ids(hf, config, where))


def load_processor(folder: Path) -> Processor:
    import json

    from transformers import Gemma3Processor

    tokens = json.loads((folder / "config.json").read_text()).get("mm_tokens_per_image", 256)
    parts = load_parts(folder)
    if parts["image_processor"].do_pan_and_scan:
        raise UserError(
            f"{folder}: do_pan_and_scan = True is not supported, as it makes several images of one: set it to false in "
            "preprocessor_config.json"
        )
    return Gemma3Processor(**parts, image_seq_length=tokens)


_PROJECTOR = "model.multi_modal_projector"
FAMILY = Family(
    model_type="gemma3",
    read_config=read_config,
    table=(
        *decoder_rows("model.language_model"),
        *encoder_rows("model.vision_tower"),
        Row(f"{_PROJECTOR}.mm_soft_emb_norm.weight", "visual.multi_modal_projector.mm_soft_emb_norm.weight", KEEP),
        Row(
            f"{_PROJECTOR}.mm_input_projection_weight", "visual.multi_modal_projector.mm_input_projection.kernel", KEEP
        ),
    ),
    layers="model.language_model.layers",
    load_processor=load_processor,
    spellings=SPELLINGS,
    unread=("model.vision_tower.head.",),  # SigLIP's pooling head (vision_use_head), which Gemma 3 does not use
    chat=Chat(
        "<start_of_image>",
        "<image_soft_token>",
        before="\n\n<start_of_image>",
        after="<end_of_image>\n\n",
        image_end="<end_of_image>",
        turn_end="<end_of_turn>",
    ),
)
BACKBONE = Family(
    model_type="gemma3_text",
    read_config=read_backbone,
    table=decoder_rows("model"),
    layers="model.layers",
    load_processor=load_tokenizer,
    chat=Chat(turn_end="<end_of_turn>"),
)
