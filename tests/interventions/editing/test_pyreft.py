"""Editors in pyreft's layout: the tensors, by its formulas, and back again."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interventions.editing.editors import EDITOR_SITES
from interventions.editing.options import EditorOptions
from interventions.editing.pyreft import load_pyreft, save_pyreft
from interventions.kinds.reft import EDITOR_KINDS
from vlm_jax import UserError
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.info import config_of
from vlm_jax.sites import Context

#: pyreft's ``forward`` from its ``state_dict``, in NumPy; an orthonormal layer's weight is its ``rotate_layer``.
FORWARD = {
    "LoReFT": lambda h, t: h + (h @ t["weight"].T + t["bias"] - h @ t["rotate_layer"]) @ t["rotate_layer"].T,
    "DiReFT": lambda h, t: h + (h @ t["weight"].T + t["bias"]) @ t["rotate_layer"].T,
    "NoReFT": lambda h, t: (
        h
        + (h @ t["learned_source.weight"].T + t["learned_source.bias"] - h @ t["proj_layer.weight"].T)
        @ t["proj_layer.weight"]
    ),
    "NodiReFT": lambda h, t: h + (h @ t["learned_source.weight"].T + t["learned_source.bias"]) @ t["proj_layer.weight"],
    "ConsReFT": lambda h, t: h + (t["learned_source"] - h @ t["rotate_layer"]) @ t["rotate_layer"].T,
    "LobiReFT": lambda h, t: h + t["learned_source"] @ t["rotate_layer"].T,
}


@pytest.fixture(scope="module")
def model():
    return abstract(config_of("mini-llava"))


def made(model, kind):
    return EditorOptions(kind=kind, layers=("1", "4"), rank=3).init(model, jax.random.key(2))


@pytest.mark.parametrize("kind", EDITOR_KINDS)
def test_files_hold_what_pyreft_would_compute_with(model, kind, tmp_path):
    editors = made(model, kind)
    save_pyreft(editors, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(list(tmp_path.glob("intkey_*.safetensors"))) == len(config["sorted_keys"]) == 2 + 1 + 2 + 2
    h = np.random.default_rng(0).standard_normal((1, 5, 128)).astype(np.float32)
    for key, own in zip(config["sorted_keys"], config["vlm_jax"], strict=True):
        name, site = own["editor"], EDITOR_SITES[own["editor"]]
        context = Context() if site == "text.embeddings" else Context(layer=int(key.split(".")[1]))
        got = editors[name].replace(group=None)(site, h, context)
        want = FORWARD[kind](h, load_file(tmp_path / f"intkey_{key}.safetensors"))
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(want - h).max() > 1e-2


@pytest.mark.parametrize("kind", EDITOR_KINDS)
def test_they_come_back(model, kind, tmp_path):
    editors = made(model, kind)
    save_pyreft(editors, tmp_path)
    loaded = load_pyreft(tmp_path)
    assert loaded.keys() == editors.keys()
    for name, editor in loaded.items():
        assert type(editor) is type(editors[name]) and editor.group == editors[name].group
        np.testing.assert_array_equal(*(e.slot[EDITOR_SITES[name]] for e in (editor, editors[name])))
        for one, other in zip(*(jax.tree.leaves(e.weights) for e in (editor, editors[name])), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def damage_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    config["intervention_types"][0] = "<class 'pyreft.interventions.OtherIntervention'>"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no editors"),
        (lambda folder: (folder / "config.json").write_text("{}"), "holds no editors"),
        (lambda folder: next(folder.glob("intkey_*")).unlink(), "holds no editors"),
        (lambda folder: next(folder.glob("intkey_*")).write_bytes(b"\x80\x04"), "holds no editors"),
        (lambda folder: save_file({"x": np.zeros(2)}, next(folder.glob("intkey_*"))), "holds no editors"),
        (damage_kind, "has an intervention of the type"),
    ],
)
def test_damaged_folders_are_refused(model, damage, says, tmp_path):
    save_pyreft(made(model, "LoReFT"), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        load_pyreft(tmp_path)
