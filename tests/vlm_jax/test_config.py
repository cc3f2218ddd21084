"""Configs: spelt as published and as transformers writes them now, and what is refused by the field's name."""

import dataclasses
import json
import math
import re

import pytest
from hf_oracle import tiny_config
from hypothesis import given
from mutations import damaged_value, many

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
        (("vision_config", "depth"), 10**7, "more than the 1000 layers"),
        (("text_config", "num_key_value_heads"), 3, "num_key_value_heads"),
        (("text_config", "rope_parameters"), {"rope_type": "default", "rope_theta": "abc"}, "rope_theta"),
        (
            ("text_config", "rope_parameters"),
            {"rope_type": "default", "rope_theta": 1.0, "mrope_section": [8, 8]},
            "mrope_section",
        ),
        (("dtype",), "float99", "dtype 'float99' is not supported; did you mean 'float"),
        (("text_config", "dtype"), ["float32"], "dtype"),
        (("quantization_config",), {"quant_method": "fp8"}, "quantization_config"),
        (("vision_config", "num_heads"), 5, "heads"),
        (("vision_config", "deepstack_visual_indexes"), [1, 9], "deepstack_visual_indexes"),
        (("vision_config", "deepstack_visual_indexes"), [2, 1], "deepstack_visual_indexes"),
        (("vision_config", "depth"), 0, "depth"),
        (("vision_config",), None, "vision_config"),
        (("model_type",), "mamba", "'mamba'"),
        (("model_type",), {}, "unsupported architecture {}"),
        (("text_config", "rms_norm_eps"), float("nan"), "rms_norm_eps = nan"),
        (("text_config", "rms_norm_eps"), -1e-6, "rms_norm_eps = -1e-06"),
        (("text_config", "rms_norm_eps"), 0.0, "rms_norm_eps = 0.0"),
        (("text_config", "rms_norm_eps"), True, "rms_norm_eps"),
        (("text_config", "rope_parameters", "rope_theta"), 0, "rope_theta = 0"),
        (("text_config", "rope_parameters", "rope_theta"), -10000.0, "rope_theta = -10000.0"),
        (("text_config", "rope_parameters", "rope_theta"), float("inf"), "rope_theta = inf"),
        (("text_config", "rope_parameters", "rope_theta"), None, "rope_theta = None"),
        (("text_config", "rope_parameters", "mrope_section"), [20, -2, -2], "mrope_section = [20, -2, -2]"),
        (("text_config", "rope_parameters", "mrope_section"), [6.0, 5.0, 5.0], "mrope_section"),
        (("text_config", "rope_parameters", "mrope_section"), 16, "mrope_section"),
        (("text_config", "rope_parameters", "mrope_interleaved"), False, "mrope_interleaved = False"),
        (("text_config", "rope_parameters"), {"rope_type": "linear", "rope_theta": 1.0, "factor": 0.0}, "factor = 0.0"),
        (("text_config", "head_dim"), 33, "`head_dim`=33"),
        (("text_config", "head_dim"), -32, "head_dim = -32"),
        (("vision_config", "rope_parameters"), {"rope_theta": 0.0}, "rope_theta of the vision tower = 0.0"),
        (("eos_token_id",), "</s>", "eos_token_id"),
        (("eos_token_id",), [1017, -2], "eos_token_id"),
        (("image_token_id",), -1, "image_token_id"),
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


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "family, field, value, says",
    [
        ("qwen2_5_vl", ("text_config", "rope_parameters", "mrope_interleaved"), True, "mrope_interleaved = True"),
        ("qwen2_5_vl", ("vision_config", "window_size"), 1, "window_size = 1"),
        ("gemma3", ("vision_config", "layer_norm_eps"), float("nan"), "layer_norm_eps = nan"),
        ("llava", ("vision_config", "layer_norm_eps"), -1e-5, "layer_norm_eps = -1e-05"),
        ("llama", ("rope_parameters",), LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ("llama", ("rope_parameters",), LLAMA3 | {"low_freq_factor": -1.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ("gemma3_text", ("final_logit_softcapping",), 0.0, "final_logit_softcapping = 0.0"),
        ("llava", ("image_token_index",), "x", "image_token"),
    ],
)
def test_ranges_of_other_families(family, field, value, says):
    hf = json.loads(tiny_config(family).to_json_string())
    read_config(hf, "config.json")  # the control
    section = hf
    for part in field[:-1]:
        section = section[part]
    section[field[-1]] = value
    with pytest.raises(UserError, match=r"^config\.json: ") as error:
        read_config(hf, "config.json")
    assert says in str(error.value)


@pytest.mark.parametrize("family, section", [("qwen3_vl", (24, 20, 20)), ("qwen2_5_vl", (16, 24, 24))])
def test_m_rope_without_its_section(family, section):
    """As transformers reads it: with the family's own section and order, not as one position."""
    hf = json.loads(tiny_config(family).to_json_string())
    for field in ("mrope_section", "mrope_interleaved"):
        hf["text_config"]["rope_parameters"].pop(field, None)
    with pytest.raises(UserError, match=re.escape(f"mrope_section = {list(section)} is not supported")):
        read_config(hf, "config.json")  # the tiny model has another head_dim
    hf["text_config"]["head_dim"] = 128
    ((_, rope),) = read_config(hf, "config.json").text.rope
    assert (rope.mrope_section, rope.mrope_interleaved) == (section, family == "qwen3_vl")


def test_no_padding_as_llama_once_wrote_it():
    hf = json.loads(tiny_config("llama").to_json_string()) | {"eos_token_id": [2, 3], "pad_token_id": -1}
    assert read_config(hf, "config.json").pad_token_id == 2


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "gemma3", "llava", "llama"])
@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_configs(family, count):
    """Each is refused in one sentence, or its numbers are ones that a model can have."""
    hf = json.loads(tiny_config(family).to_json_string())

    @many(count)
    @given(damaged_value(hf))
    def damaged(changed):
        try:
            text = read_config(changed if isinstance(changed, dict) else {}, "config.json").text
        except UserError as error:
            assert str(error).startswith("config.json: ") and "\n" not in str(error)
            return
        ropes = [number for _, rope in text.rope for number in (rope.rope_theta, rope.factor)]
        assert all(0 < number < math.inf for number in (text.rms_norm_eps, text.head_dim, *ropes))

    damaged()


def test_projector_that_is_not_supported():
    hf = json.loads(tiny_config("llava", top={"mm_projector_type": "mlp3x_gelu"}).to_json_string())
    with pytest.raises(UserError, match=r"mm_projector_type = 'mlp3x_gelu' .* only 'mlp2x_gelu', 'linear'"):
        read_config(hf, "config.json")
