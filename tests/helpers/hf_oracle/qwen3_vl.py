"""Qwen3-VL, and Qwen3 as its decoder alone."""

from hf_oracle.family import COMMON, FRAMES, MERGE, PATCH, Family
from hf_oracle.qwen import QWEN_IDS, merged_tokens
from hf_oracle.towers import QwenTower

QWEN3_TEXT = COMMON | {
    "head_dim": 32,  # not hidden_size / heads, as in the 4B release
    "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
}

QWEN3_VL = Family(
    "Qwen3VL",
    QWEN3_TEXT
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 20_000.0,
            "mrope_section": [6, 5, 5],  # the released 24:20:20, scaled to this head
            "mrope_interleaved": True,
        },
    },
    {
        "depth": 6,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "out_hidden_size": 64,
        "num_position_embeddings": 7**2,
        "deepstack_visual_indexes": [1, 2, 4],  # uneven, so that neither a constant stride nor an offset fits
    },
    QWEN_IDS,
    tower=QwenTower,
    visual_tokens=merged_tokens,
    token_types="mm_token_type_ids",
    counts_positions=True,
    deepstack=True,
)

QWEN3 = Family("Qwen3", QWEN3_TEXT | {"num_hidden_layers": 4}, head="ForCausalLM")
