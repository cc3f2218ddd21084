"""easy-VQA: read without being imported, split by image, and its question-only baseline."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from vlm_jax.data import easy_vqa, load_task, source
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError

pytest.importorskip("easy_vqa", reason="the extra easy-vqa is not installed")


def records(part):
    """The package's own file, found by importing it, which the library does not."""
    import easy_vqa as package

    return json.loads((Path(package.__file__).parent / "data" / part / "questions.json").read_text())


def test_splits():
    found = {split: load_task("easy-vqa", split=split) for split in ("trace", "train", "eval", "test")}
    assert {split: len(part) for split, part in found.items()} == {
        "trace": 1000, "train": 36000, "eval": 1000, "test": 9673,
    }  # fmt: skip
    shown = [{e.image_id for e in part} for part in found.values()]
    assert sum(map(len, shown)) == len(set().union(*shown)) <= 5000
    check_disjoint(found["train"] + found["trace"] + found["eval"], found["test"])
    with pytest.raises(UserError, match="evaluation has the id"):  # the check can fail
        check_disjoint(found["train"], [*found["test"], found["train"][7]])
    asked = {(text, answer, f"easy-vqa/test/{image}") for text, answer, image in records("test")}
    assert {(e.question, e.answers[0], e.image_id) for e in found["test"]} == asked


def test_examples():
    example = load_task("easy-vqa", split="eval", limit=1)[0]
    assert (example.metric, example.family, example.task) == ("exact_match", "perception", "easy-vqa")
    assert [(image.mode, image.size) for image in example.images] == [("RGB", (64, 64))]
    number = int(example.id.rsplit("/", 1)[1])
    text, answer, image = records("train")[number]
    assert (example.question, example.answers, example.image_id) == (text, (answer,), f"easy-vqa/train/{image}")
    kinds = Counter(e.subtask for e in load_task("easy-vqa", split="test"))
    assert kinds == {"yes/no": 3611 + 3525, "shape": kinds["shape"], "colour": 2537 - kinds["shape"]}
    assert (
        easy_vqa.question_type("triangle") == "shape"
        and easy_vqa.question_type("teal") == "colour"
        and easy_vqa.question_type("no") == "yes/no"
    )


def test_question_only_baseline():
    """67.0 %, and as an independent count has it."""
    known = {}
    for text, answer, _ in records("train"):
        known.setdefault(text, []).append(answer)
    test = records("test")
    right = [max(dict.fromkeys(known[text]), key=known[text].count) == answer for text, answer, _ in test]
    found = easy_vqa.question_only_baseline()
    assert found["accuracy"] == sum(right) / len(right) and round(found["accuracy"], 3) == 0.670
    assert found["yes/no"] > 0.8 > 0.4 > found["shape"] > found["colour"]
    few = load_task("easy-vqa", split="test", limit=50)
    assert 0 < easy_vqa.question_only_baseline(few)["accuracy"] < 1


def test_source():
    found = source("easy-vqa")
    assert found["dataset"] == "pypi:easy-vqa==1.0" and found["rows"] == {"train": 38575, "test": 9673}


def test_mistakes(monkeypatch):
    with pytest.raises(UserError, match="unknown split 'tests' of easy-vqa; did you mean 'test'"):
        load_task("easy-vqa", split="tests")
    easy_vqa._folder.cache_clear()
    monkeypatch.setattr(easy_vqa, "PACKAGE", "easy-vqa-that-is-not-there")
    with pytest.raises(UserError, match=r"pip install 'vlm-jax\[easy-vqa\]'"):
        load_task("easy-vqa", split="test", limit=1)
    easy_vqa._folder.cache_clear()


def test_nothing_of_it_is_imported():
    code = (
        "import sys; from vlm_jax.data import load_task; load_task('easy-vqa', limit=1)[0].images[0];"
        "assert not {'easy_vqa', 'test'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
