"""Pre-training, cut short: what its stages leave behind."""

import json
import shutil

import numpy as np
import pytest
from run_folders import check_run_folder

import vlm_jax
from train import pretrain
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.data import Example
from vlm_jax.prompts import PLAIN_PROMPT, encode

pytestmark = pytest.mark.slow  # both stages compile programs of their own


def run(out, **changed):
    options = {"stages": ("text", "align"), "steps": (1, 1, 0), "turns": (8, 8, 0), "batch": 2}
    pretrain.main(pretrain.Args(out=out, **options | changed))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "run"
    run(out)
    return out


def test_the_text_stage_leaves_a_text_only_model(out):
    """The same decoder, and files of which none is about images: prompts come out alike."""
    (whole, processor), (backbone, tokenizer) = (vlm_jax.load(out / name) for name in ("text", "backbone"))
    assert whole.config.family == "qwen3_vl" and backbone.config.family == "qwen3"
    leaves = named_leaves(whole)
    for name, leaf in named_leaves(backbone).items():
        np.testing.assert_array_equal(leaf, leaves[name])
    assert not (out / "backbone" / "preprocessor_config.json").exists()
    examples = [Example("a", (), "What is it?", ("red",))]
    want, got = (
        encode(examples, p, m.config, prompt=PLAIN_PROMPT) for m, p in ((whole, processor), (backbone, tokenizer))
    )
    np.testing.assert_array_equal(got.inputs.input_ids, want.inputs.input_ids)


def test_stages_are_listed_as_models_with_their_logs(out, tmp_path):
    check_run_folder(out, tmp_path)
    entries = json.loads((out / "artifacts.json").read_text())["artifacts"]
    models = {entry["file"] for entry in entries if entry["type"] == "model"}
    assert models == {"untrained", "text", "backbone", "align"}
    logs = {entry["file"] for entry in entries if entry["type"] == "training"}
    assert logs == {"text/metrics.jsonl", "align/metrics.jsonl"} and len(entries) == 6


def test_every_stage_keeps_its_own_metrics(out):
    steps = {
        stage: [json.loads(line)["step"] for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        for stage in ("text", "align")
    }
    assert steps == {"text": [1], "align": [1]}


def test_without_a_number_of_turns_every_step_reads_new_ones(out, monkeypatch):
    """All turns of a window once, a step's by itself whenever it is asked for, and easy ones first."""
    model, processor = vlm_jax.load(out / "untrained")
    args = pretrain.Args(out=out, steps=(1, 32, 1), turns=None, batch=4)
    asked: list[int] = []
    real = pretrain.turn_of

    def watched(stage, index, count, spatial):
        assert (stage, count) == ("align", 32 * 4)
        asked.append(index)
        return real(stage, index, count, spatial)

    monkeypatch.setattr(pretrain, "turn_of", watched)
    batches = pretrain.Batches(args, 1, processor, model.config)
    steps = [batches(step) for step in range(32)]
    assert sorted(asked) == list(range(32 * 4))
    again = pretrain.Batches(args, 1, processor, model.config)(20)
    np.testing.assert_array_equal(again.inputs.input_ids, steps[20].inputs.input_ids)
    pixels = {step.inputs.images.pixel_values[0, row].tobytes() for step in steps for row in range(4)}
    assert len(pixels) == 32 * 4


def test_another_model_to_start_from_is_refused(out, tmp_path, capsys):
    """Even if it has the same name."""
    start = shutil.copytree(out / "align", tmp_path / "start")
    run(tmp_path / "run", stages=(), decoder=str(start))
    shutil.copy(out / "text/model.safetensors", start)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", stages=(), decoder=str(start))
    assert "was begun with another untrained" in capsys.readouterr().err


def test_another_run_is_refused(out, capsys):
    """Before anything is changed; which stages to run, and how often to save, makes no other run."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(SystemExit):
        run(out, batch=4, seed=1)
    error = capsys.readouterr().err
    assert "holds another run (batch 2 there, 4 here, seed 0 there, 1 here): choose another --out" in error
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    run(out, stages=(), save_every=7)
    assert json.loads((out / "config.json").read_text())["batch"] == 2
