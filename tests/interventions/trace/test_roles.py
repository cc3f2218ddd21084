"""Traces of questions with a subject: noise on it alone, ROME's roles as positions, and roles that a sample lacks."""

import json
import math

import jax
import numpy as np
import pytest
from run_folders import check_run_folder

import interventions.trace.__main__ as command
import vlm_jax
from interventions.kinds.groups import ROLES, positions_of
from interventions.trace.corruption import Corrupter, embed, survey
from interventions.trace.options import TraceOptions
from interventions.trace.tracing import trace_examples
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.prompts import batches, encode

#: Subjects of four tokens, of one and of two.
LONG, SHORT, MIDDLE = "red circle on the table", "circle", "red circle"


def fact(number, subject, answer):
    return Example(str(number), (), f"The {subject} is", (answer,), subject=subject, task="facts")


FACTS = [fact(0, LONG, "red"), fact(1, SHORT, "blue"), fact(2, MIDDLE, "green"), fact(3, LONG, "left")]


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


def test_noise_is_on_the_subject(mini):
    model, processor = mini
    groups = list(batches(FACTS, processor, model.config, 4))
    surveyed = survey(model, groups)
    corrupt = Corrupter(model, processor, FACTS, surveyed, TraceOptions())
    subjects = []
    for rows, batch in groups:
        (added,) = corrupt(rows, batch)
        changed = np.asarray(added.vectors if hasattr(added, "vectors") else jax.tree.leaves(added)[0])
        np.testing.assert_array_equal(np.abs(changed).max(-1) > 0, batch.spans["subject"])
        assert (batch.spans["subject"].sum(1) < batch.spans["question"].sum(1)).all()
        x = np.asarray(embed(model, batch.inputs).x)
        subjects.append(x[: len(rows)][batch.spans["subject"][: len(rows)]])
    np.testing.assert_allclose(surveyed.sigma["question"], np.concatenate(subjects).std(), rtol=1e-5)


def test_roles_that_a_sample_lacks_are_missing(mini):
    """Alone in its batch or with others, a sample has the same effects, and none where it has no such token."""
    options = TraceOptions(positions=ROLES, min_te=-1)
    model, processor = mini
    together = trace_examples(model, processor, FACTS, options, "facts")
    effects = together.ie.reshape(4, model.config.text.num_hidden_layers, 2, len(ROLES))
    for row, example in enumerate(FACTS):
        batch = encode([example], processor, model.config)
        has = np.array([positions_of(role, batch).any() for role in ROLES])
        np.testing.assert_array_equal(np.isfinite(effects[row]), np.broadcast_to(has, effects[row].shape))
        if has[1]:
            assert example.subject == LONG
        alone = trace_examples(model, processor, [example], options, "facts")
        np.testing.assert_allclose(alone.ie[0], together.ie[row], atol=1e-5)
    assert together.cells[1] == "L0-attn@middle_subject"


def test_first_and_last_token_of_a_short_subject(mini):
    model, processor = mini
    one = trace_examples(model, processor, FACTS[1:2], TraceOptions(positions=ROLES), "facts").ie[0, 0].reshape(-1, 6)
    np.testing.assert_array_equal(one[:, 0], one[:, 2])
    assert np.isfinite(one[:, 0]).all() and np.isnan(one[:, 1]).all() and np.ptp(one[:, 0]) > 0


def test_groups_that_no_sample_has(mini):
    with pytest.raises(UserError, match="--positions image: no sample has such a token"):
        trace_examples(*mini, FACTS, TraceOptions(positions=("image", "last")), "facts")
    with pytest.raises(UserError, match="--positions middle_subject: no sample has such a token"):
        trace_examples(*mini, FACTS[1:2], TraceOptions(positions=("middle_subject",)), "facts")


def test_the_command_writes_what_is_missing(tmp_path):
    lines = [
        {"id": e.id, "image": [], "question": e.question, "answers": e.answers, "subject": e.subject}
        for e in FACTS[1:3]
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = {"task": str(tmp_path / "facts.jsonl"), "prompt": "{QUESTION}", "chat_template": False}
    command.main(command.Args(**args, positions=ROLES, min_te=-1, out=tmp_path / "run"))
    check_run_folder(tmp_path / "run", tmp_path / "scratch")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["missing"]["L0-attn@middle_subject"] == 2 and "L0-attn@last" not in summary["missing"]
    assert summary["rr"]["L0-mlp@middle_subject"] is None and math.isfinite(summary["rr"]["L0-mlp@last_subject"])
    assert "L0-mlp@middle_subject" not in summary["ranking"] and "L0-mlp@last_subject" in summary["ranking"]
    panels = json.loads((tmp_path / "run/positions.json").read_text())["data"]["panels"]
    assert panels["mlp"][1] == [None] * 8 and panels["attn"][2][3] == summary["rr"]["L3-attn@last_subject"]
    assert json.loads((tmp_path / "run/manifest.json").read_text())["prompt"] == ["{QUESTION}"]
    records = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    for record in records:
        assert record["ie"]["L0-attn@middle_subject"] == [None] and record["ie"]["L0-attn@first_subject"] != [None]
