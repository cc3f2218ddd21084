"""The configs of published models, so that their names work without a network.

Each is the part of ``config.json`` on which shapes and positions depend, written by hand from the published file. If a
shape depends on a field that the file leaves to transformers' default, the field is written out here.
``tests/vlm_jax/test_info.py`` compares every total number of parameters with the model card (within 1 %) and with
transformers' class (equal), and two LoRA counts with P0's (equal).
"""

import copy

from vlm_jax.config import Config
from vlm_jax.errors import UserError, nearest
from vlm_jax.families import read_config

_QWEN_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
# SigLIP 2 in two sizes: the small decoders have the large tower, the others So400m.
_QWEN3_LARGE = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
_QWEN3_SO400M = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}


def _decoder(hidden: int, ffn: int, layers: int, heads: int, key_value_heads: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


def _qwen3_vl(*sizes: int, tower: dict, tied: bool) -> dict:
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **_QWEN_TOKENS,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_vl_text",
            **_decoder(*sizes),
            "head_dim": 128,
            "vocab_size": 151936,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "max_position_embeddings": 262144,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
            "eos_token_id": 151645,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            **tower,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": sizes[0],
            "num_position_embeddings": 2304,
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


def _qwen2_5_vl(*sizes: int, vocab: int, vision_ffn: int, tied: bool) -> dict:
    """The published files have the decoder's fields at the top level."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **_QWEN_TOKENS,
        "tie_word_embeddings": tied,
        **_decoder(*sizes),
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128000,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "eos_token_id": 151645,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "in_chans": 3,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": sizes[0],
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_act": "silu",
        },
    }


def _gemma3(*sizes: int, head_dim: int = 256, query_pre_attn_scalar: int = 256) -> dict:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text",
            **_decoder(*sizes),
            "head_dim": head_dim,
            "query_pre_attn_scalar": query_pre_attn_scalar,
            "vocab_size": 262208,
            "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def _llava(*sizes: int, vocab: int, image_token: int, pad_token: int | None, **decoder) -> dict:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "pad_token_id": pad_token,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            **_decoder(*sizes),
            "vocab_size": vocab,
            "rms_norm_eps": 1e-5,
            **decoder,
        },
        "vision_config": _CLIP_L_336,
    }


_LLAMA_3_1 = {
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}

#: Name -> ``config.json``. The five sizes are width, MLP width, layers, query heads and key-value heads.
PUBLISHED: dict[str, dict] = {
    "Qwen3-VL-2B": _qwen3_vl(2048, 6144, 28, 16, 8, tower=_QWEN3_LARGE, tied=True),
    "Qwen3-VL-4B": _qwen3_vl(2560, 9728, 36, 32, 8, tower=_QWEN3_LARGE, tied=True),
    "Qwen3-VL-8B": _qwen3_vl(4096, 12288, 36, 32, 8, tower=_QWEN3_SO400M, tied=False),
    "Qwen3-VL-32B": _qwen3_vl(5120, 25600, 64, 64, 8, tower=_QWEN3_SO400M, tied=False),
    "Qwen2.5-VL-3B": _qwen2_5_vl(2048, 11008, 36, 16, 2, vocab=151936, vision_ffn=3420, tied=True),
    "Qwen2.5-VL-7B": _qwen2_5_vl(3584, 18944, 28, 28, 4, vocab=152064, vision_ffn=3420, tied=False),
    "Qwen2.5-VL-32B": _qwen2_5_vl(5120, 27648, 64, 40, 8, vocab=152064, vision_ffn=3456, tied=False),
    "Qwen2.5-VL-72B": _qwen2_5_vl(8192, 29568, 80, 64, 8, vocab=152064, vision_ffn=3456, tied=False),
    "Gemma-3-4B": _gemma3(2560, 10240, 34, 8, 4),
    "Gemma-3-12B": _gemma3(3840, 15360, 48, 16, 8),
    "Gemma-3-27B": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
    "LLaVA-1.5-7B": _llava(
        4096, 11008, 32, 32, 32, vocab=32064, image_token=32000, pad_token=32001, max_position_embeddings=4096
    ),
    "LLaVA-1.5-13B": _llava(
        5120, 13824, 40, 40, 40, vocab=32064, image_token=32000, pad_token=32001, max_position_embeddings=4096
    ),
    # LLaVA-MORE in the form in which llava-hf publishes LLaVA. Its folder on the hub (``llava_llama``) has other keys
    # and no image token, so it cannot be loaded. Here the vocabulary is Llama 3.1's and the image token a reserved one.
    "LLaVA-MORE-8B": _llava(4096, 14336, 32, 32, 8, vocab=128256, image_token=128255, pad_token=None, **_LLAMA_3_1),
}


def published_config(name: str) -> Config:
    """The config of a published model.

    Raises:
        UserError: for an unknown name; the message suggests the nearest ones.
    """
    if name not in PUBLISHED:
        raise UserError(f"unknown published model {name!r}{nearest(name, PUBLISHED)}")
    return read_config(copy.deepcopy(PUBLISHED[name]), name)
