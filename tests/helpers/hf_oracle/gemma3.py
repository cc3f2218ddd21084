"""Gemma 3, and its decoder alone."""

import math

from hf_oracle.family import COMMON, IMAGE, PATCH, VISION_END, VISION_START, Family
from hf_oracle.towers import ViTTower


def embedding_scale(config):
    return math.sqrt(config.get_text_config().hidden_size)


GEMMA3_TEXT = COMMON | {
    "num_hidden_layers": 7,  # by the family's default pattern, all but the sixth are local
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "sliding_window": 9,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 3_000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}

GEMMA3 = Family(
    "Gemma3",
    {"model_type": "gemma3_text"} | GEMMA3_TEXT,
    {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 4,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "image_size": 8 * PATCH,
        "patch_size": PATCH,
        "layer_norm_eps": 2e-3,
        "vision_use_head": False,
    },
    {
        "mm_tokens_per_image": 16,  # more than the sliding window
        "image_token_index": IMAGE,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    },
    tower=ViTTower,
    visual_tokens=lambda config, h, w: config.mm_tokens_per_image,
    one_size=True,
    token_types="token_type_ids",
    norm_offset=1.0,
    embedding_scale=embedding_scale,
)

GEMMA3_TEXT_ONLY = Family(
    "Gemma3Text", GEMMA3_TEXT, head="ForCausalLM", norm_offset=1.0, embedding_scale=embedding_scale
)
