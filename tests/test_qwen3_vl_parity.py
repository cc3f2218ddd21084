"""What only Qwen3-VL has, and what every family's checkpoint has, tried on this one: configs, shards, spoilt files.

``test_parity.py`` compares every site of every family with transformers.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from hf_oracle import make_batch, oracle_sites, tiny_config, tiny_model
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.errors import UserError

BATCH = make_batch([[5, (4, 6), 3], [17], [(2, 10), 9]])


@pytest.fixture(scope="module")
def oracle():
    return tiny_model(tiny_config(tied=True))


@pytest.fixture(scope="module")
def saved(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    oracle.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved):
    model, processor = vlm_jax.load(saved)
    assert processor is None  # the folder has no tokeniser
    return model


def logits(model):
    return np.asarray(model(vlm_jax.Inputs.from_hf(model.config, **BATCH)).logits)


def test_deepstack_reaches_the_image_rows_of_the_first_layers(oracle):
    """Parity at the DeepStack site would say nothing if the oracle's were zero, or everywhere."""
    taps = len(oracle.config.vision_config.deepstack_visual_indexes)
    image_rows = oracle_sites(oracle, BATCH)["text.deepstack"][:, BATCH["mm_token_type_ids"] == 1]
    assert image_rows[:taps].any(-1).all() and not image_rows[taps:].any()


def test_deepstack_without_images_is_refused(model):
    """A site that a pass does not have is an error for a tap, as it is for an intervention."""
    inputs = vlm_jax.Inputs.from_hf(model.config, **make_batch([[11], [19]]))
    with pytest.raises(UserError, match=r"text\.deepstack.*image"):
        model(inputs, taps=["text.deepstack"])


def test_token_types_are_optional(model):
    without = {name: array for name, array in BATCH.items() if name != "mm_token_type_ids"}
    want, got = (vlm_jax.Inputs.from_hf(model.config, **batch) for batch in (BATCH, without))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_sharded_checkpoint(oracle, model, tmp_path):
    oracle.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    np.testing.assert_array_equal(logits(vlm_jax.load(tmp_path)[0]), logits(model))


def edit(path, change):
    """Rewrites a JSON file by ``change``, which alters the parsed value in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


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
def test_config_as_released(tmp_path, family, as_released):
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    want = vlm_jax.load(tmp_path)[0].config
    edit(tmp_path / "config.json", as_released)
    got = vlm_jax.load(tmp_path)[0].config
    assert dataclasses.replace(got, hf="") == dataclasses.replace(want, hf="")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_every_wrong_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    missing = ["model.visual.merger.norm.weight", "model.language_model.layers.3.self_attn.k_norm.weight"]
    extra = ["model.language_model.layers.6.mlp.up_proj.weight", "model.visual.deepstack_merger_list.3.norm.bias"]
    misshapen = ["model.language_model.layers.0.mlp.down_proj.weight", "model.visual.pos_embed.weight"]
    for key in missing:
        del tensors[key]
    for key in extra:
        tensors[key] = np.zeros(3, np.float32)
    for key in misshapen:  # the right number of elements, so that only a look at the shape can tell
        tensors[key] = np.ascontiguousarray(tensors[key].T)
    save_file(tensors, folder / "model.safetensors")
    message = load_error(folder)
    assert [key for key in missing + extra + misshapen if key not in message] == []


@pytest.mark.parametrize("keep", [0.5, 0.001], ids=["data", "header"])
def test_truncated_checkpoint(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "model.safetensors" in load_error(folder)


@pytest.mark.parametrize("model_type", ["mamba", "llama"], ids=["unsupported", "mislabelled"])
def test_wrong_architecture_is_named(folder, model_type):
    """One that is not supported, and one that is but whose tensors these are not."""
    edit(folder / "config.json", lambda config: config.update(model_type=model_type))
    assert model_type in load_error(folder).replace(str(folder), "")


def load_error(folder):
    with pytest.raises(UserError) as error:
        vlm_jax.load(folder)
    return str(error.value)
