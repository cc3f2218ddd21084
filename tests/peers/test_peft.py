"""Adapter folders in the newest PEFT and transformers, which share no environment with the library."""

import jax
import numpy as np
import pytest
from environments import environment, run

import vlm_jax
from interventions.placement.adapters import init_lora, save_peft

pytestmark = pytest.mark.peers

IDS = np.array([[5, 9, 30, 12, 44, 7]])
#: Writes the logits of the base model and of the adapted one.
IN_PEFT = """
import sys
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

folder, adapter, ids, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
ids = torch.from_numpy(np.load(ids))
with torch.no_grad():
    base = model(input_ids=ids).logits.numpy()
    adapted = PeftModel.from_pretrained(model, adapter).eval()(input_ids=ids).logits.numpy()
np.savez(out, base=base, adapted=adapted)
"""


def test_an_adapter_computes_the_same_in_peft(tmp_path):
    rng = np.random.default_rng(0)
    model, _ = vlm_jax.load("mini-qwen3-vl")
    vlm_jax.save(model, tmp_path / "model")
    lora = init_lora(model, ["L1-attn", "L6-mlp"], r=4, alpha=8, dropout=0.0, key=jax.random.key(0))
    weights = {
        site: (a, 0.05 * rng.standard_normal(b.shape).astype(np.float32)) for site, (a, b) in lora.weights.items()
    }
    lora = lora.replace(weights=weights)
    save_peft(lora, model, tmp_path / "adapter")
    np.save(tmp_path / "ids.npy", IDS)
    python = environment(tmp_path / "environment", "peft", "transformers", "torch", "pillow", "torchvision")
    run(python, "-c", IN_PEFT, tmp_path / "model", tmp_path / "adapter", tmp_path / "ids.npy", tmp_path / "theirs.npz")
    inputs = vlm_jax.Inputs.from_hf(model.config, input_ids=IDS)
    with np.load(tmp_path / "theirs.npz") as theirs:
        largest = np.abs(theirs["adapted"]).max()
        assert np.abs(theirs["adapted"] - theirs["base"]).max() > 0.01 * largest
        for name, interventions in (("base", ()), ("adapted", (lora,))):
            ours = np.asarray(model(inputs, interventions).logits)
            assert np.abs(ours - theirs[name]).max() < 1e-5 * largest, name
