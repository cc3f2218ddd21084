"""The effect of restoring single tokens: one patch by hand for each, and what is known without a patch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interventions.trace.__main__ as command
import vlm_jax
from interventions.engine.read import Gold
from interventions.kinds.patch import Patch
from interventions.modules import MODULE_SITES
from interventions.trace.corruption import Corrupter, survey
from interventions.trace.options import TraceOptions
from interventions.trace.tokens import token_effects, token_maps
from vlm_jax.data import load_task
from vlm_jax.prompts import batches, encode


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def examples():
    return load_task("mini-okvqa", split="trace", limit=3)


@jax.jit
def scored(model, inputs, gold, interventions):
    x, _ = model.hidden(inputs, interventions)
    return gold(model, model.text.norm(x), 0).probability[0]


def by_hand(model, batch, base, layer, site, token):
    """p(gold) of a whole run with one token's clean output patched in, and of the corrupted run."""
    gold = Gold.of(batch.inputs, batch.spans["answer"]).replace(first=0)
    clean = model(batch.inputs, taps=(site,)).taps[site]
    where = np.zeros(batch.inputs.input_ids.shape, bool)
    where[:, token] = True
    slot = np.where(np.arange(len(clean)) == layer, 0, 1).astype(np.int32)
    patch = Patch({site: clean[layer][None]}, {site: slot}, where)
    return tuple(scored(model, batch.inputs, gold, acting) for acting in ((*base, patch), tuple(base)))


@pytest.mark.parametrize(
    "name, corruption",
    [
        ("mini-qwen3-vl", "question_noise"),
        ("mini-qwen3-vl", "swapped_image"),
        ("mini-gemma3", "question_noise"),
        ("mini-llava", "question_noise"),
    ],
)
def test_effects_equal_patches_by_hand(examples, name, corruption):
    """In both modules, of tokens of the picture and of the question; and the effects differ from each other."""
    model, processor = vlm_jax.load(name)
    options = TraceOptions(corruption=corruption)
    groups = batches(examples, processor, model.config, 4)
    corrupt = Corrupter(model, processor, examples, survey(model, groups), options)
    batch = encode(examples[:1], processor, model.config)
    effects = token_effects(corrupt, 0, batch)
    base = corrupt([0], batch)
    question, image = (np.flatnonzero(batch.spans[name][0]) for name in ("question", "image"))
    cells = [(2, 0, question[1]), (5, 1, question[-1]), (0, 0, image[3]), (3, 1, question[-1] + 2)]
    for layer, module, token in cells:
        patched, corrupted = by_hand(model, batch, base, layer, MODULE_SITES[module], token)
        np.testing.assert_allclose(effects[layer, module, token], patched - corrupted, atol=2e-6)
    assert len(np.unique(np.abs(effects).round(5))) > 3
    before = effects[..., : (question if corruption == "question_noise" else image)[0]]
    assert before.shape[-1] > 2 and (np.abs(before) < 2e-6).all()  # there the corrupted run is the clean one
    assert np.abs(effects).max() > 5e-3
    padding = ~np.asarray(batch.inputs.attention_mask)[0]
    assert (np.abs(effects[..., padding]) < 2e-6).all()


def test_the_command_keeps_them_beside_the_trace(mini, examples, tmp_path):
    """The grid of modules is that of a trace of all positions."""
    for name, positions in (("each", ("each",)), ("all", ("all",))):
        command.main(command.Args(limit=3, positions=positions, out=tmp_path / name))
    each, every = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("each", "all"))
    assert each["rr"] == every["rr"] and not (tmp_path / "all/token_maps").exists()
    index = json.loads((tmp_path / "each/token_maps/index.json").read_text())
    assert [sample["id"] for sample in index["samples"]] == [example.id for example in examples[:2]]
    assert index["series"] == ["attn", "mlp"] and index["samples"][0]["queries"] is None
    with np.load(tmp_path / "each/token_maps/arrays.npz") as arrays:
        kept = arrays["1"]
    (_, want) = token_maps(*mini, examples, TraceOptions(), 2)
    np.testing.assert_allclose(kept, want.values, atol=1e-3)
    assert kept.shape[-1] == len(index["samples"][1]["tokens"]) and jnp.abs(kept).max() > 1e-3


@pytest.mark.parametrize("changes", [{"heads": True}, {"positions": ("each", "all")}, {"metric": "log_probability"}])
def test_refused(changes):
    with pytest.raises(vlm_jax.UserError, match="--positions each goes with no other group"):
        TraceOptions(**{"positions": ("each",), **changes}).check(8)


def test_maps_without_each_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(command.Args(maps=2, out=tmp_path / "run"))
    assert "--maps belongs to --positions each" in capsys.readouterr().err
    with pytest.raises(vlm_jax.UserError, match=r"belongs to interventions\.trace"):
        TraceOptions(positions=("each",)).check_modules()
