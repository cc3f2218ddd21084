"""Damaged input files: each ends in one sentence, or in the same result as the whole file."""

import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given
from mutations import damaged_bytes, damaged_value, many
from PIL import Image
from safetensors.numpy import load_file, save_file

from interventions import Gate, digest, load_interventions, save_interventions
from interventions.figures.redraw import figures_of, redraw
from interventions.placement.rules import read_names, read_trace
from vlm_jax.data import load_task
from vlm_jax.data.folder import open_folder
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run

#: How many damaged files of each kind are tried.
COUNTS = [40, pytest.param(600, marks=pytest.mark.slow)]
RECORD = {
    "id": "a",
    "image": ["a.png"],
    "question": "What?",
    "answers": ["cat", 3],
    "choices": ["cat", "dog"],
    "family": None,
}


def one_sentence(error: UserError) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 20_000
    text.encode()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def facts(example):
    return example.id, example.question, example.answers, example.choices, example.family, len(example.images)


@pytest.mark.parametrize("count", COUNTS)
def test_lines(folder, count):
    """A changed record is another record, so whatever is read must be what JSON says, as text."""
    file = folder / "mine.jsonl"

    @many(count)
    @given(damaged_value(RECORD))
    def values(record):
        file.write_text(json.dumps(record) + "\n")
        try:
            (example,) = load_task(file)
        except UserError as error:
            one_sentence(error)
            return
        answers = record["answers"] if isinstance(record["answers"], list) else [record["answers"]]
        assert len(example.answers) == len(answers) and example.question == record["question"]
        assert all(a == b for a, b in zip(example.answers, answers, strict=True) if isinstance(b, str))
        assert all(answer.strip() and "None" not in answer for answer in example.answers)

    @many(count)
    @given(damaged_bytes(json.dumps(RECORD).encode() + b"\n"))
    def characters(content):
        file.write_bytes(content)
        try:
            examples = load_task(file)
        except UserError as error:
            one_sentence(error)
            return
        lines = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
        assert [e.question for e in examples] == [line["question"] for line in lines]

    values()
    characters()


@pytest.mark.parametrize("count", COUNTS)
def test_tasks_in_yaml(folder, count):
    whole = b"task: mine\ndataset_path: rows\ntest_split: test\nmetric_list:\n  - metric: anls\n    f: !function a.b\n"
    (folder / "rows").mkdir()

    @many(count)
    @given(damaged_bytes(whole))
    def characters(content):
        (folder / "task.yaml").write_bytes(content)
        with pytest.raises(UserError) as error:  # the folder "rows" holds no data
            open_folder(folder, "test")
        one_sentence(error.value)

    characters()


@pytest.mark.parametrize("count", COUNTS)
def test_interventions(folder, count):
    """A file carries a digest, so that no change of a number goes unseen."""
    gate = Gate({"text.attn_out": np.linspace(0, 1, 4).astype(np.float32)})
    save_interventions(folder / "whole.safetensors", [gate])
    whole, expected = (folder / "whole.safetensors").read_bytes(), digest([gate])

    @many(count)
    @given(damaged_bytes(whole))
    def characters(content):
        (folder / "file.safetensors").write_bytes(content)
        try:
            assert digest(load_interventions(folder / "file.safetensors")) == expected
        except UserError as error:
            one_sentence(error)

    characters()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_intervention_with_a_number_that_is_none(folder, value):
    file = folder / "file.safetensors"
    save_interventions(file, [Gate({"text.attn_out": np.array([1, value], np.float32)})])
    with pytest.raises(UserError, match=r"0\.scale.*holds a number that is not finite"):
        load_interventions(file)


def test_a_file_without_interventions(folder):
    save_interventions(folder / "file.safetensors", [])
    with pytest.raises(UserError, match="holds no intervention, so it would change nothing"):
        load_interventions(folder / "file.safetensors")


@pytest.mark.parametrize("read", [load_interventions, load_task, lambda path: read_names(path, 3)])
def test_a_named_pipe_is_refused(folder, read):
    """Reading one would wait without end."""
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        read(folder / "pipe.jsonl")


def test_a_file_with_another_ending_is_no_task(folder):
    (folder / "d.json").write_text("{}")
    with pytest.raises(UserError, match=r"d\.json is a file, but not a \.jsonl file"):
        load_task(folder / "d.json")


def test_a_changed_number_is_seen(folder):
    """The control for the digest: the same file with another number, written as a whole file."""
    file = folder / "file.safetensors"
    save_interventions(file, [Gate({"text.attn_out": np.ones(4, np.float32)})])
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor * 2 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata)
    with pytest.raises(UserError, match="is damaged"):
        load_interventions(file)


def test_whole_numbers_of_8_bits_are_no_arrays_of_a_kind(folder):
    file = folder / "file.safetensors"
    save_interventions(file, [Gate({"text.attn_out": np.ones(4, np.float32)})])
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        metadata = {name: text for name, text in opened.metadata().items() if name != "digest"}
    save_file({name: tensor.astype(np.int8) for name, tensor in load_file(file).items()}, file, metadata)
    with pytest.raises(UserError, match="is stored as int8"):
        load_interventions(file)


FIGURE = {"drawer": "tracing.heatmap", "title": "A", "data": {"panels": {"A": [[0.1, 0.2], [0.3, 0.4]]}, "label": "RR"}}


@pytest.mark.parametrize("count", COUNTS)
def test_figures(folder, count):
    """Whatever the data are, they are drawn, or it is said that they cannot be."""
    listing = {"artifacts": [{"file": "a.png", "type": "figure", "title": "A", "data": "a.json"}], "schemas": {}}
    (folder / "artifacts.json").write_text(json.dumps(listing))
    (folder / "a.json").write_text(json.dumps(FIGURE))
    assert figures_of(folder) == {"a.png": "a.json"}
    redraw(folder / "a.json", folder / "whole.png")
    assert (folder / "whole.png").stat().st_size > 1000  # the control: undamaged, it is drawn

    @many(count)
    @given(damaged_value({"listing": listing, "figure": FIGURE}))
    def values(both):
        both = both if isinstance(both, dict) else {}
        (folder / "artifacts.json").write_text(json.dumps(both.get("listing")))
        (folder / "a.json").write_text(json.dumps(both.get("figure")))
        try:
            for data in figures_of(folder).values():
                redraw(folder / data, folder / "drawn.png")
        except UserError as error:
            one_sentence(error)

    values()


@dataclasses.dataclass(frozen=True)
class Options:
    number: int = 3


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "name", ["config.json", "manifest.json", "result.json", "records.jsonl", "artifacts.json", "seconds.json"]
)
def test_run_folders(folder, count, name):
    """A damaged file of a run never gives another result than the one that was written."""
    out = folder / "out"
    result, records = {"score": 0.5}, [{"id": "a", "x": 1}, {"id": "b", "x": 2}]

    def work():
        run = Run.open(out, Options())
        run.pin("model", "abc")
        found = run.once("result.json", lambda: result, Artifact("metrics", "A result"))
        log = run.log("records.jsonl", Artifact("samples", "Records"))
        for rows, _ in log.missing([([0], ""), ([1], "")], ["a", "b"]):
            log.append([records[row] for row in rows])
        run.timed("stage", 0.0)
        return found, log.records

    assert work() == (result, records)
    whole = (out / name).read_bytes()

    @many(count)
    @given(damaged_bytes(whole))
    def characters(content):
        (out / name).write_bytes(content)
        try:
            found = work()
            if name not in ("result.json", "records.jsonl"):  # their numbers may be changed to other numbers
                assert found == (result, records)
        except UserError as error:
            one_sentence(error)

    characters()


@pytest.mark.parametrize("count", COUNTS)
def test_placements_and_traces(folder, count):
    rr = {f"L{i}-{m}": 0.1 * i for i in range(3) for m in ("attn", "mlp")}

    @many(count)
    @given(damaged_bytes(json.dumps({"rr": rr, "fingerprint": "abc"}).encode()))
    def traces(content):
        (folder / "summary.json").write_bytes(content)
        try:
            rates = read_trace(folder, "abc", 3)
            assert rates.shape == (3, 2) and np.isfinite(rates).all()
        except UserError as error:
            one_sentence(error)

    @many(count)
    @given(damaged_bytes(b'["L0-attn", "L2-mlp"]'))
    def names(content):
        (folder / "names.json").write_bytes(content)
        try:
            assert set(read_names(folder / "names.json", 3)) <= set(rr)
        except UserError as error:
            one_sentence(error)

    traces()
    names()
