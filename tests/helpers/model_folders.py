"""Folders of every family, all but the weights: the embedded models', Qwen2.5-VL's and the text-only backbones'."""

import json
from functools import partial
from pathlib import Path

from train import mini
from vlm_jax.checkpoints.sources import read_config
from vlm_jax.families import BACKBONES, backbone_config


def write_qwen2_5_vl(folder: Path) -> None:
    """With the tokeniser and the image processor of the embedded Qwen3-VL, as Qwen2.5-VL's are Qwen2-VL's too."""
    mini.WRITERS["mini-qwen3-vl"](folder)
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    config |= {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    text["model_type"], vision["model_type"] = "qwen2_5_vl_text", "qwen2_5_vl_vision"
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    del vision["num_position_embeddings"], vision["deepstack_visual_indexes"]
    vision |= {"hidden_act": "silu", "window_size": 32, "fullatt_block_indexes": [3]}
    (folder / "config.json").write_text(json.dumps(config))


def write_backbone(write, folder: Path) -> None:
    """The text-only part of what ``write`` writes."""
    write(folder)
    (folder / "config.json").write_text(backbone_config(read_config(folder)).hf)
    (folder / "preprocessor_config.json").unlink()


#: ``model_type`` -> what writes a folder of it.
VISION = {
    "qwen3_vl": mini.WRITERS["mini-qwen3-vl"],
    "qwen2_5_vl": write_qwen2_5_vl,
    "gemma3": mini.WRITERS["mini-gemma3"],
    "llava": mini.WRITERS["mini-llava"],
}
TEXT = {BACKBONES[family]: partial(write_backbone, write) for family, write in VISION.items()}
