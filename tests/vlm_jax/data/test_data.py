"""Tasks are found by name or path, and every mistake in a JSON Lines file is named with its line."""

import json

import pytest
from PIL import Image

from eval.judging import MetricOptions, judge
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
    full = GOOD | {"id": "b", "image": ["a.png", "whole.png"], "choices": ["cat", "a cat"], "family": "perception"}
    first, second, third = load_task(write(GOOD, "", full, GOOD | {"id": "c", "image": [], "question": "1\u20282?"}))
    assert (first.id, first.question, first.answers) == ("a", "What is it?", ("cat", "a cat"))
    assert (first.choices, first.family, first.task) == (None, None, "mine")
    assert [(i.mode, i.size) for i in second.images] == [("RGB", (5, 4)), ("RGB", (64, 64))]
    assert (second.choices, second.family, second.gold) == (("cat", "a cat"), "perception", None)
    assert third.images == ()


def test_jsonl_ignores_split_and_keeps_to_limit(write):
    path = write(GOOD, GOOD | {"id": "b"})
    assert [e.id for e in load_task(str(path), split="nonsense", limit=1)] == ["a"]
    assert len(load_task(path, limit=9)) == 2


@pytest.mark.parametrize(
    "stated, gold, answers",
    [
        (["dog", "CAT"], [1, 0], ["dog", "cat"]),
        (["B", "(a)"], [1, 0], ["B", "A"]),  # the question is expected to show letters
        ([1, "0"], [1, 0], ["dog", "cat"]),
        (["b", "a"], [1, 0], ["B", "A"]),
    ],
)
def test_all_lines_decide_how_the_right_choice_is_stated(write, stated, gold, answers):
    lines = [GOOD | {"id": str(i), "choices": ["cat", "dog"], "answers": [one]} for i, one in enumerate(stated)]
    found = load_task(write(*lines, GOOD))
    assert [example.gold for example in found] == [*gold, None]
    assert [example.answers for example in found[:2]] == [(answer,) for answer in answers]
    options = MetricOptions(metric="multiple_choice")
    replies = [f"The answer is {answer}." for answer in answers]
    assert [judged.score for judged in judge(found[:2], replies, options)] == [1.0, 1.0]
    assert [judged.score for judged in judge(found[:2], replies[::-1], options)] == [0.0, 0.0]
    assert [example.metric for example in found] == ["multiple_choice", "multiple_choice", "exact_match"]


def test_a_line_with_several_right_choices(write):
    line = GOOD | {"choices": ["cat", "dog", "cow"], "answers": ["dog", "Cow"]}
    (example,) = load_task(write(line))
    assert (example.gold, example.answers, example.metric) == (None, ("dog", "cow"), "exact_match")
    with pytest.raises(UserError, match="line 1: its answer 'dog', 'a pet' is neither one of its options"):
        load_task(write(line | {"answers": ["dog", "a pet"]}))


def test_lines_in_the_minority_are_left_out(write):
    lines = [
        GOOD | {"id": answer, "choices": ["cat", "dog"], "answers": [answer]} for answer in ("dog", "cat", "B", "x")
    ]
    with pytest.raises(UserError, match="line 3 states its answer 'B' in another way"):
        load_task(write(*lines[:3]))
    bad = {}
    assert [example.id for example in load_task(write(*lines), bad=bad)] == ["dog", "cat"]
    assert [name.rpartition(" ")[2] for name in sorted(bad)] == ["3", "4"]


def test_a_choice_that_is_a_letter_is_not_guessed(write):
    """Of the blood groups "B" is the second choice by letter and the first by text; another line tells which."""
    groups = GOOD | {"id": "g", "choices": ["B", "A", "0"], "answers": ["B"]}
    with pytest.raises(UserError, match="line 1: its answer 'B' can be read as letter or option, and no row tells"):
        load_task(write(groups))
    told = [GOOD | {"id": "p", "choices": ["cat", "dog"], "answers": [answer]} for answer in ("dog", "B")]
    assert [load_task(write(groups, line))[0].gold for line in told] == [0, 1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{nope", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        *[({k: v for k, v in GOOD.items() if k != field}, f"lacks the field '{field}'") for field in GOOD],
        (GOOD | {"id": ["z"]}, "'id' must be"),
        (GOOD | {"id": float("nan")}, "'id' must be"),
        ('{"id": ' + "[" * 200_000, "nested too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit"),
        (json.dumps(GOOD | {"id": "z", "question": "a\ud800b"}), "surrogates not allowed"),
        (GOOD | {"id": "z", "image": "x" * 300}, "cannot be read (File name too long)"),
        (GOOD | {"id": "z", "image": "."}, "is not a regular file"),
        (GOOD | {"id": "z", "image": 7}, "'image' must be"),
        (GOOD | {"id": "z", "question": " "}, "'question' must be"),
        (GOOD | {"id": "z", "answers": []}, "'answers' must be"),
        (GOOD | {"id": "z", "answers": " "}, "'answers' must be"),
        (GOOD | {"id": "z", "answers": [["cat"]]}, "'answers' must be"),
        (GOOD | {"id": "z", "answers": [float("inf")]}, "'answers' must be"),
        (GOOD | {"id": "z", "choices": []}, "'choices' must be"),
        (
            GOOD | {"id": "z", "choices": ["red", "blue"]},
            "its answer 'cat', 'a cat' is neither one of its options ('red', 'blue')",
        ),
        (GOOD | {"id": "z", "family": "perceptoin"}, "unknown family 'perceptoin'; did you mean 'perception'?"),
        (GOOD | {"id": "z", "image": "none.png"}, "does not exist"),
        (GOOD | {"id": "z", "image": "HTTPS://a.org/b.png"}, "the image HTTPS://a.org/b.png is a URL: download it"),
        (GOOD | {"id": "z", "image": "cut.png"}, "cut.png: the image cannot be decoded (image file is truncated"),
        (GOOD | {"id": "z", "image": "words.png"}, "words.png: this is no image in a format that Pillow reads"),
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
