"""The text-only model inside a vision-language one: the same function of text, in transformers too."""

import json

import numpy as np
import pytest
import torch
from hf_oracle import make_batch, positions, tensors, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import vlm_jax
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.families import BACKBONES

BATCH = make_batch([[11], [23], [40]], "left")
REAL = BATCH["attention_mask"] == 1


def logits(model):
    return np.asarray(model(vlm_jax.Inputs.from_hf(model.config, **BATCH)).logits)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("family", BACKBONES)
def test_backbone_is_the_same_function_of_text(tmp_path, family, tied):
    """Its arrays are the model's own; saved, transformers and the library load it as a plain text-only model."""
    config = tiny_config(family, tied=tied, text={"eos_token_id": 7}, top={"eos_token_id": [7, 9]})
    tiny_model(config).save_pretrained(tmp_path / "whole")
    whole = vlm_jax.load(tmp_path / "whole")[0]
    backbone = whole.backbone()
    leaves = named_leaves(whole)
    assert all(leaf is leaves[name] for name, leaf in named_leaves(backbone).items())
    vlm_jax.save(backbone, tmp_path / "text")

    again = vlm_jax.load(tmp_path / "text")[0]
    assert again.config.text == backbone.config.text and again.visual is None
    assert again.config.eos_token_ids == whole.config.eos_token_ids == (7, 9)
    np.testing.assert_array_equal(logits(again)[REAL], logits(whole)[REAL])

    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager").eval()
    written = json.loads((tmp_path / "text" / "config.json").read_text())
    assert written["architectures"] == [type(oracle).__name__] and written["model_type"] == BACKBONES[family]
    assert written["dtype"] == "float32" and oracle.dtype == torch.float32
    assert oracle.config.eos_token_id == [7, 9]
    with torch.no_grad():
        want = oracle(**tensors(BATCH), **positions(oracle.config, BATCH), use_cache=False).logits.numpy()
    assert np.abs(want[REAL]).max() > 1
    np.testing.assert_allclose(logits(again)[REAL], want[REAL], atol=1e-4)


def test_a_text_only_model_is_its_own_backbone():
    backbone = vlm_jax.load("mini-qwen3-vl")[0].backbone()
    assert backbone.backbone() is backbone
