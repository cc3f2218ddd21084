"""scikit-learn's digits as a task."""

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from vlm_jax.data import digits, load_task, source
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError


@pytest.fixture(scope="module")
def found():
    return {split: load_task("digits", split=split) for split in digits.SPLITS}


def test_every_picture_is_in_one_split(found):
    assert {split: len(part) for split, part in found.items()} == digits.SPLITS
    ids = [example.id for part in found.values() for example in part]
    assert len(set(ids)) == len(ids) == 1797
    check_disjoint(found["train"], found["test"])


def test_examples_are_the_packages(found):
    data = load_digits()
    for example in found["eval"][:50]:
        number = int(example.id.partition("/")[2])
        assert example.answers == (str(data.target[number]),) == (example.subtask,) and example.task == "digits"
        (image,) = example.images
        assert image.size == (64, 64) and image.mode == "RGB"
        grey = np.asarray(image)[..., 0].reshape(8, 8, 8, 8).mean((1, 3))
        assert np.abs(grey - data.images[number] * 255 / 16).mean() < 16
    assert {example.answers[0] for example in found["test"]} == set("0123456789")


def test_they_can_be_told_apart(found):
    """Pictures and answers belong together: a linear classifier that learns on one split is right on another."""
    x, y = ([np.asarray(e.images[0])[4::8, 4::8, 0].ravel() / 255 for e in found[s]] for s in ("train", "test"))
    labels = [[e.answers[0] for e in found[split]] for split in ("train", "test")]
    assert LogisticRegression(max_iter=1000).fit(x, labels[0]).score(y, labels[1]) > 0.9


def test_source_and_mistakes(monkeypatch):
    assert source("digits")["dataset"].startswith("pypi:scikit-learn==") and source("digits")["rows"] == 1797
    with pytest.raises(UserError, match="unknown split 'tests' of digits; did you mean 'test'"):
        load_task("digits", split="tests")
    digits._data.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"the task digits needs scikit-learn: pip install 'vlm-jax\[digits\]'"):
        load_task("digits", split="test")
    monkeypatch.undo()
    digits._data.cache_clear()
