"""Damaged checkpoints: each is refused in a sentence, or gives the model that was saved."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import damaged_copy
from hf_oracle import tiny_config, tiny_model
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.errors import UserError

SWAPS = (
    ("vision_tower.", "model.vision_tower."),
    ("language_model.model.", "model.language_model."),
    ("layers.1.", "layers.01."),
    ("layers.0.", "layers.9."),
    (".weight", ".bias"),
    ("q_proj", "k_proj"),
)


@pytest.fixture(scope="module", params=["one file", "shards"])
def folder(request, tmp_path_factory) -> Path:
    """A tiny LLaVA, whose files have other names of tensors than the library, with buffers of older files."""
    folder = tmp_path_factory.mktemp("model") / "whole"
    tiny_model(tiny_config("llava", tied=True)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.embeddings.position_ids"] = np.arange(17)[None]
    tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    if request.param == "shards":
        (folder / "model.safetensors").unlink()
        weight_map = {name: f"model-{1 + i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in sorted(set(weight_map.values())):
            save_file({name: value for name, value in tensors.items() if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, named_leaves(vlm_jax.load(folder)[0]))


def check(seed: int, folder: Path, tmp_path: Path, whole) -> bool:
    """Whether the damaged folder is refused."""
    damaged, how = damaged_copy(folder, tmp_path, seed, SWAPS)
    with contextlib.suppress(OSError, ValueError):
        if json.loads((damaged / "config.json").read_text()):  # with other values it is another model
            shutil.copyfile(folder / "config.json", damaged / "config.json")
    try:
        leaves = named_leaves(vlm_jax.load(damaged)[0])
    except UserError as error:
        assert "\n" not in str(error), how
        return True
    except Exception as error:
        raise AssertionError(f"seed {seed}, {how}: {type(error).__name__}") from error
    finally:
        shutil.rmtree(damaged)
    assert leaves.keys() == whole.keys(), f"seed {seed}, {how}"
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, whole[name], err_msg=f"seed {seed}, {how}, {name}")
    return False


@pytest.mark.filterwarnings("ignore")
def test_damaged_folders(folder, whole, tmp_path):
    refused = [check(seed, folder, tmp_path, whole) for seed in range(30)]
    assert 10 < sum(refused) < 30  # some damages say nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hundred", range(1, 11))
def test_many_damaged_folders(hundred, folder, whole, tmp_path):
    for seed in range(100 * hundred, 100 * hundred + 100):
        check(seed, folder, tmp_path, whole)
