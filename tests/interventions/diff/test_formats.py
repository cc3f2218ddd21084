"""Dictionaries on disk: every layout that is read, against its formula in NumPy, and what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from kind_cases import dictionary, one_sentence
from safetensors.numpy import save_file

from interventions.diff.dictionaries import load_dictionaries, load_dictionary, save_dictionary
from interventions.diff.place import Place
from vlm_jax import UserError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((20, 64)).astype(np.float32)
PLACE = Place("text.resid_post", 4)


def topk(values, k):
    """The k largest, if positive."""
    kept = np.where(values >= np.sort(values, -1)[..., -k, None], values, 0)
    return np.maximum(kept, 0)


@pytest.fixture
def one():
    return dictionary(np.random.default_rng(1), members=1).member(0)


@pytest.fixture
def jump(one):
    threshold = np.abs(np.random.default_rng(2).standard_normal(96)).astype(np.float32)
    return one.replace(architecture="jumprelu", k=None, threshold=threshold)


def saved(folder, one, place=PLACE, **options):
    save_dictionary(folder, one, place, model="abc", model_name="mini", **options)
    return folder


def config(folder, **changes):
    """Changes the configuration of a folder."""
    content = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_round_trip(one, jump, architecture, tmp_path):
    given = one if architecture == "topk" else jump
    sparsity = RNG.standard_normal(96).astype(np.float32)
    stored = load_dictionary(saved(tmp_path / "d", given, sparsity=sparsity))
    assert (stored.place, stored.model) == (PLACE, "abc")
    assert (stored.dictionary.architecture, stored.dictionary.k) == (given.architecture, given.k)
    np.testing.assert_array_equal(stored.dictionary(X), given(X))
    np.testing.assert_array_equal(stored.sparsity, sparsity)
    facts = json.loads((tmp_path / "d" / "cfg.json").read_text())
    assert facts["metadata"]["hook_name"] == "blocks.4.hook_resid_post" and facts["d_sae"] == 96
    again = saved(tmp_path / "again", given, sparsity=sparsity)
    for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


def test_saelens_bias_of_the_input_is_folded_in(one, tmp_path):
    folder = saved(tmp_path / "d", one)
    config(folder, apply_b_dec_to_input=True)
    want = topk((X - one.b_dec) @ one.W_enc + one.b_enc, one.k)
    np.testing.assert_allclose(load_dictionary(folder).dictionary.codes(X), want, atol=1e-5)
    assert np.abs(want - np.asarray(one.codes(X))).max() > 0.01


def test_saelens_decoder_norm_is_folded_in(one, tmp_path):
    """``rescale_acts_by_decoder_norm``: latents are chosen by their pre-activation times their row's norm."""
    norm = np.abs(RNG.standard_normal(96)).astype(np.float32) + 0.5
    scaled = one.replace(W_dec=one.W_dec * norm[:, None])
    folder = saved(tmp_path / "d", scaled)
    config(folder, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=True)
    codes = topk(((X - one.b_dec) @ one.W_enc + one.b_enc) * norm, one.k)
    got = load_dictionary(folder).dictionary
    np.testing.assert_allclose(got.codes(X), codes, atol=1e-5)
    np.testing.assert_allclose(got(X), (codes / norm) @ scaled.W_dec + one.b_dec, atol=1e-4)


def test_saelens_standard_is_a_relu(one, tmp_path):
    folder = saved(tmp_path / "d", one)
    config(folder, architecture="standard", k=None)
    want = np.maximum(X @ one.W_enc + one.b_enc, 0)
    np.testing.assert_allclose(load_dictionary(folder).dictionary.codes(X), want, atol=1e-5)


def test_saelens_before_version_6(one, tmp_path):
    """Flat, with the activation as a string, and the bias subtracted from the input by default."""
    folder = saved(tmp_path / "d", one)
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "hook_name": "blocks.2.hook_mlp_out"}
    (folder / "cfg.json").write_text(json.dumps({"d_in": 64, "d_sae": 96, **old}))
    stored = load_dictionary(folder)
    assert stored.place == Place("text.mlp_out", 2) and stored.dictionary.k == 5
    want = topk((X - one.b_dec) @ one.W_enc + one.b_enc, 5)
    np.testing.assert_allclose(stored.dictionary.codes(X), want, atol=1e-5)


def test_llama_scope(jump, tmp_path):
    """Weights for activations of norm sqrt(D); the threshold is in raw units, as SAELens reads it."""
    folder, norm = tmp_path / "d", 11.0
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {"encoder.weight": jump.W_enc.T, "encoder.bias": jump.b_enc}
    tensors |= {"decoder.weight": jump.W_dec.T, "decoder.bias": jump.b_dec}
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, folder / "checkpoints/final.safetensors")
    facts = {"d_model": 64, "d_sae": 96, "jump_relu_threshold": 0.3, "hook_point_in": "blocks.7.hook_resid_post"}
    facts["dataset_average_activation_norm"] = {"in": norm}
    (folder / "hyperparams.json").write_text(json.dumps(facts))
    stored, factor = load_dictionary(folder), 8 / norm
    before = factor * X @ jump.W_enc + jump.b_enc
    codes = np.where(before > 0.3 * factor, before, 0)
    np.testing.assert_allclose(stored.dictionary.codes(X), codes, atol=1e-5)
    np.testing.assert_allclose(stored.dictionary(X), (codes @ jump.W_dec + jump.b_dec) / factor, atol=1e-4)
    assert stored.place == Place("text.resid_post", 7)
    again = load_dictionary(folder, k=3).dictionary  # P2 drops the threshold
    np.testing.assert_allclose(again.codes(X), topk(before, 3), atol=1e-5)


def test_gemma_scope(jump, tmp_path):
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    np.savez(tmp_path / "params.npz", **{name: getattr(jump, name) for name in names})
    for source in (tmp_path, tmp_path / "params.npz"):
        np.testing.assert_array_equal(load_dictionary(source).dictionary(X), jump(X))


@pytest.mark.parametrize("rows_are_latents", [True, False])
def test_mmdiff(one, tmp_path, rows_are_latents):
    arrays = {name: getattr(one, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if rows_are_latents:
        arrays["W_enc"] = np.ascontiguousarray(one.W_enc.T)
    save_file(arrays, tmp_path / "layer_3.safetensors")
    np.testing.assert_array_equal(load_dictionary(tmp_path / "layer_3.safetensors", k=one.k).dictionary(X), one(X))
    with pytest.raises(UserError, match="does not tell its k"):
        load_dictionary(tmp_path / "layer_3.safetensors")


def damaged(folder, how):
    weights = folder / "sae_weights.safetensors"
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "pickled":
            weights.write_bytes(pickle.dumps({"W_enc": 1}))
        case "missing":
            weights.unlink()
        case "config":
            (folder / "cfg.json").write_text("{")
        case "gated":
            config(folder, architecture="gated")
        case "normalised":
            config(folder, normalize_activations="layer_norm")
        case "k":
            config(folder, k=97)
        case "k as text" | "half a k" | "true as k":
            config(folder, k={"k as text": "2", "half a k": 2.5, "true as k": True}[how])
        case "metadata":
            config(folder, metadata="x")
        case "array":
            save_file({"W_enc": np.zeros((64, 96), np.float32)}, weights)
        case "shape":
            save_file({n: np.zeros((3, 3), np.float32) for n in ("W_enc", "b_enc", "W_dec", "b_dec")}, weights)


DAMAGES = {
    "truncated": "cannot be read as safetensors",
    "pickled": "cannot be read as safetensors",
    "missing": "no sae_weights.safetensors",
    "config": "cannot be read as JSON",
    "gated": "'gated' dictionary, which is not supported",
    "normalised": "normalises activations",
    "k": "k is 97, but there are 96 latents",
    "k as text": "k is '2', not a whole number",
    "half a k": "k is 2.5, not a whole number",
    "true as k": "k is True, not a whole number",
    "metadata": "metadata is 'x', not an object",
    "array": "lacks W_dec",
    "shape": "b_enc has shape",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damages(one, tmp_path, how):
    folder = saved(tmp_path / "d", one)
    damaged(folder, how)
    with pytest.raises(UserError, match=DAMAGES[how]) as caught:
        load_dictionary(folder)
    assert one_sentence(str(caught.value).replace("cfg.json", "").replace("sae_weights.safetensors", ""))


def test_truncated_arrays(jump, tmp_path):
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    np.savez(tmp_path / "params.npz", **{name: getattr(jump, name) for name in names})
    (tmp_path / "params.npz").write_bytes((tmp_path / "params.npz").read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read as arrays"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize("name, value", [("W_dec", np.nan), ("b_enc", np.inf)])
def test_numbers_that_are_not_finite(one, tmp_path, name, value):
    array = np.array(getattr(one, name))
    array.flat[0] = value
    with pytest.raises(UserError, match=f"{name} holds a number that is not finite"):
        load_dictionary(saved(tmp_path / "d", one.replace(**{name: array})))


def test_a_dictionary_that_is_missing_is_an_error(tmp_path):
    """P2's released script takes random weights instead."""
    with pytest.raises(UserError, match="does not exist"):
        load_dictionary(tmp_path / "nowhere")
    (tmp_path / "d.pt").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle"):
        load_dictionary(tmp_path / "d.pt")
    with pytest.raises(UserError, match="holds no dictionary"):
        load_dictionary(tmp_path)
    with pytest.raises(UserError, match="holds no dictionaries"):
        load_dictionaries(tmp_path)


@pytest.mark.parametrize(
    "place", [Place("text.resid_post", 4), Place("text.attn_out", 11, 3), Place("text.embeddings", None)]
)
def test_names_of_places(place):
    assert Place.parse(str(place)) == place


@pytest.mark.parametrize(
    "name", ["text.resid_post", "text.embeddings.3", "resid", "text.nowhere.3", "text.resid_post.x"]
)
def test_other_names(name):
    with pytest.raises(UserError):
        Place.parse(name)


@pytest.mark.parametrize("name", ["topk", "rescaled", "jumprelu"])
def test_folders_that_saelens_wrote(name):
    """By version 6.54.12, with the codes and reconstructions that it computes (tests/peers/test_saelens.py)."""
    folder = Path(__file__).parent / "saelens" / name
    found = load_dictionary(folder).dictionary
    with np.load(folder / "expected.npz") as expected:
        np.testing.assert_allclose(found.codes(expected["x"]), expected["codes"], atol=1e-5)
        np.testing.assert_allclose(found(expected["x"]), expected["reconstruction"], atol=1e-5)
        assert np.abs(expected["codes"]).max() > 1
