"""Training: what moves and what does not, how deep gradients reach, accumulation, resuming, and the command."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL
import pytest
from gradients import value_and_grad
from run_folders import check_run_folder

import train.lora as lora_command
from interventions.modules import folder_name
from interventions.placement.adapters import init_lora, lowest_layer
from train import trunk
from train.adapter import adapter_label
from train.loop import LoopOptions, fit
from train.subsets import split
from vlm_jax import UserError, load
from vlm_jax.data import load_task
from vlm_jax.prompts import encode


@pytest.fixture(scope="module")
def mini():
    return load("mini-qwen3-vl")


def args(**changed) -> lora_command.Args:
    return lora_command.Args(**{"r": 4, "epochs": 1, "dropout": 0.0, **changed})


def problem(mini, names, **changed):
    """What the loss of a small LoRA training takes: the model with its adapter, and one batch."""
    model, processor = mini
    options = args(**changed)
    lora = init_lora(model, names, r=options.r, alpha=options.alpha, dropout=options.dropout, key=jax.random.key(1))
    lowest = lowest_layer(lora)
    data = trunk.trunk(
        model, encode(load_task("perception", split="train", limit=8), processor, model.config), lowest, size=8
    )
    return trunk.Adapted(model, lora, lowest), data


def louder(params: trunk.Adapted, by: float) -> trunk.Adapted:
    """With larger adapter weights: B is not zero any more."""
    weights = jax.tree.map(lambda w: w + by, params.lora.weights)
    return params.replace(lora=params.lora.replace(weights=weights))


def test_only_the_adapter_moves(mini):
    model, processor = mini
    before = jax.tree.map(np.array, model)
    examples = load_task("knowledge", split="train", limit=8)
    lora = trunk.train_lora(
        model, ["L5-attn", "L7-mlp"], encode(examples, processor, model.config), args(epochs=3), "test"
    )
    chex.assert_trees_all_equal(jax.tree.map(np.array, model), before)
    assert set(lora.weights) == {
        *(f"text.self_attn.{name}_proj" for name in "qkvo"),
        *(f"text.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    for site, (a, b) in lora.weights.items():
        assert len(a) == 1 and np.abs(b).max() > 0, f"{site} did not learn"


def poisoned(model, below: int):
    """The model with kernels of no number in the layers below ``below``."""

    def spoil(a):
        return a.at[:below].set(jnp.nan)

    changed = jax.tree.map(lambda a: a, model)
    changed.text.layers = jax.tree.map(spoil, model.text.layers)
    return changed


def test_gradients_reach_no_lower_than_the_lowest_adapter(mini):
    """What lies lower is not even read, forwards or backwards: no number in it changes nothing."""
    params, data = problem(mini, ["L5-mlp"])
    params = louder(params, 0.01)

    program = jax.jit(value_and_grad(trunk.adapter_loss))

    def run(model):
        return program(*split(params.replace(model=model), adapter_label), data, jax.random.key(0))

    expected = run(params.model)
    chex.assert_trees_all_equal(run(poisoned(params.model, 5)), expected)
    assert np.isnan(run(poisoned(params.model, 6))[0])


def test_trunk_gives_the_same_loss_from_any_layer(mini):
    """The residual that was computed once is the one that the whole model computes."""
    params, data = problem(mini, ["L6-attn"])
    _, whole = problem(mini, ["L0-attn"])
    key = jax.random.key(0)
    np.testing.assert_allclose(
        trunk.adapter_loss(params, data, key), trunk.adapter_loss(params.replace(lowest=0), whole, key), rtol=1e-6
    )


def test_dropout_needs_its_key_and_changes_the_loss(mini):
    params, data = problem(mini, ["L6-mlp"], dropout=0.5)
    losses = [float(trunk.adapter_loss(louder(params, 0.1), data, jax.random.key(i))) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def quadratic(w, batch, key):
    return jnp.mean((batch @ w - 2) ** 2) + 0 * jax.random.uniform(key)


def batches(step):
    return np.random.default_rng(step).normal(size=(2, 4, 3)).astype(np.float32)


def run(folder=None, steps=6, save_every=0, tx=None):
    return fit(
        quadratic, jnp.ones(3), batches, {"train": tx or ADAM}, steps=steps, folder=folder,
        options=LoopOptions(save_every=save_every) if save_every else None, log_every=1,
    ).params  # fmt: skip


ADAM = optax.adam(0.1)


def test_accumulation_averages_the_micro_batches():
    def whole(step):
        return batches(step).reshape(1, 8, 3)

    sgd = optax.sgd(0.1)
    expected = fit(quadratic, jnp.ones(3), whole, {"train": sgd}, steps=6).params
    np.testing.assert_allclose(run(tx=sgd), expected, rtol=1e-6)


def test_resumed_training_is_bit_equal(tmp_path):
    run(tmp_path, steps=3, save_every=3)
    resumed = run(tmp_path, steps=6, save_every=3)
    np.testing.assert_array_equal(resumed, run())
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(UserError, match="is nan at step"):
        fit(lambda w, *_: jnp.sum(w) * jnp.nan, jnp.ones(2), batches, {"train": ADAM}, steps=2, log_every=1)


def test_the_command_traces_places_trains_and_evaluates(tmp_path):
    """P0 from the command line to the table, small."""
    out = tmp_path / "run"
    lora_command.main(args(train="16", eval="8", trace="8", baselines=False, placement="task_diff", k=1, out=out))
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["condition"] for row in rows] == ["Baseline", "Top-1-task-diff"]
    placed = rows[1]["placement"][0]
    assert set(placed) == {"knowledge", "perception"} and all(len(names) == 1 for names in placed.values())
    assert all(0 <= row[family][0]["accuracy"] <= 1 for row in rows for family in placed)
    steps = [json.loads(line) for line in next(out.rglob("metrics.jsonl")).read_text().splitlines()]
    assert steps[-1]["step"] == 2 and steps[-1]["loss"] > 0


@pytest.mark.slow
def test_the_command_resumes_and_keeps_its_scores(tmp_path, capsys):
    """A run that lost its last stage redoes that stage alone and comes to the same table."""
    options = args(train="24", eval="12", trace="12", random_seeds=(42,), out=tmp_path / "run", placement="task_diff")
    lora_command.main(options)
    first = capsys.readouterr().out
    out = tmp_path / "run"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["family"] == "qwen3_vl" and manifest["versions"]["pillow"] == PIL.__version__
    assert manifest["image_processor"] == "Qwen2VLImageProcessorPil"
    results = json.loads((out / "results.json").read_text())
    assert [row["condition"] for row in results["rows"]] == ["Baseline", "LLM-all", "Random-2", "Top-2-task-diff"]
    folders = {}
    for row in results["rows"][1:]:
        for family in ("knowledge", "perception"):
            folder = out / f"cells/{family}/{folder_name(row['placement'][0][family], 8)}/seed-0"
            folders[row["condition"], family] = folder
            targets = json.loads((folder / "adapter/adapter_config.json").read_text())
            layers = {f"L{t.split('.')[3]}-{'attn' if 'self_attn' in t else 'mlp'}" for t in targets["target_modules"]}
            assert layers == set(row["placement"][0][family])
    kept = (folders["LLM-all", "knowledge"] / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    (out / "results.json").unlink()
    shutil.rmtree(folders["Top-2-task-diff", "perception"])
    lora_command.main(options)
    assert (folders["LLM-all", "knowledge"] / "adapter/adapter_model.safetensors").stat().st_mtime_ns == kept
    assert json.loads((out / "results.json").read_text()) == results
    table = first[first.index("| LoRA target") : first.rindex("|")]
    assert table in capsys.readouterr().out
    check_run_folder(out, tmp_path / "redrawn")


def test_table1_averages_seeds_but_not_their_sampling_error():
    def scores(*values):
        return [{"accuracy": value, "low": value - 0.04, "high": value + 0.05} for value in values]

    rows = [
        {"condition": "Baseline", "parameters": None, "knowledge": scores(0.4), "perception": scores(0.5)},
        {
            "condition": "Random-2",
            "parameters": {"knowledge": 1000, "perception": 2000},
            "knowledge": scores(0.5, 0.7),
            "perception": scores(0.6, 0.6),
        },
    ]
    lines = lora_command.table1(rows, ["knowledge", "perception"]).splitlines()
    assert lines[2] == "| Baseline | 0.400 [0.360, 0.450] | 0.500 [0.460, 0.550] | - |"
    assert lines[3] == "| Random-2 | 0.600 [0.560, 0.650] | 0.600 [0.560, 0.650] | 1,000 / 2,000 |"
