"""Training above a frozen trunk: shared programs, work that is not done, bounded memory, stopped trainings."""

import dataclasses
import itertools
import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import value_and_grad
from matmuls import matmul_flops

from interventions.kinds.lora import LoRA
from interventions.placement.adapters import compact, init_lora, lowest_layer, pad
from interventions.placement.rules import random_k
from train import loop, meter, trunk
from train.adapter import LoRAOptions, adapter_label
from train.subsets import split
from train.trunk import train_lora
from vlm_jax import UserError, load
from vlm_jax.data import load_task
from vlm_jax.prompts import encode


@pytest.fixture(scope="module")
def mini():
    model, processor = load("mini-qwen3-vl")
    examples = load_task("knowledge", split="train", limit=8)
    return model, encode(examples, processor, model.config)


def options(**changed) -> LoRAOptions:
    return LoRAOptions(**{"r": 4, "epochs": 2, "batch": 2, "accumulation": 1, **changed})


def fresh(model, names, r=4) -> LoRA:
    lora = init_lora(model, names, r=r, alpha=16.0, dropout=0.0, key=jax.random.key(1))
    noise = lambda b: 0.1 * jax.random.normal(jax.random.key(b.shape[-1]), b.shape)  # noqa: E731
    return lora.replace(weights={site: (a, noise(b)) for site, (a, b) in lora.weights.items()})


def kernel_flops(model, tokens: int) -> int:
    """Of one pass through the linears of all layers."""
    leaves = jax.tree_util.tree_leaves_with_path(model.text.layers)
    return 2 * tokens * sum(leaf.size for path, leaf in leaves if leaf.ndim == 3)


@pytest.mark.parametrize("remat, passes", [("full", 3), ("some", 2.6), ("none", 2.1)])
def test_frozen_kernels_get_no_gradient(mini, remat, passes):
    """Forward, what is computed again, and the gradient of the layers' inputs: no fourth pass for the kernels'."""
    model, batch = mini
    lora = fresh(model, ["L0-attn", "L0-mlp"])
    params = trunk.Adapted(model, lora, 0, remat)
    data, key = trunk.trunk(model, batch, 0), jax.random.key(0)
    jaxpr = jax.make_jaxpr(value_and_grad(trunk.adapter_loss))(*split(params, adapter_label), data, key).jaxpr
    adapters = jax.make_jaxpr(trunk.adapter_loss)(params, data, key).jaxpr
    one, whole = kernel_flops(model, data.x[..., 0].size), matmul_flops(jaxpr)
    rest = matmul_flops(adapters) - one  # attention, head and adapters, at most four times in a gradient
    assert passes * one - 0.5 * one < whole < passes * one + 4 * rest
    assert 4 * rest < 2 * one, "a bound that could hide a whole pass"


@pytest.mark.slow
def test_what_is_kept_changes_no_number(mini):
    model, batch = mini
    lora = fresh(model, ["L1-attn", "L3-mlp", "L6-attn"])
    data = trunk.trunk(model, batch, 1)

    def run(remat):
        params = trunk.Adapted(model, lora.replace(dropout=0.25), 1, remat)
        return jax.jit(value_and_grad(trunk.adapter_loss))(*split(params, adapter_label), data, jax.random.key(3))

    full = run("full")
    for remat in ("some", "none"):
        chex.assert_trees_all_close(run(remat), full, rtol=1e-5, atol=1e-7)


def test_training_form_is_the_intervention(mini):
    """Layer by layer, A turned over, with dropout: the loss of the whole model under the LoRA itself."""
    model, batch = mini
    lora = fresh(model, ["L2-attn", "L5-mlp"])
    key = jax.random.key(5)
    data = trunk.trunk(model, batch, 2)
    params = trunk.Adapted(model, lora, 2)
    logits = model(batch.inputs, (lora,)).logits
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], batch.inputs.input_ids[:, 1:, None], 2)[..., 0]
    counts = (batch.spans["answer"] | batch.spans["end"])[:, 1:]
    expected = -(logp * counts).sum() / counts.sum()
    np.testing.assert_allclose(trunk.adapter_loss(params, data, key), expected, rtol=1e-5)
    scaled = params.replace(lora=lora.replace(scale=2 * lora.scale))
    assert abs(trunk.adapter_loss(scaled, data, key) - expected) > 1e-4


def test_padding_and_its_inverse(mini):
    model, _ = mini
    lora = fresh(model, ["L1-attn", "L4-mlp", "L6-attn"])
    padded = pad(lora, model, 3)
    assert len(padded.weights) == 7 and all(len(a) == len(b) == 3 for a, b in padded.weights.values())
    back = compact(padded)
    chex.assert_trees_all_equal(back.weights, lora.weights)
    chex.assert_trees_all_equal(back.slot, lora.slot)
    assert lowest_layer(padded.replace(weights=dict(padded.weights))) == lowest_layer(lora) == 1


@pytest.mark.slow
def test_padded_training_is_the_unpadded_one(mini, monkeypatch):
    """Adapters of a shared program, dropout included, against arrays of just the placement's size."""
    model, batch = mini
    names = ["L1-attn", "L6-mlp", "L6-attn"]
    padded = train_lora(model, names, batch, options(), "padded")
    monkeypatch.setattr(trunk, "pad", lambda lora, model, slots: lora)
    plain = train_lora(model, names, batch, options(), "plain")
    chex.assert_trees_all_close(padded.weights, plain.weights, atol=1e-6, rtol=1e-5)
    other = train_lora(model, names, batch, options(seed=1), "other")
    assert any(
        np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (plain.weights, other.weights)), strict=True)
    )


def programs(monkeypatch, most: int):
    """Puts in the place of ``update`` one that is traced at most ``most`` times, and never compiled or run."""
    chex.clear_trace_counter()
    bare = chex.assert_max_traces(loop.update.__wrapped__, n=most)
    jitted = jax.jit(bare, static_argnames="step", donate_argnames="state")

    def update(state, *args, **kwargs):
        jitted.trace(state, *args, **kwargs)
        return state, {"loss": 0.0, "grad_norm": 0.0}

    update.__wrapped__ = loop.update.__wrapped__
    monkeypatch.setattr(loop, "update", update)


@pytest.mark.slow
def test_placements_of_one_size_share_their_programs(mini, monkeypatch):
    model, batch = mini
    placements = [random_k(8, 3, seed) for seed in range(8)] + [["L4-mlp", "L5-attn", "L7-mlp"]]
    data = trunk.embedded_batch(model, batch)
    programs(monkeypatch, 4)
    for names in placements:
        train_lora(model, names, data, options(epochs=1), "shared")
    monkeypatch.setattr(trunk, "pad", lambda lora, model, slots: lora)
    programs(monkeypatch, 4)
    with pytest.raises(AssertionError):
        for names in placements:
            train_lora(model, names, data, options(epochs=1), "apart")


def test_each_half_of_the_adapters_has_its_own_rate(mini):
    model, _ = mini
    names, data = ["L6-mlp"], trunk.embedded_batch(*mini)
    default = train_lora(model, names, data, options(epochs=1), "default")
    lr = 2e-4 * 2560 / model.config.text.hidden_size
    same = train_lora(
        model, names, data, options(epochs=1, label_lr={"lora_b": lr}, label_decay={"lora_a": 0.0}), "same"
    )
    chex.assert_trees_all_equal(same.weights, default.weights)
    begun = init_lora(model, names, r=4, alpha=16.0, dropout=0.0, key=jax.random.key(0))
    still = train_lora(model, names, data, options(epochs=1, label_lr={"lora_a": 0.0}), "still")
    for site, (a, b) in still.weights.items():
        np.testing.assert_array_equal(a, begun.weights[site][0])
        assert np.abs(b).max() > 0 and np.abs(default.weights[site][0] - a).max() > 0
    with pytest.raises(UserError, match=r"--label-lr names 'psi_V': use a label of this training \(lora_a, lora_b\)"):
        options(label_lr={"psi_V": 1e-3}).check_loop()


@pytest.mark.slow
def test_a_trunk_that_exceeds_memory_lies_in_a_file(mini, tmp_path):
    model, batch = mini
    small = trunk.embedded_batch(model, batch, gib=1e-6, folder=tmp_path)
    whole = trunk.embedded_batch(model, batch)
    assert isinstance(small.x, np.memmap) and not isinstance(whole.x, np.memmap)
    assert not any(tmp_path.iterdir()), "the file has no name"
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, small), whole)
    names = ["L3-attn", "L6-mlp"]
    plain = train_lora(model, names, batch, options(), "memory")
    spilt = train_lora(model, names, batch, options(trunk_gib=1e-6), "file", tmp_path)
    chex.assert_trees_all_equal(spilt.weights, plain.weights)


def test_a_full_disk_is_a_users_error(mini, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trunk.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for .*No space left"):
        trunk.embedded_batch(*mini, gib=0.0, folder=tmp_path)


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_adapter(mini, tmp_path, monkeypatch):
    model, batch = mini
    names, how = ["L2-attn", "L6-mlp"], options(epochs=3, save_every=4)  # 12 steps
    whole = train_lora(model, names, batch, how, "whole", tmp_path / "whole")
    update = loop.update

    def stops_after(count):
        steps = iter(range(count))

        def stopping(*args, **kwargs):
            if next(steps, None) is None:
                raise Stopped
            return update(*args, **kwargs)

        monkeypatch.setattr(loop, "update", stopping)

    for count in (2, 6, 3):  # stops before the first checkpoint, after it, and without having reached the next one
        stops_after(count)
        with pytest.raises(Stopped):
            train_lora(model, names, batch, how, "stopped", tmp_path / "stopped")
    monkeypatch.setattr(loop, "update", update)
    resumed = train_lora(model, names, batch, how, "stopped", tmp_path / "stopped")
    chex.assert_trees_all_equal(resumed.weights, whole.weights)

    def log(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{name: line[name] for name in ("step", "loss", "grad_norm", "lr")} for line in lines]

    assert log("stopped") == log("whole") and log("whole")[-1]["step"] == 12
    again = train_lora(model, names, batch, how, "stopped", tmp_path / "stopped")  # nothing is left to do
    chex.assert_trees_all_equal(again.weights, whole.weights)


@pytest.mark.slow
def test_sigterm_saves_the_step_at_work_and_ends(mini, tmp_path, monkeypatch, capsys):
    """As often as it comes, the adapter is the uninterrupted one's, bit for bit; the old handler is back afterwards."""
    model, batch = mini
    names, how = ["L6-mlp"], options(epochs=3, save_every=100)  # 12 steps
    whole = train_lora(model, names, batch, how, "whole", tmp_path / "whole")
    update, before = loop.update, signal.getsignal(signal.SIGTERM)
    for at in (3, 5):
        steps = itertools.count(1)

        def ended(*args, steps=steps, at=at, **kwargs):
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*args, **kwargs)

        monkeypatch.setattr(loop, "update", ended)
        with pytest.raises(SystemExit) as stopped:
            train_lora(model, names, batch, how, "stopped", tmp_path / "stopped")
        assert stopped.value.code == 143
    assert "ended by SIGTERM after step 8 of 12" in capsys.readouterr().err  # 3, and 5 more: nothing was done again
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(loop, "update", update)
    resumed = train_lora(model, names, batch, how, "stopped", tmp_path / "stopped")
    chex.assert_trees_all_equal(resumed.weights, whole.weights)


def test_another_training_is_refused(mini, tmp_path):
    model, batch = mini
    train_lora(model, ["L6-mlp"], batch, options(epochs=1), "one", tmp_path)
    with pytest.raises(UserError, match=r"another training \(modules \['L6-mlp'\] there, \['L7-mlp'\] here\)"):
        train_lora(model, ["L7-mlp"], batch, options(epochs=1), "two", tmp_path)
    train_lora(model, ["L6-mlp"], batch, options(epochs=1, save_every=7, trunk_gib=2.0), "same", tmp_path)


def test_a_log_loses_what_no_checkpoint_holds(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    meter._forget_after(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_examples_that_are_encoded_in_parts_give_the_same_trunk():
    """Parts without images, with shorter prompts and with shorter answers among them."""
    model, processor = load("mini-qwen3-vl")
    examples = [*load_task("perception", split="train", limit=5), *load_task("knowledge", split="train", limit=6)]
    examples[2:5] = [dataclasses.replace(example, images=()) for example in examples[2:5]]
    whole = trunk.embedded_batch(model, encode(examples, processor, model.config))
    parts = trunk.embedded_examples(model, processor, examples, size=3)
    chex.assert_trees_all_equal_shapes_and_dtypes(parts, whole)
    chex.assert_trees_all_close(parts, whole, atol=1e-5)
    shuffled = trunk.embedded_examples(model, processor, examples[::-1], size=3)
    assert not np.allclose(shuffled.x, whole.x, atol=1e-2)
