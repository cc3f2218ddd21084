"""A folder of pictures with one JSON Lines file beside them is that file."""

import json

import pytest
from PIL import Image

from vlm_jax.data import load_task, source
from vlm_jax.errors import UserError

LINES = [{"id": i, "image": f"pictures/{i}.png", "question": "How many?", "answers": i} for i in range(3)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(tmp_path / "mine" / "pictures" / f"{i}.png")
    (tmp_path / "mine" / "data.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return tmp_path / "mine"


def test_it_stands_for_its_file(folder):
    """Numbers as ids and answers included."""
    found, want = load_task(folder), load_task(folder / "data.jsonl")
    assert [(e.id, e.answers, e.task) for e in found] == [(e.id, e.answers, e.task) for e in want]
    assert [e.answers for e in found] == [("0",), ("1",), ("2",)]
    assert source(folder) == source(folder / "data.jsonl")


def test_other_folders_are_datasets(folder):
    """With a second file, or without pictures, the folder is read as a dataset, whose images are in its columns."""
    (folder / "other.jsonl").write_text(json.dumps({"something": 1}))
    with pytest.raises(UserError):
        load_task(folder)
