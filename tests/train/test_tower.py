"""LoRA in the vision tower, DoRA and rsLoRA: what is trained, how deep gradients reach, and the command."""

import json

import chex
import jax
import numpy as np
import pytest

import train.lora as lora_command
from interventions.modules import module_names, tower_names
from interventions.placement.adapters import init_lora, load_peft, merge
from interventions.placement.rules import Scoring, choose_modules
from interventions.placement.scores import module_sizes
from train.adapter import Adapted, LoRAOptions, adapter_label
from train.subsets import split
from train.tower import tower_loss, train_tower_lora
from train.trunk import LayeredLoRA, adapter_loss, train_lora, trunk
from vlm_jax import UserError, load
from vlm_jax.data import load_task
from vlm_jax.prompts import Fitted, encode, positions


@pytest.fixture(scope="module")
def mini():
    return load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def batch(mini):
    model, processor = mini
    return encode(load_task("perception", split="train", limit=8), processor, model.config)


def options(**changed) -> LoRAOptions:
    return LoRAOptions(**{"r": 4, "epochs": 2, "batch": 4, "accumulation": 1, "dropout": 0.0, **changed})


def loud(model, names, **changed):
    """An adapter whose B is not zero and whose magnitudes are not what they began as."""
    lora = options(**changed).begin(model, names)
    louder = jax.tree.map(lambda w: w + 0.05, lora.weights)
    magnitude = lora.magnitude and {site: 1.2 * value for site, value in lora.magnitude.items()}
    return lora.replace(weights=louder, magnitude=magnitude)


def fitted(batch) -> Fitted:
    index, valid = positions(batch.spans["answer"] | batch.spans["end"])
    return Fitted(batch.inputs.turned(), index, valid)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("names", [["L5-attn", "L6-mlp"], module_names(8)], ids=["some", "all"])
def test_a_step_computes_what_the_kind_computes(mini, batch, names, dora):
    """Training's own form of LoRA and the merged model have the same loss; without the magnitudes it is another."""
    model, _ = mini
    lora, key = loud(model, names, use_dora=dora), jax.random.key(0)
    data = trunk(model, batch, 4 if len(names) == 2 else 0, size=8)
    lowest = 4 if len(names) == 2 else 0
    got = adapter_loss(Adapted(model, lora, lowest), data, key)
    whole = tower_loss(Adapted(merge(model, lora), init_lora_nowhere(model), 0), fitted(batch), key)
    np.testing.assert_allclose(got, whole, rtol=1e-5)
    if dora:
        assert abs(adapter_loss(Adapted(model, lora.replace(magnitude=None), lowest), data, key) - got) > 1e-3


def init_lora_nowhere(model):
    """An adapter that changes nothing, as B is zero."""
    return init_lora(model, ["V0-attn"], r=1, alpha=1.0, dropout=0.0, key=jax.random.key(0))


def test_the_scale_of_rslora(mini):
    model, _ = mini
    plain, stable = (options(use_rslora=on, alpha=6.0).begin(model, ["L1-mlp"]) for on in (False, True))
    assert (float(plain.scale), float(stable.scale)) == (1.5, 3.0)
    assert LayeredLoRA.of(stable.replace(key=jax.random.key(0)), 8, 0).scale[0] == 3.0


@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapter_is_trained(mini, dora):
    """And all of it: A, B and, with DoRA, magnitudes, in the tower as in the decoder."""
    model, processor = mini
    before = jax.tree.map(np.array, model)
    examples, names = load_task("perception", split="train", limit=8), ["V1-attn", "V2-mlp", "L3-attn"]
    how = options(use_dora=dora, use_rslora=True)
    began, lora = how.begin(model, names), train_tower_lora(model, processor, examples, names, how, "test")
    chex.assert_trees_all_equal(jax.tree.map(np.array, model), before)
    assert {site.partition(".")[0] for site in lora.sites} == {"visual", "text"}
    for path, leaf in jax.tree_util.tree_leaves_with_path((lora.weights, lora.magnitude)):
        old = dict(jax.tree_util.tree_leaves_with_path((began.weights, began.magnitude)))[path]
        assert np.isfinite(leaf).all() and (leaf != old).any(), path
    chex.assert_trees_all_equal(lora.slot, began.slot)
    assert (lora.magnitude is not None) == dora
    assert {adapter_label(f"lora.magnitude.{site}") for site in lora.sites} == {"lora_magnitude"}


def test_no_gradient_below_the_lowest_block(mini, batch):
    """The backward pass does not run through the blocks below: a NaN in their kernels' gradients cannot be seen, so the
    number of differentiated matmuls is compared."""
    model, _ = mini
    key = jax.random.key(0)

    def gradients(lowest):
        lora = loud(model, ["V2-attn"])
        trained, rest = split(Adapted(model, lora, lowest), adapter_label)
        loss = lambda trained: tower_loss(rest.joined(trained), fitted(batch), key)  # noqa: E731
        return jax.make_jaxpr(jax.grad(loss))(trained), jax.jit(jax.grad(loss))(trained)

    (short, got), (long, want) = gradients(2), gradients(0)
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, atol=1e-6)
    assert str(short).count("length=2") > str(long).count("length=2")  # the blocks that are only run forward


def test_dropout_needs_its_key_and_changes_the_loss(mini, batch):
    model, _ = mini
    params = Adapted(model, loud(model, ["V0-mlp"], dropout=0.5), 0)
    losses = [float(tower_loss(params, fitted(batch), jax.random.key(i))) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_padded_dora_is_trained_as_it_is(mini, batch, monkeypatch):
    """The slots that no layer uses change nothing."""
    model, _ = mini
    names, how = ["L5-attn", "L6-mlp", "L7-mlp"], options(use_dora=True, epochs=1)
    padded = train_lora(model, names, batch, how, "padded")
    monkeypatch.setattr("train.trunk.pad", lambda lora, model, slots: lora)
    plain = train_lora(model, names, batch, how, "plain")
    chex.assert_trees_all_close(padded, plain, atol=1e-6)
    began = how.begin(model, names)
    assert all((padded.magnitude[site] != began.magnitude[site]).any() for site in began.magnitude)


def test_placements_in_the_tower(mini, tmp_path):
    model, _ = mini
    depth = model.depths["visual"]
    scoring = Scoring(depth, module_sizes(model, tower=True), tower=True)
    assert choose_modules("all", scoring, "any", 1) == tower_names(depth)
    assert choose_modules("last", scoring, "any", 2) == tower_names(depth)[-2:]
    drawn = choose_modules("random", scoring, "any", 2, seed=3)
    assert len(drawn) == 2 and set(drawn) <= set(tower_names(depth))
    (tmp_path / "names.json").write_text('["V1-mlp"]')
    assert choose_modules(f"{tmp_path}/names.json", scoring, "any", 1) == ["V1-mlp"]
    (tmp_path / "names.json").write_text('["L1-mlp"]')
    with pytest.raises(UserError, match="unknown module 'L1-mlp'"):
        choose_modules(f"{tmp_path}/names.json", scoring, "any", 1)


def test_the_command_trains_the_tower(tmp_path, capsys, mini):
    args = {"r": 2, "epochs": 1, "train": "8", "eval": "4", "out": tmp_path / "run", "batch": 4, "accumulation": 1}
    args |= {"where": "visual", "baselines": False, "use_dora": True, "use_rslora": True}
    with pytest.raises(SystemExit):
        lora_command.main(lora_command.Args(**args))
    assert "'task_diff' needs the score rr, which modules of the vision tower lack" in capsys.readouterr().err
    lora_command.main(lora_command.Args(**args, placement="all"))
    assert "Tower-all" in capsys.readouterr().out
    adapter = tmp_path / "run/cells/perception/tower/seed-0/adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["use_dora"] and all(".visual.blocks." in name for name in config["target_modules"])
    lora = load_peft(mini[0], adapter)
    assert lora.magnitude is not None and float(lora.scale) == pytest.approx(16 / np.sqrt(2))
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    trained = sum(leaf.size for leaf in jax.tree.leaves((lora.weights, lora.magnitude)))
    assert rows[1]["parameters"]["perception"] == trained
