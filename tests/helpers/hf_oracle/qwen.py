"""What Qwen2.5-VL and Qwen3-VL have in common."""

from hf_oracle.family import IMAGE, MERGE, VIDEO, VISION_END, VISION_START

QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def merged_tokens(config, h, w):
    """One for every square of patches."""
    return h * w // MERGE**2
