"""What the two Qwen-VL families share: the fields of their vision towers."""

from typing import Any

from vlm_jax.families.base import above_zero, positive, supported, whole_heads
from vlm_jax.nn.layers import ACTIVATIONS


def read_tower(vision: Any, where: str, *more: str) -> dict[str, Any]:
    """The fields of :class:`vlm_jax.vision.qwen.QwenVision` from a transformers vision config.

    Args:
        where: name of the file, for errors.
        more: further fields to read that are whole numbers above 0.
    """
    sizes = positive(
        where,
        vision,
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "in_channels",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "out_hidden_size",
        *more,
    )
    whole_heads(where, sizes["hidden_size"], sizes["num_heads"])
    return {
        **sizes,
        "hidden_act": supported(where, "hidden_act", vision.hidden_act, tuple(ACTIVATIONS)),
        "rope_theta": above_zero(where, "rope_theta of the vision tower", vision.rope_parameters["rope_theta"]),
    }
