"""Damaged PEFT folders: each is refused in a sentence, or gives what the real PEFT makes of it."""

import copy
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import torch
from damage import damaged_copy
from hf_oracle import make_batch, tensors, tiny_config, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model

import vlm_jax
from interventions.placement.adapters import load_peft
from vlm_jax.errors import UserError

BATCH = make_batch([[7], [4]], "left")
REAL = BATCH["attention_mask"] == 1
SWAPS = (
    ("model.language_model.layers", "model.layers"),
    ("lora_A", "lora_B"),
    ("q_proj", "k_proj"),
    ("layers.1", "layers.01"),
    ("layers.2", "layers.8"),
    ("base_model.model.", ""),
    (".weight", ".bias"),
    ("language_model.layers.0.self_attn", "visual.blocks.0.attn"),
)


@pytest.fixture(scope="module")
def oracle():
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def base(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return vlm_jax.load(folder)[0]


@pytest.fixture(scope="module")
def run(base):
    inputs = vlm_jax.Inputs.from_hf(base.config, **BATCH)
    return jax.jit(lambda interventions: base(inputs, interventions).logits)


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    options |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True}
    get_peft_model(copy.deepcopy(oracle), LoraConfig(**options)).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def check(seed, folder, tmp_path, base, run, oracle) -> bool:
    """Whether the damaged folder is refused."""
    damaged, how = damaged_copy(folder, tmp_path, seed, SWAPS)
    try:
        lora = load_peft(base, damaged)
    except UserError as error:
        assert "\n" not in str(error) and str(damaged) in str(error), how
        return True
    except Exception as error:
        raise AssertionError(f"seed {seed}, {how}: {type(error).__name__}") from error
    try:
        chex.assert_trees_all_equal(lora.weights, load_peft(base, folder).weights)
        assert lora.scale == load_peft(base, folder).scale
    except AssertionError:
        theirs = PeftModel.from_pretrained(copy.deepcopy(oracle), damaged).eval()
        with torch.no_grad():
            want = theirs(**tensors(BATCH), use_cache=False).logits[torch.from_numpy(REAL)].numpy()
        np.testing.assert_allclose(np.asarray(run((lora,)))[REAL], want, atol=1e-4, err_msg=f"seed {seed}, {how}")
    return False


@pytest.mark.filterwarnings("ignore")
def test_damaged_folders(folder, tmp_path, base, run, oracle):
    refused = [check(seed, folder, tmp_path, base, run, oracle) for seed in range(60)]
    assert 30 < sum(refused) < 60  # some damages say nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hundred", range(1, 11))
def test_many_damaged_folders(hundred, folder, tmp_path, base, run, oracle):
    for seed in range(100 * hundred, 100 * hundred + 100):
        check(seed, folder, tmp_path, base, run, oracle)
