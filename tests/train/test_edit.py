"""The command that trains editors: what it writes, and that every other command runs the same edited model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from run_folders import check_run_folder

import vlm_jax
from eval import accuracy
from interventions import Gold, bind, load_interventions
from interventions.flow.knockout import knocked_out_answers, window_effects
from interventions.flow.shares import read_examples, text_attention
from interventions.talo.tables import tabulate
from interventions.trace.__main__ import Args as TraceArgs
from interventions.trace.__main__ import main as trace_main
from interventions.trace.options import TraceOptions
from interventions.trace.tracing import trace_examples
from train import edit
from train import editors as editors_module
from train.edit import Args
from train.editors import train_editors
from vlm_jax.data import load_task
from vlm_jax.prompts import encode

TASKS = ("mini-okvqa", "mini-vsr")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's arguments, and its run folder."""
    out = tmp_path_factory.mktemp("edit") / "run"
    args = Args(train=TASKS, limit=16, eval_limit=6, epochs=2, batch=4, accumulation=2, lr=0.02, save_every=1, out=out)
    edit.main(args)
    return args


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def editors(run):
    return load_interventions(run.out / "editors.safetensors")


def test_the_run_folder(run, tmp_path, capsys):
    results = json.loads((run.out / "results.json").read_text())
    assert results["trained"] == dict.fromkeys(TASKS, 8) and results["kind"] == "LoReFT"
    assert results["parameters"] == {"visual": 2 * 1158, "cross": 1542, "prefix": 4 * 1028, "suffix": 4 * 1028}
    for task in TASKS:
        for when in ("before", "after"):
            score = json.loads((run.out / when / task / "score.json").read_text())
            assert score["samples"] == 6 and results["tasks"][task][when]["mean"] == score["accuracy"]
    check_run_folder(run.out, tmp_path)
    assert not (run.out / "training/checkpoints").exists()
    logged = [json.loads(line) for line in (run.out / "training/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [4]  # 16 examples, 2 epochs, 8 examples in a step
    before = (run.out / "editors.safetensors").read_bytes()
    edit.main(run)  # nothing is left to do
    assert (run.out / "editors.safetensors").read_bytes() == before
    assert "mini-vsr" in capsys.readouterr().out


def test_training_moves_every_editor(run, mini, editors):
    begun = run.init(mini[0], jax.random.key(run.seed))
    assert len(editors) == len(begun)
    for editor, new in zip(editors, (begun[name] for name in sorted(begun)), strict=True):
        moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (editor.weights, new.weights)), strict=True)]
        assert min(moved) > 0 and editor.group == new.group


def test_accuracy_gives_the_same_numbers(run, tmp_path):
    """And the same answers, by way of the file."""
    for task in TASKS:
        out = tmp_path / task
        accuracy.main(accuracy.Args(task=task, limit=6, intervention=(run.out / "editors.safetensors",), out=out))
        for name in ("samples.jsonl", "predictions.jsonl"):
            assert (out / name).read_text() == (run.out / "after" / task / name).read_text()
    changed = [(run.out / when / "mini-okvqa/predictions.jsonl").read_text() for when in ("before", "after")]
    assert changed[0] != changed[1]  # the control: the editors do something


def test_a_stopped_training_goes_on_to_the_same_editors(run, mini, editors, tmp_path):
    """Bit for bit; the first half of it lies in a folder that the whole then finds."""
    model, processor = mini
    examples = [e for part in run.mixture(run).values() for e in part]
    begun = run.init(model, jax.random.key(run.seed))

    class Stopped(Exception):
        pass

    real, calls = editors_module.fitted, []

    def stopping(*args, **how):
        calls.append(1)
        if len(calls) == 6:
            raise Stopped
        return real(*args, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(editors_module, "fitted", stopping)
        train_editors(model, processor, begun, examples, run, seed=run.seed, folder=tmp_path)
    resumed = train_editors(model, processor, begun, examples, run, seed=run.seed, folder=tmp_path)
    for editor, whole in zip(resumed.values(), editors, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (editor.weights, whole.weights)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def examples():
    return load_task("mini-docvqa", split="trace", limit=4)


def probability(model, batch, acting):
    """p(gold) of every row, from all logits."""
    logp = np.asarray(jax.nn.log_softmax(model(batch.inputs, acting).logits))
    gold = batch.spans["answer"]
    ids = np.asarray(batch.inputs.input_ids)
    return np.array(
        [np.exp(np.mean([logp[row, t - 1, ids[row, t]] for t in np.flatnonzero(gold[row])])) for row in range(len(ids))]
    )


def test_traces_run_the_edited_model(mini, editors, examples):
    traced = trace_examples(*mini, examples, TraceOptions(batch=4), "edited", interventions=editors)
    batch = encode(examples, mini[1], mini[0].config)
    np.testing.assert_allclose(traced.p_clean, probability(mini[0], batch, bind(editors, batch)), rtol=1e-4)
    plain = trace_examples(*mini, examples, TraceOptions(batch=4), "plain")
    assert np.abs(traced.p_clean - plain.p_clean).max() > 1e-3 and np.abs(traced.ie - plain.ie).max() > 1e-3


@pytest.mark.slow
def test_flow_runs_the_edited_model(mini, editors, examples):
    model, processor = mini
    batch = encode(examples, processor, model.config)
    effect = window_effects(model, processor, examples, ["text:image"], 3, size=4, interventions=editors)
    np.testing.assert_allclose(effect.base, probability(model, batch, bind(editors, batch)), rtol=1e-4)
    prompts = encode(examples, processor, model.config, with_answer=False)
    read = read_examples(model, processor, examples, 4, interventions=editors)
    np.testing.assert_allclose(read.mass, text_attention(model, prompts, bind(editors, prompts)).mass, atol=1e-5)
    assert np.abs(read.mass - text_attention(model, prompts).mass).max() > 1e-3
    options = {"modes": ["pre_softmax"], "size": 4, "max_new_tokens": 4, "interventions": editors}
    records = knocked_out_answers(model, processor, examples, ["text:image"], **options)
    tokens = vlm_jax.generate(model, prompts.inputs, 4, bind(editors, prompts))
    wanted = [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in np.asarray(tokens)]
    assert [record["output"] for record in records if record["edge"] is None] == wanted


@pytest.mark.slow
def test_talo_runs_the_edited_model(mini, editors, examples):
    base, correct = tabulate(*mini, examples, batch=4, interventions=editors)
    batch = encode(examples, mini[1], mini[0].config)
    gold = Gold.of(batch.inputs, batch.spans["answer"] | batch.spans["end"]).replace(first=0)
    x, _ = mini[0].hidden(batch.inputs, bind(editors, batch))
    np.testing.assert_array_equal(base, np.asarray(gold(mini[0], mini[0].text.norm(x), 0).correct))
    assert correct.shape == (8, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 129}, "the rank of the prefix editor is 129"),
        ({"kind": "MoReS", "tied": True}, "--kind MoReS has an editor of its own"),
        ({"model": "mini-llava-text"}, "the model has no vision tower"),
        ({"train": ("mini-docvq",)}, "did you mean 'mini-docvqa'"),
        ({"editors": ("sufix",)}, "did you mean 'suffix'"),
        ({"shares": (1.0, 2.0)}, "--shares is 1.0 2.0"),
        ({"label_lr": {"psi_X": 1e-4}}, "--label-lr names 'psi_X': use a label of this training"),
        ({"epochs": 0}, "--epochs"),
        ({"clip": 0.0}, "--clip is 0.0"),
        ({"lr": -1e-3}, "--lr is -0.001"),
        ({"suffix": "published", "tied": True}, "--suffix published needs the editor suffix"),
        ({"warmup": 1.0}, "--warmup"),
        ({"eval": ("mini-vsr", "mini-vsr")}, "each (and each file name) once"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(changed, message, tmp_path, capsys):
    args = Args(train=("mini-okvqa",), limit=4, eval_limit=4, out=tmp_path / "run")
    with pytest.raises(SystemExit):
        edit.main(dataclasses.replace(args, **changed))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_editors_of_another_model_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        args = accuracy.Args(intervention=(run.out / "editors.safetensors",), model="mini-llava", limit=2)
        accuracy.main(dataclasses.replace(args, out=tmp_path / "run"))
    error = capsys.readouterr().err
    assert "was trained with another model (fingerprint" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_pictures_are_not_corrupted_under_editors_of_the_tower(run, tmp_path, capsys):
    args = TraceArgs(intervention=(run.out / "editors.safetensors",), corruption="image_noise", limit=2)
    with pytest.raises(SystemExit):
        trace_main(dataclasses.replace(args, out=tmp_path / "run"))
    error = capsys.readouterr().err
    assert "--corruption image_noise changes the picture" in error and error.count("\n") == 1
