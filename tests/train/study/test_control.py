"""P4's study of controllability: what is asked, which tokens are edited, and how answers are counted."""

import dataclasses
import json

import numpy as np
import pytest
from run_folders import check_run_folder

import vlm_jax
from interventions import GROUPS, label
from train.study import __main__ as command
from train.study.control.main import MEASURES, measure, right
from train.study.control.options import Args
from train.study.control.places import PLACES, check_grid, object_tokens
from train.study.control.questions import FIXED, REWORDINGS, ask, balanced, shuffled, turned, with_article
from train.study.control.study import CLASSES, Control, pictures_of
from vlm_jax import UserError
from vlm_jax.prompts import encode

TASKS = ("easy-vqa", "digits")


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def pictures(task):
    return pictures_of(task)


@pytest.fixture(scope="module")
def llava():
    return vlm_jax.load("mini-llava")


def test_twenty_rewordings_that_are_no_two_alike():
    assert len(REWORDINGS) == len(set(REWORDINGS)) == 20 and FIXED not in REWORDINGS
    assert all(wording.count("{a}") == 1 for wording in (FIXED, *REWORDINGS))
    assert (with_article("circle"), with_article("8"), with_article("0")) == ("a circle", "an 8", "a 0")


def test_pictures_show_what_they_are_said_to(task, pictures):
    assert {shown for _, shown in pictures.trained} == set(CLASSES[task][1]) >= set(CLASSES[task][0])
    ids = [{example.image_id or example.id for example, _ in part} for part in pictures]
    assert not ids[0] & ids[1] and [len(part) for part in ids] == [len(part) for part in pictures]


def test_half_of_the_pictures_show_the_class(task, pictures):
    name = CLASSES[task][0][1]
    chosen = balanced(pictures.trained, name, 40, np.random.default_rng(0))
    assert len(chosen) == 40 and sum(shown == name for _, shown in chosen) == 20
    example = ask(*chosen[0][:1], name, chosen[0][1])
    assert example.answers == (("yes",) if chosen[0][1] == name else ("no",))
    assert turned(example).answers != example.answers and turned(turned(example)) == example
    assert example.question == FIXED.format(a=with_article(name))
    asked = [ask(picture, name, shown) for picture, shown in chosen]
    mixed = shuffled(asked, 0)
    assert [e.id for e in mixed] == [e.id for e in asked] and [e.answers for e in mixed] != [e.answers for e in asked]
    assert sorted(e.answers for e in mixed) == sorted(e.answers for e in asked)


def test_the_object_is_where_it_was_drawn(task, pictures, llava):
    """Of digits, the ink; of easy-VQA, the shape on its plain ground: where the pixels differ from the corner's."""
    model, processor = llava
    examples = [example for example, _ in pictures.tested[:6]]
    batch = encode(examples, processor, model.config)
    found = object_tokens(batch)
    for row, example in enumerate(examples):
        pixels = np.asarray(example.images[0].resize((64, 64)), np.float32)
        difference = np.abs(pixels - pixels[0, 0]).max(-1).reshape(8, 8, 8, 8).swapaxes(1, 2).reshape(64, 64)
        covered, plain = (difference > 90).mean(1), (difference < 40).all(1)
        tokens = found[row][batch.spans["image"][row]]
        assert 0 < tokens.sum() < 64 and not found[row][~batch.spans["image"][row]].any()
        assert tokens[covered > 0.6].all() and not tokens[plain].any() and plain.any()


def test_which_tokens_are_edited(pictures, llava):
    model, processor = llava
    batch = encode([example for example, _ in pictures.tested[:4]], processor, model.config, with_answer=False)
    labels = label(batch)
    paper, everything, random = (
        PLACES[name](batch) for name in ("object and instruction", "all tokens", "random tokens")
    )
    np.testing.assert_array_equal(paper, object_tokens(batch) | (labels == GROUPS.index("question")))
    np.testing.assert_array_equal(everything, labels != GROUPS.index("padding"))
    np.testing.assert_array_equal(paper.sum(1), random.sum(1))
    assert (random <= everything).all() and (random != paper).any()
    longer = encode([example for example, _ in pictures.tested[:4]], processor, model.config, step=256)
    np.testing.assert_array_equal(PLACES["random tokens"](longer)[:, : random.shape[1]], random)  # whatever the padding
    np.testing.assert_array_equal(random, PLACES["random tokens"](batch))
    np.testing.assert_array_equal(PLACES["shuffled labels"](batch), paper)


@pytest.mark.parametrize("name", ["mini-qwen3-vl", "mini-llava-text"])
def test_models_without_a_grid_are_refused(name):
    with pytest.raises(UserError, match="controllability needs one visual token for each patch: choose a LLaVA"):
        check_grid(vlm_jax.load(name)[0])


def test_everything_is_asked_about_held_out_pictures(task, pictures, llava):
    asked = Control(Args(eval_limit=12), None, task, pictures, *llava).questions(CLASSES[task][0][0])
    assert [len(examples) for examples in asked.values()] == [12] * 23
    train = {example.id for example, _ in pictures.trained}
    for kind, examples in asked.items():
        assert not {example.id.rsplit("/", 2)[0] for example in examples} & train
        if kind != "own question":
            assert {example.answers for example in examples} == {("yes",), ("no",)}, kind


def record(kind, true, answer, picture):
    return {"kind": kind, "id": f"{picture}/{kind}", "picture": picture, "true": true, "answer": answer}


def test_answers_are_counted_by_hand():
    before = [
        record("fixed", "yes", "yes", "a"),
        record("fixed", "no", "yes", "b"),  # wrong before: does not count
        record("fixed", "no", "no", "c"),
        record("rewording 1", "yes", "yes", "a"),
        record("rewording 2", "yes", "yes", "a"),
        record("rewording 1", "no", "no", "c"),
        record("another class", "no", "no", "a"),
        record("another class", "yes", "yes", "c"),
        record("own question", "red", "blue", "a"),
        record("own question", "red", "red", "c"),
    ]
    answers = ["no", "no", "no", "no", "yes", "yes", "no", "no", "blue", "green"]
    after = [dict(old, answer=answer) for old, answer in zip(before, answers, strict=True)]
    assert measure(after, before) == dict(zip(MEASURES, ([1.0, 0.0], [0.5, 1.0], [1.0, 0.0], [1.0, 0.0]), strict=True))
    assert right(before)["mean"] == pytest.approx(np.mean([1, 0, 1]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ()}, "--tasks names no task"),
        ({"model": "mini-qwen3-vl"}, "choose a LLaVA"),
        ({"limit": 1}, "--limit is 1"),
        ({"rank": 129}, "the rank of the steering editor is 129"),
    ],
)
def test_refusals_are_one_sentence(options, says, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(dataclasses.replace(Args(out=tmp_path / "run"), **options))
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_small_study(tmp_path):
    args = Args(
        tasks=("easy-vqa",), limit=4, eval_limit=4, epochs=1, batch=4, base_examples=32, base_epochs=1,
        out=tmp_path / "run",
    )  # fmt: skip
    command.main(args)
    rows = json.loads((args.out / "summary.json").read_text())["rows"]
    assert [row["condition"] for row in rows] == ["unedited", *PLACES]
    check_run_folder(args.out, tmp_path)
    before = (args.out / "summary.json").read_bytes()
    command.main(args)  # nothing is left to do
    assert (args.out / "summary.json").read_bytes() == before
