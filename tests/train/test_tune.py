"""Fine-tuning parts of a model: what moves, what does not, and the command."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from gradients import value_and_grad
from run_folders import check_run_folder

import vlm_jax
from train import tune
from train.objective import model_loss
from train.subsets import ByPart, split
from train.tune import Args, check_parts
from vlm_jax import UserError
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.data import load_task
from vlm_jax.prompts import Fitted, encode, positions


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's run folder."""
    out = tmp_path_factory.mktemp("tune") / "run"
    args = Args(train="mini-okvqa", limit=8, eval_limit=4, epochs=2, batch=4, lr=1e-3, save_every=2, out=out)
    tune.main(args)
    return args


def test_gradients_are_those_of_the_whole_model(mini):
    model, processor = mini
    batch = encode(load_task("mini-docvqa", split="train", limit=2), processor, model.config)
    index, valid = positions(batch.spans["answer"] | batch.spans["end"])
    target = np.take_along_axis(np.asarray(batch.inputs.input_ids), index, 1)

    def plain(model):
        logp = jax.nn.log_softmax(model(batch.inputs).logits)
        rows = np.arange(len(index))[:, None]
        return -(logp[rows, index - 1, target] * valid).sum() / valid.sum()

    wanted = named_leaves(jax.jit(jax.grad(plain))(model))
    trained, rest = split(model, ByPart(("text",)))
    batch = Fitted(batch.inputs.turned(), index, valid)
    _, found = jax.jit(value_and_grad(model_loss))(trained, rest, batch, jax.random.key(0))
    scale = float(optax.tree.norm(found))
    assert found.keys() == trained.keys() and scale > 1e-3
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, wanted[name], atol=1e-5 * scale, err_msg=name)


def test_only_the_named_part_moves(mini, run):
    before, after = named_leaves(mini[0]), named_leaves(vlm_jax.load(run.out / "model")[0])
    assert before.keys() == after.keys()
    moved = {name.partition(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"text"}


def test_the_run_folder(run, tmp_path, capsys):
    scores = [json.loads((run.out / name / "score.json").read_text()) for name in ("before", "after")]
    assert all(score["samples"] == 4 for score in scores)
    check_run_folder(run.out, tmp_path)
    assert not (run.out / "training/checkpoints").exists()
    assert (run.out / "training/metrics.jsonl").read_text().count("\n") == 1
    before = (run.out / "model/model.safetensors").read_bytes()
    tune.main(run)  # nothing is left to do
    assert (run.out / "model/model.safetensors").read_bytes() == before
    assert "mini-okvqa after" in capsys.readouterr().out


def test_a_stopped_training_goes_on_to_the_same_model(mini, run, tmp_path):
    """The first half of it, in a folder that the whole then finds."""
    examples = load_task("mini-okvqa", split="train", limit=8)

    class Stopped(Exception):
        pass

    real, calls = tune.fitted, []

    def stopping(*args, **how):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return real(*args, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(tune, "fitted", stopping)
        tune.tune(*mini, examples, run, tmp_path)
    resumed = named_leaves(tune.tune(*mini, examples, run, tmp_path))
    whole = named_leaves(vlm_jax.load(run.out / "model")[0])
    for name, leaf in whole.items():
        np.testing.assert_array_equal(resumed[name], leaf, err_msg=name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": "mini-okvq"}, "mini-okvqa"),
        ({"parts": ()}, "--parts"),
        ({"label_lr": {"visual": 1e-4}}, "--label-lr names 'visual': use a label of this training (text)"),
        ({"label_decay": {"text": -1.0}}, "--label-decay is -1.0: give at least 0 and at most 100"),
        ({"epochs": 0}, "--epochs"),
        ({"batch": 0}, "--batch"),
        ({"metric": "exact"}, "exact_match"),
        ({"model": "mini-llava-text", "parts": ("visual",)}, "no part 'visual'"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(changed, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune.main(dataclasses.replace(Args(limit=4, eval_limit=4, out=tmp_path / "run"), **changed))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_part_that_is_none():
    with pytest.raises(UserError, match="no part 'audio'"):
        check_parts(vlm_jax.load("mini-qwen3-vl")[0], Args(parts=("audio",)))
