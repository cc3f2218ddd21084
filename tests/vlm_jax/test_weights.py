"""bfloat16 matrices under float32 activations: which they are, their gradients, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import tiny_config, tiny_model

import vlm_jax
from train.subsets import check_trainable
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.checkpoints.orbax import save_orbax
from vlm_jax.errors import UserError
from vlm_jax.nn import products


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a checkpoint as it is published, in bfloat16."""

    @functools.cache
    def folder(family):
        path = tmp_path_factory.mktemp(family)
        config = tiny_config(family, tied=family.startswith("gemma3"))
        tiny_model(config, 0).to(torch.bfloat16).save_pretrained(path)
        return path, config

    return folder


def test_matrices_alone_are_narrow(folders):
    """Linears and token embeddings: half of the memory, but for norms and biases."""
    folder, _ = folders("qwen3_vl")
    model, _ = vlm_jax.load(folder, dtype="float32", weights="bfloat16")
    leaves = named_leaves(model)
    narrow = {name for name, leaf in leaves.items() if leaf.dtype == jnp.bfloat16}
    assert narrow == {name for name in leaves if name.endswith(".kernel") or name == "text.embed_tokens.weight"}
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"bfloat16", "float32"}
    with pytest.raises(UserError, match="cannot be trained"):
        check_trainable(model)
    check_trainable(vlm_jax.load(folder, dtype="float32")[0])


@pytest.mark.parametrize("units", [True, False])
def test_gradients(folders, monkeypatch, units):
    """Those of inputs, through frozen matrices."""
    monkeypatch.setattr(products, "has_matrix_units", lambda: units)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((7, 200)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((200, 5)), jnp.bfloat16)
    c = jnp.asarray(rng.standard_normal((7, 5)), jnp.float32)

    def loss(x, w):
        return (products.product("ri,io->ro", x, w) * c).sum()

    of_x, of_w = jax.grad(loss, (0, 1))(x, w)
    np.testing.assert_allclose(of_x, np.asarray(c, np.float64) @ np.asarray(w, np.float64).T, rtol=1e-5, atol=1e-5)
    assert of_w.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(of_w, np.float64), np.asarray(x.T @ c, np.float64), rtol=0.004, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "weights", "says"),
    [
        ("bfloat16", "bfloat16", "use bfloat16 with float32"),
        ("float32", "float16", "use bfloat16 with float32"),
        ("float32", "bfloat16", "would be rounded"),
    ],
)
def test_refused(tmp_path, dtype, weights, says):
    """Among others matrices that bfloat16 would change."""
    tiny_model(tiny_config("qwen2"), 0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says):
        vlm_jax.load(tmp_path, dtype=dtype, weights=weights)


def test_an_orbax_folder(folders, tmp_path):
    folder, _ = folders("qwen2")
    model, _ = vlm_jax.load(folder, dtype="float32", weights="bfloat16")
    save_orbax(model, tmp_path / "kept")
    again, _ = vlm_jax.load(tmp_path / "kept", weights="bfloat16")
    for name, leaf in named_leaves(model).items():
        assert leaf.dtype == named_leaves(again)[name].dtype
        np.testing.assert_array_equal(leaf, named_leaves(again)[name])
    save_orbax(vlm_jax.load(folder, dtype="float32")[0], tmp_path / "wide")
    with pytest.raises(UserError, match="would be rounded"):
        vlm_jax.load(tmp_path / "wide", weights="bfloat16")
