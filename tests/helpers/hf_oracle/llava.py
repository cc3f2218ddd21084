"""LLaVA with a Llama decoder, and Llama alone."""

import torch

from hf_oracle.family import COMMON, IMAGE, PATCH, Family
from hf_oracle.towers import ViTTower


def visual_tokens(config, h, w):
    """One a patch, and the class token where the projector takes it."""
    return h * w + (config.vision_feature_select_strategy == "full")


def tower_depth(config):
    """Layers above those whose features are read do not run."""
    depth, chosen = config.vision_config.num_hidden_layers, config.vision_feature_layer
    return max(i % (depth + 1) for i in ([chosen] if isinstance(chosen, int) else chosen))


def adjust(model):
    """The first LLaVA's projector is one linear, which transformers does not know."""
    if getattr(model.config, "mm_projector_type", None) == "linear":
        projector = model.model.multi_modal_projector
        projector.act = projector.linear_2 = torch.nn.Identity()


LLAMA_TEXT = COMMON | {
    "num_hidden_layers": 4,
    "head_dim": 24,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

LLAVA = Family(
    "Llava",
    COMMON
    | {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000.0},
    },
    {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 5,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "image_size": 6 * PATCH,
        "patch_size": PATCH,
        "layer_norm_eps": 2e-3,
    },
    {"image_token_index": IMAGE, "image_seq_length": 36},
    tower=ViTTower,
    tower_depth=tower_depth,
    visual_tokens=visual_tokens,
    one_size=True,
    image_marks=False,  # prompts may have images side by side
    adjust=adjust,
)

LLAMA = Family("Llama", LLAMA_TEXT, head="ForCausalLM")
