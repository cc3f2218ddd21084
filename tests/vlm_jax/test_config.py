"""Configs: spelt as published and as transformers writes them now, and what is refused by the field's name."""

import dataclasses
import json

import pytest
from hf_oracle import tiny_config

from vlm_jax.checkpoints.sources import MINI
from vlm_jax.errors import UserError
from vlm_jax.families import read_config

# The published configs predate ``rope_parameters``, and differ otherwise from what transformers writes now.


def qwen3_vl_as_released(config):
    unnested_rope(config["text_config"])
    config["vision_config"].pop("rope_parameters")
    config["vision_config"]["model_type"] = "qwen3_vl"


def qwen2_5_vl_as_released(config):
    """All fields of the decoder stand at the top."""
    text = config.pop("text_config")
    unnested_rope(text)
    text["rope_scaling"]["type"] = text["rope_scaling"].pop("rope_type").replace("default", "mrope")
    config.update(text | config)
    vision = config["vision_config"]
    vision.pop("rope_parameters")
    vision["in_chans"] = vision.pop("in_channels")
    vision["spatial_patch_size"] = vision["patch_size"]
    vision["model_type"] = "qwen2_5_vl"


def gemma3_as_released(config):
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["full_attention"].pop("rope_theta")
    text["rope_scaling"] = rope["full_attention"]
    text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    text["sliding_window_pattern"] = 6
    text.pop("layer_types")


def llama_as_released(config):
    unnested_rope(config)


def unnested_rope(text):
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope


@pytest.mark.parametrize(
    "family, as_released",
    [
        ("qwen3_vl", qwen3_vl_as_released),
        ("qwen2_5_vl", qwen2_5_vl_as_released),
        ("gemma3", gemma3_as_released),
        ("llama", llama_as_released),
    ],
)
def test_config_as_released(family, as_released):
    hf = json.loads(tiny_config(family).to_json_string())
    want = read_config(hf, "config.json")
    as_released(hf)
    assert json.loads(want.hf) != hf
    assert dataclasses.replace(read_config(hf, "config.json"), hf="") == dataclasses.replace(want, hf="")


@pytest.mark.parametrize(
    "field, value, says",
    [
        (("text_config", "rope_parameters"), {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}, "yarn"),
        (("text_config", "hidden_act"), "relu6", "relu6"),
        (("text_config", "num_hidden_layers"), "eight", "num_hidden_layers"),
        (("text_config", "num_key_value_heads"), 3, "num_key_value_heads"),
        (("text_config", "rope_parameters"), {"rope_type": "default", "rope_theta": "abc"}, "rope_theta"),
        (
            ("text_config", "rope_parameters"),
            {"rope_type": "default", "rope_theta": 1.0, "mrope_section": [8, 8]},
            "mrope_section",
        ),
        (("quantization_config",), {"quant_method": "fp8"}, "quantization_config"),
        (("vision_config", "num_heads"), 5, "heads"),
        (("vision_config", "deepstack_visual_indexes"), [1, 9], "deepstack_visual_indexes"),
        (("vision_config", "deepstack_visual_indexes"), [2, 1], "deepstack_visual_indexes"),
        (("vision_config", "depth"), 0, "depth"),
        (("vision_config",), None, "vision_config"),
        (("model_type",), "mamba", "'mamba'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_config_that_is_not_supported(field, value, says):
    config = json.loads((MINI / "mini-qwen3-vl" / "config.json").read_text())
    section = config
    for part in field[:-1]:
        section = section[part]
    section[field[-1]] = value
    with pytest.raises(UserError, match=r"^config\.json: ") as error:
        read_config(config, "config.json")
    assert says in str(error.value)


def test_projector_that_is_not_supported():
    hf = json.loads(tiny_config("llava", top={"mm_projector_type": "mlp3x_gelu"}).to_json_string())
    with pytest.raises(UserError, match=r"mm_projector_type = 'mlp3x_gelu' .* only 'mlp2x_gelu', 'linear'"):
        read_config(hf, "config.json")
