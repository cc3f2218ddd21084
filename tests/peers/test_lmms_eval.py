"""Our model inside lmms-eval, found through the installed package's entry point, on tasks of a local folder."""

import dataclasses
import json
import os
import subprocess
import tomllib

import datasets
import numpy as np
import pytest
from environments import ROOT, environment, install_library, run

import vlm_jax
from eval.evaluation import answer
from interventions import Gate, save_interventions
from interventions.engine.read import Gold
from vlm_jax.data import load_task
from vlm_jax.prompts import PLAIN_PROMPT, encode

pytestmark = pytest.mark.peers

WRONG = "harbor forest"
#: The functions that the tasks name.
UTILS = f"""
def visual(doc):
    return [doc["image"].convert("RGB")]

def scored(doc, results):
    return {{"exact_match": float(results[0] == doc["answer"])}}

def choices(doc):
    return [doc["answer"], "{WRONG}"][:: -1 if doc["right"] else 1]
"""
TASK = """
dataset_path: {folder}/data
dataset_kwargs:
  load_from_disk: true
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
WRITTEN = """
task: written
output_type: generate_until
doc_to_target: answer
process_results: !function utils.scored
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  do_sample: false
"""
CHOSEN = """
task: chosen
output_type: multiple_choice
doc_to_choice: !function utils.choices
doc_to_target: right
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with lmms-eval and this library. lmms-eval imports a part of filelock that newer
    versions do not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = ("lmms-eval==0.7.3", "torch==2.13.0", "filelock<4", *project["dependencies"])
    folder = tmp_path_factory.mktemp("lmms_eval")
    python = environment(folder / "environment", *packages)
    install_library(python, folder / "source")
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        # Its build does not fit this torch. No task here needs it, but packages import it if it is installed.
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")
    return python


@pytest.fixture(scope="module")
def examples():
    return load_task("mini-docvqa", split="test", limit=6) + load_task("mini-aokvqa", split="test", limit=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, examples):
    """The folder of both tasks. The right choice stands first and second in turn."""
    folder = tmp_path_factory.mktemp("tasks")
    columns = {
        "question": [example.question for example in examples],
        "answer": [example.answers[0] for example in examples],
        "image": [example.images[0] for example in examples],
        "right": [number % 2 for number in range(len(examples))],
    }
    values = {
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "right": datasets.Value("int64"),
    }
    features = datasets.Features({**values, "image": datasets.Image()})
    test = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"test": test}).save_to_disk(str(folder / "data"))
    (folder / "utils.py").write_text(UTILS)
    (folder / "written.yaml").write_text(WRITTEN + TASK.format(folder=folder, metric="exact_match"))
    (folder / "chosen.yaml").write_text(CHOSEN + TASK.format(folder=folder, metric="acc"))
    return folder


def evaluated(python, tasks, out, **options) -> tuple[dict, dict[str, list[dict]]]:
    """What lmms-eval's command writes: its results, and the lines of each task's samples."""
    model = ",".join(f"{name}={value}" for name, value in {"pretrained": "mini-qwen3-vl", **options}.items())
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    run(
        *(python, "-m", "lmms_eval", "--model", "vlm_jax", "--model_args", model, "--tasks", "written,chosen"),
        *("--include_path", tasks, "--batch_size", "4", "--output_path", out, "--log_samples"),
        env=environ,
        cwd=tasks,
    )
    (results,) = out.rglob("*_results.json")
    lines = {}
    for task in ("written", "chosen"):
        (samples,) = out.rglob(f"*_samples_{task}.jsonl")
        records = map(json.loads, samples.read_text().splitlines())
        lines[task] = sorted(records, key=lambda record: record["doc_id"])
    return json.loads(results.read_text()), lines


@pytest.fixture(scope="module")
def plain(python, tasks, tmp_path_factory):
    return evaluated(python, tasks, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


def test_written_answers_are_ours(plain, mini, examples):
    """Text by text, and the accuracy that lmms-eval makes of them."""
    results, lines = plain
    ours = answer(*mini, examples, batch=4, max_new_tokens=6, prompt=PLAIN_PROMPT).texts
    assert [record["filtered_resps"] for record in lines["written"]] == ours
    right = np.mean([text == example.answers[0] for text, example in zip(ours, examples, strict=True)])
    assert results["results"]["written"]["exact_match,none"] == pytest.approx(right)
    assert 0 < right < 1


def test_the_likelier_choice_is_chosen(plain, mini, examples):
    """By the mean log-probability per token of the whole model's logits."""
    results, lines = plain
    loss = np.empty((len(examples), 2))
    for column, wrong in enumerate((False, True)):
        said = [dataclasses.replace(e, answers=(WRONG,)) if wrong else e for e in examples]
        batch = encode(said, mini[1], mini[0].config, prompt=PLAIN_PROMPT)
        read = Gold.of(batch.inputs, batch.spans["answer"])
        hidden = mini[0](batch.inputs, (), ["text.norm"]).taps["text.norm"]
        loss[:, column] = -np.asarray(read(mini[0], hidden, 0).log_probability)
    assert results["results"]["chosen"]["acc,none"] == pytest.approx((loss[:, 0] < loss[:, 1]).mean())
    assert (loss[:, 0] < loss[:, 1]).mean() > 0.5
    for number, record in enumerate(lines["chosen"]):
        found = [float(pair[0]) for pair in record["filtered_resps"]]
        np.testing.assert_allclose(found, loss[number, :: -1 if number % 2 else 1], rtol=1e-3, atol=1e-4)


def test_an_intervention_acts(python, tasks, plain, mini, examples, tmp_path):
    cut = (Gate.cut(8, [1]),)
    save_interventions(tmp_path / "cut.safetensors", cut)
    _, lines = evaluated(python, tasks, tmp_path / "out", intervention=tmp_path / "cut.safetensors")
    ours = answer(*mini, examples, cut, batch=4, max_new_tokens=6, prompt=PLAIN_PROMPT).texts
    found = [record["filtered_resps"] for record in lines["written"]]
    assert found == ours != [record["filtered_resps"] for record in plain[1]["written"]]
