"""LLaVA (CLIP and a Llama or Vicuna decoder, as in LLaVA-1.5) and Llama."""

from pathlib import Path
from typing import Any

from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.families.base import (
    Chat,
    Family,
    attention_bias,
    decoder_rows,
    load_parts,
    load_tokenizer,
    read_backbone,
    read_text,
    supported,
    tied,
    token_ids,
)
from vlm_jax.families.key_table import linear
from vlm_jax.families.vit import SPELLINGS, encoder_rows, read_tower
from vlm_jax.nn.layers import ACTIVATIONS
from vlm_jax.processor import Processor
from vlm_jax.vision.clip import ClipVision


def read_config(hf: dict, config: Any, where: str) -> Config:
    text, vision = config.text_config, config.vision_config
    supported(where, "text_config.model_type", text.model_type, ("llama",))
    supported(where, "vision_config.model_type", vision.model_type, ("clip_vision_model",))
    chosen = config.vision_feature_layer
    chosen = (chosen,) if isinstance(chosen, int) else tuple(chosen)
    strategy = config.vision_feature_select_strategy
    tower = read_tower(vision, where)
    if not chosen:
        raise UserError(f"{where}: vision_feature_layer is empty: name at least one layer")
    for layer in chosen:
        supported(where, "vision_feature_layer", layer, range(-tower["depth"] - 1, tower["depth"] + 1))
    return Config(
        family="llava",
        text=read_text(
            text,
            where,
            tied=tied(hf),
            attention_bias=attention_bias(text),
            mlp_bias=bool(text.mlp_bias),
        ),
        vision=ClipVision(
            **tower,
            out_hidden_size=text.hidden_size,
            vision_feature_layer=chosen,
            keep_cls=supported(where, "vision_feature_select_strategy", strategy, ("default", "full")) == "full",
            # A field of the original LLaVA; transformers knows only the projector of two layers.
            mm_projector_type=supported(
                where, "mm_projector_type", hf.get("mm_projector_type", "mlp2x_gelu"), ("mlp2x_gelu", "linear")
            ),
            projector_hidden_act=supported(
                where, "projector_hidden_act", config.projector_hidden_act, tuple(ACTIVATIONS)
            ),
            projector_bias=bool(config.multimodal_projector_bias),
        ),
        **token_ids(hf, config, where),
    )


def load_processor(folder: Path) -> Processor:
    import json

    from transformers import LlavaProcessor

    config = json.loads((folder / "config.json").read_text())
    strategy = config.get("vision_feature_select_strategy", "default")
    return LlavaProcessor(
        **load_parts(folder),
        patch_size=config["vision_config"].get("patch_size", 32),
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )


FAMILY = Family(
    model_type="llava",
    read_config=read_config,
    table=(
        *decoder_rows("model.language_model"),
        *encoder_rows("model.vision_tower"),
        *(
            row
            for name in ("linear_1", "linear_2")
            for row in linear(f"model.multi_modal_projector.{name}", f"visual.multi_modal_projector.{name}")
        ),
    ),
    layers="model.language_model.layers",
    load_processor=load_processor,
    spellings=SPELLINGS,
    chat=Chat("<image>", "<image>"),
)
BACKBONE = Family(
    model_type="llama",
    read_config=read_backbone("llama", attention_bias=attention_bias, mlp_bias=lambda text: bool(text.mlp_bias)),
    table=decoder_rows("model"),
    layers="model.layers",
    load_processor=load_tokenizer,
)
