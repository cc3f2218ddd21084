"""bfloat16 matrices under float32 activations: which they are, their gradients, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import make_batch, tiny_config, tiny_model

import vlm_jax
from eval import accuracy
from interventions import Add, Gold, sweep
from interventions.engine.grids import patch_grid
from interventions.placement.adapters import init_lora, merge
from train.subsets import check_trainable
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.checkpoints.orbax import save_orbax
from vlm_jax.convert import convert
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
def test_products_and_gradients(monkeypatch, units):
    """Compiled, against float64."""
    monkeypatch.setattr(products, "has_matrix_units", lambda: units)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((7, 200)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((200, 5)), jnp.bfloat16)
    c = jnp.asarray(rng.standard_normal((7, 5)), jnp.float32)

    @jax.jit
    def gradients(x, w):
        return jax.value_and_grad(lambda x, w: (products.product("ri,io->ro", x, w) * c).sum(), (0, 1))(x, w)

    value, (of_x, of_w) = gradients(x, w)
    wide = [np.asarray(array, np.float64) for array in (x, w, c)]
    np.testing.assert_allclose(value, (wide[0] @ wide[1] * wide[2]).sum(), rtol=1e-5)
    np.testing.assert_allclose(of_x, wide[2] @ wide[1].T, rtol=1e-5, atol=1e-5)
    assert of_w.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(of_w, np.float64), wide[0].T @ wide[2], rtol=0.004, atol=1e-3)


@pytest.fixture(scope="module")
def pair(folders):
    """A model with float32 copies of its matrices, and the same with the matrices as they are."""
    folder, config = folders("qwen3_vl")
    models = [vlm_jax.load(folder, dtype="float32", weights=weights)[0] for weights in (None, "bfloat16")]
    batch = make_batch([[5, (4, 6), 9], [17]], "left", 0, config)
    return models, vlm_jax.Inputs.from_hf(models[0].config, **batch)


def adapter(model):
    """LoRA whose B is not zero."""
    lora = init_lora(model, ["L0-attn", "L1-mlp"], r=2, alpha=4.0, dropout=0.0, key=jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), (1,))
    return lora.replace(weights={site: (a, b + 0.01 * noise) for site, (a, b) in lora.weights.items()})


def test_generation(pair):
    models, inputs = pair
    wide, kept = (vlm_jax.generate(model, inputs, 8, eos_token_id=()) for model in models)
    np.testing.assert_array_equal(wide, kept)


def test_a_merged_adapter_loses_nothing(pair):
    """Its kernels become float32. The control: rounded to bfloat16, they compute something else."""
    models, inputs = pair
    lora = adapter(models[0])
    wanted = models[0](inputs, (lora,)).logits
    merged = merge(models[1], lora)
    assert merged.text.layers.self_attn.q_proj.kernel.dtype == jnp.float32
    np.testing.assert_allclose(merged(inputs).logits, wanted, atol=3e-5)
    rounded = jax.tree.map(
        lambda new, old: new.astype(old.dtype), merged, models[1], is_leaf=lambda leaf: isinstance(leaf, jax.Array)
    )
    assert np.abs(rounded(inputs).logits - wanted).max() > 1e-3


def test_gradients_of_an_adapter(pair):
    """Through the frozen matrices."""
    models, inputs = pair
    lora = adapter(models[0])

    def gradient(model):
        return jax.grad(lambda weights: (model(inputs, (lora.replace(weights=weights),)).logits ** 2).mean())(
            lora.weights
        )

    wide, kept = map(gradient, models)
    for one, other in zip(jax.tree.leaves(wide), jax.tree.leaves(kept), strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_allclose(other, one, atol=2e-5 * float(np.abs(one).max()) + 1e-7)


def test_a_sweep(pair):
    models, inputs = pair
    answer = np.zeros(inputs.input_ids.shape, bool)
    answer[:, -2:] = True
    grid, _ = patch_grid(("text.attn_out", "text.mlp_out"), models[0].config.text.num_hidden_layers)
    noise = 0.1 * np.random.default_rng(0).standard_normal((*answer.shape, 64)).astype(np.float32)
    read, options = Gold.of(inputs, answer), {"base": (Add(jnp.asarray(noise)),), "clean": ()}
    wide, kept = (sweep(model, inputs, grid, read, **options) for model in models)
    np.testing.assert_allclose(kept.logp, wide.logp, atol=2e-5)


def test_saved_and_loaded_again(pair, tmp_path):
    """Bit for bit; transformers would read it with the activations' precision."""
    kept = pair[0][1]
    vlm_jax.save(kept, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    again = named_leaves(vlm_jax.load(tmp_path)[0])
    for name, leaf in named_leaves(kept).items():
        assert leaf.dtype == again[name].dtype
        np.testing.assert_array_equal(leaf, again[name])


def test_a_command(tmp_path, capsys):
    """It takes the option, and says so in its results."""
    convert("mini-qwen3-vl", tmp_path / "half", dtype="bfloat16")
    scores = {}
    for weights in (None, "bfloat16"):
        options = {"model": str(tmp_path / "half"), "dtype": "float32", "weights": weights, "limit": 6}
        accuracy.main(accuracy.Args(**options, out=tmp_path / str(weights)))
        scores[weights] = (tmp_path / str(weights) / "samples.jsonl").read_text()
    assert scores[None] == scores["bfloat16"]
    model_args = json.loads((tmp_path / "bfloat16/results.json").read_text())["config"]["model_args"]
    assert "weights=bfloat16" in model_args


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
