"""Tasks are found by name or path, and every mistake in a JSON Lines file is named with its line."""

import json

import pytest
from PIL import Image

from vlm_jax.data import load_task, task_names
from vlm_jax.errors import UserError

GOOD = {"id": "a", "image": "a.png", "question": "What is it?", "answers": ["cat", "a cat"]}


@pytest.fixture
def write(tmp_path):
    """Writes records, or raw lines, to a JSON Lines file beside a good, a broken and an empty image."""
    Image.new("L", (5, 4), 200).save(tmp_path / "a.png")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "words.png").write_text("not a picture")

    def write(*records):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(lines))
        return path

    return write


def test_jsonl_is_read_in_full(write):
    full = GOOD | {"id": "b", "image": ["a.png", "whole.png"], "choices": ["cat", "dog"], "family": "perception"}
    first, second, third = load_task(write(GOOD, "", full, GOOD | {"id": "c", "image": [], "question": "1\u20282?"}))
    assert (first.id, first.question, first.answers) == ("a", "What is it?", ("cat", "a cat"))
    assert (first.choices, first.family, first.task) == (None, None, "mine")
    assert [(i.mode, i.size) for i in second.images] == [("RGB", (5, 4)), ("RGB", (64, 64))]
    assert (second.choices, second.family) == (("cat", "dog"), "perception")
    assert third.images == ()


def test_jsonl_ignores_split_and_keeps_to_limit(write):
    path = write(GOOD, GOOD | {"id": "b"})
    assert [e.id for e in load_task(str(path), split="nonsense", limit=1)] == ["a"]
    assert len(load_task(path, limit=9)) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{nope", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        *[({k: v for k, v in GOOD.items() if k != field}, f"lacks the field '{field}'") for field in GOOD],
        (GOOD | {"id": 7}, "'id' must be"),
        (GOOD | {"id": "z", "image": 7}, "'image' must be"),
        (GOOD | {"id": "z", "question": " "}, "'question' must be"),
        (GOOD | {"id": "z", "answers": []}, "'answers' must be"),
        (GOOD | {"id": "z", "answers": "cat"}, "'answers' must be"),
        (GOOD | {"id": "z", "answers": [3]}, "'answers' must be"),
        (GOOD | {"id": "z", "choices": []}, "'choices' must be"),
        (GOOD | {"id": "z", "family": "perceptoin"}, "unknown family 'perceptoin'; did you mean 'perception'?"),
        (GOOD | {"id": "z", "image": "none.png"}, "does not exist"),
        (GOOD | {"id": "z", "image": "cut.png"}, "is broken or not an image"),
        (GOOD | {"id": "z", "image": "words.png"}, "is broken or not an image"),
        (GOOD, "id 'a' was used on line 1"),
    ],
)
def test_bad_line_is_named(write, line, says):
    with pytest.raises(UserError) as error:
        load_task(write(GOOD, line))
    assert says in str(error.value) and "mine.jsonl, line 2" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_file_is_named(write, tmp_path):
    with pytest.raises(UserError, match=r"mine.jsonl, line 1: the file holds no example"):
        load_task(write("", "  "))
    with pytest.raises(UserError, match=r"cannot read .*none.jsonl"):
        load_task(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(UserError, match=r"latin.jsonl is not UTF-8"):
        load_task(tmp_path / "latin.jsonl")


def test_built_in_tasks_are_found_by_name():
    assert task_names()[:11] == [
        "mini-okvqa", "mini-aokvqa", "mini-scienceqa", "mini-docvqa", "mini-infovqa", "mini-textvqa",
        "mini-vsr", "mini-vqa", "mini-caption", "knowledge", "perception",
    ]  # fmt: skip
    ids = [e.id for e in load_task("mini-docvqa", split="train", limit=2)]
    assert ids == ["mini-docvqa/train/000000", "mini-docvqa/train/000001"]
    assert len(load_task("mini-okvqa", limit=10**6)) == 1000


def test_family_takes_its_tasks_in_turn():
    ids = [e.id for e in load_task("perception", split="trace", limit=5)]
    assert ids == [
        "mini-docvqa/trace/000000", "mini-infovqa/trace/000000", "mini-textvqa/trace/000000",
        "mini-docvqa/trace/000001", "mini-infovqa/trace/000001",
    ]  # fmt: skip
    assert {e.family for e in load_task("knowledge", limit=9)} == {"knowledge"}


def test_mistakes_in_a_call_are_named():
    with pytest.raises(UserError, match="unknown task 'mini-docvq'; did you mean 'mini-docvqa'"):
        load_task("mini-docvq")
    with pytest.raises(UserError, match=r"unknown split 'evaluation'; .*'?eval"):
        load_task("knowledge", split="evaluation")
    for limit in (0, -3):
        with pytest.raises(UserError, match="at least one"):
            load_task("knowledge", limit=limit)
