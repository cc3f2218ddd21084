"""Registering: what is trained, and that every command runs the model with its registers."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from run_folders import check_run_folder

import vlm_jax
from eval import accuracy
from interventions.flow.shares import read_examples
from interventions.kinds.groups import GROUPS
from interventions.trace.options import TraceOptions
from interventions.trace.tracing import trace_examples
from train import register, registering
from train import tune as tune_module
from train.register import Args
from train.registering import PRESETS, train_registers, trained_parameters
from vlm_jax import UserError
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.data import load_task

TASKS = ("mini-okvqa", "mini-caption")
SMALL = {"limit": 16, "eval_limit": 4, "epochs": 2, "batch": 4, "lr": 1e-3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's arguments, and its run folder."""
    out = tmp_path_factory.mktemp("register") / "run"
    args = Args(registers=4, train=TASKS, eval=("mini-okvqa",), save_every=1, out=out, **SMALL)
    register.main(args)
    return args


@pytest.fixture(scope="module")
def tuned(run):
    return vlm_jax.load(run.out / "model")


def test_the_run_folder(run, tmp_path, capsys):
    results = json.loads((run.out / "results.json").read_text())
    assert results["trained"] == dict.fromkeys(TASKS, 8) and results["registers"]["count"] == 4
    found = results["tasks"]["mini-okvqa"]
    for when in ("before", "untuned", "after"):
        score = json.loads((run.out / when / "mini-okvqa/score.json").read_text())
        assert score["samples"] == 4 and found[when]["mean"] == score["accuracy"]
    check_run_folder(run.out, tmp_path)
    assert not (run.out / "training/checkpoints").exists()
    weights = (run.out / "model/model.safetensors").read_bytes()
    register.main(run)  # nothing is left to do
    assert (run.out / "model/model.safetensors").read_bytes() == weights
    assert "4 registers, mask register" in capsys.readouterr().out


def test_only_the_decoder_moves(run, tuned):
    before, after = (named_leaves(model) for model in (run.load()[0], tuned[0]))
    assert before.keys() == after.keys()
    moved = {name.partition(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"text"}
    assert results_of(run)["parameters"] == sum(leaf.size for name, leaf in before.items() if name.startswith("text"))


def results_of(run) -> dict:
    return json.loads((run.out / "results.json").read_text())


@pytest.mark.parametrize("trainable", ["lora", "registers"])
def test_other_trained_parts(run, trainable):
    args = dataclasses.replace(run, trainable=trainable, r=2 if trainable == "lora" else None)
    model, processor = args.load()
    examples = load_task("mini-okvqa", split="train", limit=8)
    trained = train_registers(model, processor, examples, args)
    before, after = named_leaves(model), named_leaves(trained)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    if trainable == "registers":
        assert moved == {"text.register_embeddings.weight"}
        assert trained_parameters(model, args) == before["text.register_embeddings.weight"].size == 4 * 128
    else:
        assert len(moved) == 7 and all(name.startswith("text.layers.") and name.endswith("kernel") for name in moved)
        widths = [sum(before[name].shape[1:]) for name in moved]
        assert trained_parameters(model, args) == 8 * 2 * sum(widths)


def test_every_command_uses_the_registers(run, tuned, tmp_path):
    """Without further flags: the same answers as in training's own evaluation, and traces and attention with them."""
    out = tmp_path / "accuracy"
    accuracy.main(accuracy.Args(model=str(run.out / "model"), task="mini-okvqa", limit=4, out=out))
    for name in ("samples.jsonl", "predictions.jsonl"):
        assert (out / name).read_text() == (run.out / "after/mini-okvqa" / name).read_text()
    examples = load_task("mini-okvqa", split="trace", limit=4)
    reading = read_examples(*tuned, examples)
    assert (reading.tokens[:, GROUPS.index("register")] == 4).all()
    assert (reading.mass[..., GROUPS.index("image")] == 0).all()
    masked = trace_examples(*tuned, examples, TraceOptions(batch=4), "masked")
    plain = trace_examples(tuned[0].with_registers(None), tuned[1], examples, TraceOptions(batch=4), "plain")
    assert np.abs(masked.p_clean - plain.p_clean).max() > 1e-4


def test_a_stopped_training_goes_on_to_the_same_model(run, tuned, tmp_path):
    """Bit for bit; the first half of it lies in a folder that the whole then finds."""
    model, processor = run.load()
    examples = [e for part in run.mixture(run).values() for e in part]

    class Stopped(Exception):
        pass

    real, calls = tune_module.fitted, []

    def stopping(*args, **how):
        calls.append(1)
        if len(calls) == 6:
            raise Stopped
        return real(*args, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(tune_module, "fitted", stopping)
        train_registers(model, processor, examples, run, tmp_path)
    resumed = train_registers(model, processor, examples, run, tmp_path)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(tuned[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_papers_preset():
    """P1, table 3."""
    args = Args(preset="paper", registers=16)
    found = [args.value(name) for name in ("batch", "epochs", "lr", "seed")]
    assert found == [32, 10, 2e-7, 42] and PRESETS["paper"].pixels == (784, 50_176)
    _, processor = args.load()
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 50_176)
    assert dataclasses.replace(args, lr=1e-3).value("lr") == 1e-3
    dataclasses.replace(args, model="mini-gemma3").load()  # images of one size: its processor stays as it is


@pytest.mark.parametrize("trainable", ["decoder", "lora"])
def test_the_optimisers_flags_reach_the_training(monkeypatch, trainable):
    """Those that are given; the others keep the training's own defaults."""
    seen = []
    monkeypatch.setattr(registering.tune, "tune", lambda model, processor, examples, args, folder: seen.append(args))
    monkeypatch.setattr(
        registering, "train_editors", lambda m, p, editors, examples, args, **how: seen.append(args) or editors
    )
    args = Args(registers=2, trainable=trainable)
    model, processor = args.load()
    given = {"warmup": 0.2} | ({} if trainable == "lora" else {"decay": 0.3, "betas": (0.8, 0.95)})
    for options in (args, dataclasses.replace(args, **given)):
        registering.train_registers(model, processor, [], options)
    plain, changed = seen
    assert plain.warmup == (0.03 if trainable == "lora" else 1 / 30)
    assert {name: getattr(changed, name) for name in given} == given
    if trainable == "decoder":
        assert (plain.decay, plain.betas) == (0.0, (0.9, 0.999))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"registers": 0}, "--registers is 0: give at least 1"),
        ({"registers": 600}, r"6\d\d tokens, 600 of them registers, but the model takes 512"),
        ({"token": "</s>"}, r"closes images with <\|vision_end\|>, which becomes the register: drop --token"),
        ({"model": "mini-llava", "token": "</ss>"}, "'</ss>', which is no token of this model"),
        ({"r": 8}, "--r and --alpha belong to --trainable lora, here it is decoder"),
        ({"trainable": "lora", "own_embeddings": True}, "belongs to --trainable decoder, here it is lora"),
        ({"trainable": "lora", "decay": 0.1}, "--decay and --betas do not belong to --trainable lora"),
        ({"trainable": "lora", "betas": (0.9, 0.95)}, "--decay and --betas do not belong to --trainable lora"),
        ({"betas": (0.9, 1.0)}, "--betas is 1.0: give at least 0 and below 1"),
        ({"attention": "splash"}, "registers that hide images"),
        ({"train": ("mini-okvq",)}, "did you mean 'mini-okvqa'"),
        ({"epochs": 0}, "--epochs is 0"),
    ],
)
def test_refused(options, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        register.main(Args(**{"registers": 4, "train": TASKS, "out": tmp_path / "out", **SMALL, **options}))
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert re.search(says, capsys.readouterr().err)


def test_a_model_with_registers_is_refused(run):
    with pytest.raises(UserError, match="has registers already"):
        dataclasses.replace(run, model=str(run.out / "model")).load()


def test_a_text_only_model_is_refused(tmp_path):
    model, processor = vlm_jax.load("mini-qwen3-vl")
    vlm_jax.save(model.backbone(), tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="text-only model"):
        Args(model=str(tmp_path)).load()
