"""P1's study of Registering: what it compares, pictures of fewer tokens, and one small run of it."""

import json

import numpy as np
import pytest
from run_folders import check_run_folder

import vlm_jax
from train.study import __main__ as command
from train.study.registering.options import Args, compared_with
from train.study.registering.pictures import blocks_of, most_attended, pooled
from train.study.registering.recipes import CONDITIONS, WHOLE
from train.study.registering.study import study_options, training_sets
from vlm_jax import UserError
from vlm_jax.data import load_task
from vlm_jax.prompts import encode


def test_every_condition_has_a_name_and_something_to_compare_it_with():
    names = [condition.name for condition in CONDITIONS]
    assert len(set(names)) == len(names) and names[0] == WHOLE
    for condition in CONDITIONS:
        other = compared_with(condition)
        assert other.data == condition.data and other.registers is None and other.reduced is None
    trained = [c for c in CONDITIONS if c.registers is not None and c.mask == "register"]
    assert {(c.registers, c.data) for c in trained} == {
        (count, data) for count in (1, 4, 16) for data in ("captions", "questions", "both")
    }
    assert {c.mask for c in CONDITIONS if c.section == "other masks"} == {"mitre", "gist", "none", "blind"}


def test_the_default_rate_depends_on_the_width():
    """5e-5 for a width of 2560, so 1e-3 for 128."""
    model, _ = vlm_jax.load("mini-qwen3-vl")
    assert model.config.text.hidden_size == 128
    assert study_options(Args(), CONDITIONS[-1], 0, model).lr == pytest.approx(1e-3)
    assert study_options(Args(lr=3e-4), CONDITIONS[-1], 0, model).lr == 3e-4


def test_training_sets_are_equally_large():
    found = training_sets(Args(limit=24))
    assert {name: len(examples) for name, examples in found.items()} == {"captions": 24, "questions": 24, "both": 24}
    tasks = {name: {example.task for example in examples} for name, examples in found.items()}
    assert tasks["captions"] == {"mini-caption"} and len(tasks["questions"]) == 6
    assert tasks["both"] == tasks["captions"] | tasks["questions"]
    assert sum(example.task == "mini-caption" for example in found["both"]) == 12


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"conditions": ("4 pooledd",)}, "recipe p1 has no condition '4 pooledd'; did you mean '4 pooled'"),
        ({"seeds": ()}, "--seeds needs at least one number"),
    ],
)
def test_refused_options(options, says):
    with pytest.raises(UserError, match=says):
        Args(**options).chosen()
    assert [c.name for c in Args(conditions=("4 pooled",)).chosen()] == [WHOLE, "4 pooled"]


def test_blocks_are_neighbours_of_nearly_equal_size():
    is_image = np.array([[False] + [True] * 7 + [False], [True] * 5 + [False] * 4])
    assert blocks_of(is_image, 3).tolist() == [[0, 1, 1, 1, 2, 2, 3, 3, 0], [1, 1, 2, 2, 3, 0, 0, 0, 0]]
    with pytest.raises(UserError, match="5 visual tokens, so 6"):
        blocks_of(is_image, 6)


@pytest.fixture(scope="module", params=["mini-qwen3-vl", "mini-llava"])
def loaded(request):
    model, processor = vlm_jax.load(request.param)
    batch = encode(load_task("mini-docvqa", split="test", limit=6), processor, model.config, with_answer=False)
    return model, batch


def logits_of(model, inputs, acting):
    """Of the last token of every prompt."""
    last = np.asarray(inputs.attention_mask).shape[1] - 1 - np.asarray(inputs.attention_mask)[:, ::-1].argmax(1)
    return np.asarray(model(inputs, acting).logits)[np.arange(len(last)), last]


def test_as_many_tokens_as_the_picture_has_change_nothing(loaded):
    """And fewer do."""
    model, batch = loaded
    count = int(batch.spans["image"].sum(1).min())
    assert (batch.spans["image"].sum(1) == count).all()
    whole = logits_of(model, batch.inputs, ())
    for make in (pooled, lambda *args: most_attended(*args, 1)):
        np.testing.assert_allclose(logits_of(model, *make(model, batch, count)), whole, atol=1e-4)
        assert np.abs(logits_of(model, *make(model, batch, 2)) - whole).max() > 1e-2


@pytest.mark.parametrize("loaded", ["mini-llava"], indirect=True)  # the oracle has no DeepStack
def test_pooling_is_the_prompt_with_means_in_it(loaded):
    """By hand: the visual tokens of a block are replaced by their mean in the embeddings, and all but the first are cut
    out of the prompt, whose other tokens keep their positions."""
    model, batch = loaded
    inputs, acting = pooled(model, batch, 4)
    row = 2
    kept = np.asarray(inputs.attention_mask)[row]
    visual = batch.spans["image"][row]
    assert (kept & visual).sum() == 4
    embedded = np.array(model.embed(batch.inputs)[0].x[row])
    parts = np.array_split(np.flatnonzero(visual), 4)
    for part in parts:
        embedded[part[0]] = embedded[part].mean(0)
    cut = batch.inputs.take([row])
    cut = cut.replace(
        input_ids=cut.input_ids[:, kept],
        attention_mask=cut.attention_mask[:, kept],
        position_ids=cut.position_ids[:, :, kept],
        images=None,
        image_index=None,
    )
    x, *_ = model.text.scan(embedded[None, kept], model.window(cut))
    wanted = model.unembed(x)[0, -1]
    np.testing.assert_allclose(logits_of(model, inputs, acting)[row], wanted, atol=1e-4)


@pytest.mark.slow
def test_a_small_study(tmp_path, capsys):
    """Every kind of condition once, and a second run in which nothing is left to do."""
    names = (
        "4 pooled",
        "4 most attended",
        "4 registers, register, captions",
        "4 registers, none, captions and questions",
    )
    args = Args(
        questions=("mini-okvqa", "mini-docvqa"), limit=8, eval_limit=4, epochs=1, batch=4, seeds=(0,), lr=1e-3,
        conditions=names, out=tmp_path / "run",
    )  # fmt: skip
    command.main(args)
    rows = {row["condition"]: row for row in json.loads((args.out / "summary.json").read_text())["rows"]}
    assert set(names) < rows.keys() and rows[names[2]]["compared_with"] == "plain tuning, captions"
    assert rows[names[0]]["cut"] is None and 0 <= rows[names[2]]["cut"]["mean"] <= 1
    records = json.loads((args.out / "cells/4-registers-none-captions-and-questions/seed-0/answers.json").read_text())
    assert len(records) == 8 and all("cut" in record for record in records)
    check_run_folder(args.out, tmp_path)
    chart = json.loads((args.out / "figures/conditions.json").read_text())["chart"]
    assert all((args.out / folder).is_dir() for row in chart["rows"] for folder in row["folders"])
    before = (args.out / "summary.json").read_bytes()
    command.main(args)
    assert (args.out / "summary.json").read_bytes() == before and f"| {WHOLE} |" in capsys.readouterr().out
