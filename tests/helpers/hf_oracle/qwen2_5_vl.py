"""Qwen2.5-VL, and Qwen2 as its decoder alone."""

from hf_oracle.family import COMMON, FRAMES, MERGE, PATCH, Family
from hf_oracle.qwen import QWEN_IDS, merged_tokens
from hf_oracle.towers import QwenTower

QWEN2_5_VL = Family(
    "Qwen2_5_VL",
    COMMON
    | {
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0, "mrope_section": [2, 3, 3]},
    },
    {
        "depth": 5,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "window_size": 4 * PATCH,  # two merged patches to a side
        "fullatt_block_indexes": [1, 4],
        "out_hidden_size": 64,
    },
    QWEN_IDS,
    tower=QwenTower,
    visual_tokens=merged_tokens,
    token_types="mm_token_type_ids",
    counts_positions=True,
)

QWEN2 = Family(
    "Qwen2",
    COMMON | {"num_hidden_layers": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
    head="ForCausalLM",
)
