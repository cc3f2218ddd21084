"""The options of a trace: what its cells are, what it measures and on which samples, and the command with its files."""

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from run_folders import check_run_folder
from tracing_oracle import forward, probability

import interventions.trace.__main__
import interventions.trace.tracing
import vlm_jax
from eval.evaluation import answer
from interventions import Patch, ProjectOut
from interventions.engine.prefix import PREFIX_BUCKET
from interventions.engine.read import LogitDifference
from interventions.kinds.groups import label, members
from interventions.kinds.layers import slots
from interventions.trace.corruption import Corrupter, Survey, survey
from interventions.trace.options import TraceOptions
from interventions.trace.result import TaskTrace, summarise
from interventions.trace.samples import predictions, read_effects
from interventions.trace.tracing import cells_of, foil, trace_batch, trace_examples, with_gold_first
from vlm_jax.data import Example, load_task
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch, batches, encode

TOLERANCE = 1e-5
DEPTH, HEADS = 8, 4


class Task(NamedTuple):
    model: vlm_jax.Model
    processor: object
    examples: list[Example]
    batch: Batch
    survey: Survey

    def trace(self, batch: Batch | None = None, rows=(0, 1, 2, 3), **options):
        """p_clean ``(B,)``, p_corrupt ``(B, R)``, ie ``(B, R, C)`` and correct ``(B,)`` of one batch."""
        corrupt = Corrupter(self.model, self.processor, self.examples, self.survey, TraceOptions(**options))
        records = trace_batch(corrupt, rows, self.batch if batch is None else batch)
        return tuple(np.array([r[name] for r in records]) for name in ("p_clean", "p_corrupt", "ie", "correct"))


@pytest.fixture(scope="module")
def task():
    model, processor = vlm_jax.load("mini-qwen3-vl")
    loaded = load_task("mini-docvqa", split="trace", limit=8)
    examples = [loaded[number] for number in (1, 3, 6, 7)]
    groups = list(batches(examples, processor, model.config, 4, align=PREFIX_BUCKET))
    assert [rows for rows, _ in groups] == [[0, 1, 2, 3]]
    return Task(model, processor, examples, groups[0][1], survey(model, groups))


@pytest.fixture(scope="module")
def plain(task):
    """The trace with the defaults."""
    return task.trace()


def near(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


# The grid: cells by name against patches made by hand, in whole forward passes.


@pytest.fixture(scope="module")
def by_hand(task):
    """``(site, layers, head, tokens) -> IE (B,)`` of one patch of the clean run's values."""
    sites = ("text.attn_out", "text.mlp_out", "text.head_out")
    clean = jax.jit(lambda model, inputs: model(inputs, taps=sites).taps)(task.model, task.batch.inputs)
    corrupt = Corrupter(task.model, task.processor, task.examples, task.survey, TraceOptions())(range(4), task.batch)
    nowhere = np.full(DEPTH, DEPTH)
    real = np.asarray(task.batch.inputs.attention_mask)

    def logits(site=None, layers=(), head=None, tokens=None):
        used = sites[2:] if site == "text.head_out" else sites[:2]
        table = np.where(np.isin(np.arange(DEPTH), layers), slots(DEPTH, None), DEPTH)
        slot = {name: table if name == site else nowhere for name in used}
        heads = None if head is None else np.arange(HEADS) == head
        patch = Patch({name: clean[name] for name in used}, slot, real if tokens is None else tokens, heads)
        return _patched(task.model, task.batch.inputs, (*corrupt, patch))

    def effect(*cell, read=lambda x: probability(x, task.batch), **where):
        return read(logits(*cell, **where)) - read(forward(task.model, task.batch.inputs, corrupt))

    return effect


_patched = jax.jit(lambda model, inputs, used: model(inputs, used).logits)

#: Options -> some cells, each with its (site, layers, head, group).
GRIDS = [
    ({}, {"L0-attn": ("attn", [0]), "L0-mlp": ("mlp", [0]), "L1-attn": ("attn", [1]), "L7-mlp": ("mlp", [7])}),
    ({"window": 3}, {"L0-mlp": ("mlp", [0, 1]), "L4-attn": ("attn", [3, 4, 5]), "L7-attn": ("attn", [6, 7])}),
    ({"window": 2}, {"L0-mlp": ("mlp", [0]), "L4-attn": ("attn", [3, 4])}),
    (
        {"positions": ("question", "last")},
        {"L0-mlp@question": ("mlp", [0], None, "question"), "L6-mlp@last": ("mlp", [6], None, "last")},
    ),
    ({"heads": True}, {"L0-H0": ("head", [0], 0), "L2-H3": ("head", [2], 3), "L5-H1": ("head", [5], 1)}),
    (
        {"heads": True, "window": 2, "positions": ("last", "question")},
        {"L4-H2@last": ("head", [3, 4], 2, "last"), "L2-H1@question": ("head", [1, 2], 1, "question")},
    ),
]


@pytest.mark.parametrize("options, cells", GRIDS, ids=lambda v: "-".join(map(str, v.values())) or "plain")
def test_cells_are_what_their_names_say(task, by_hand, options, cells):
    """Each equals the patch made by hand, and is the only cell of the whole grid that does."""
    ie = task.trace(**options)[2][:, 0]
    names = cells_of(task.model.config, TraceOptions(**options))
    assert ie.shape == (4, len(names)) and len(set(names)) == len(names)
    labels = label(task.batch)
    for name, (module, layers, *rest) in cells.items():
        head, group = (*rest, None, None)[:2]
        tokens = None if group is None else np.isin(labels, members(group))
        want = by_hand(f"text.{module}_out", layers, head, tokens)
        off = np.abs(ie - want[:, None]).max(0)
        assert off[names.index(name)] < TOLERANCE, name
        assert np.sort(off)[1] > 10 * TOLERANCE, name


def test_number_of_cells(task):
    def count(**options):
        return len(cells_of(task.model.config, TraceOptions(**options)))

    groups = ("question", "last", "answer")
    assert (count(), count(positions=groups), count(heads=True), count(heads=True, positions=groups)) == (
        16,
        48,
        32,
        96,
    )


# Independence


def test_batch_order_and_padding_do_not_matter(task, plain):
    """Three of the samples, in another order, with more padding, and a row that fills the batch up."""
    rows = [3, 0, 2]
    batch = encode([task.examples[row] for row in (*rows, 2)], task.processor, task.model.config, step=96)
    assert batch.inputs.input_ids.shape != task.batch.inputs.input_ids.shape
    for got, want in zip(task.trace(batch, rows), plain, strict=True):
        near(got, want[rows], 1e-6)


def test_replicates_and_seeds(task, plain):
    """The first of three replicates is the only one of one; the others and another seed's are not."""
    p_clean, p_corrupt, ie, _ = task.trace(replicates=3)
    assert p_corrupt.shape == (4, 3) and ie.shape == (4, 3, 16)
    near(p_clean, plain[0], 1e-6)
    near(p_corrupt[:, 0], plain[1][:, 0], 1e-6)
    near(ie[:, 0], plain[2][:, 0], 1e-6)
    seeded = task.trace(seed=1)
    near(seeded[0], plain[0], 1e-6)
    draws = [*p_corrupt.T, seeded[1][:, 0]]
    assert min(np.abs(a - b).max() for n, a in enumerate(draws) for b in draws[:n]) > 0.01


def test_a_task_is_its_batches(task, plain):
    """Whatever the order of the examples, in the order of the examples."""
    args = (task.model, task.processor)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        found = trace_examples(*args, [task.examples[row] for row in order], TraceOptions(batch=4), "test")
        assert found.ids == [task.examples[row].id for row in order]
        near(found.p_clean, plain[0][order], 1e-6)
        near(found.te, (plain[0][:, None] - plain[1])[order], 1e-6)
        near(found.ie, plain[2][order], 1e-6)
        assert found.sigma == pytest.approx(task.survey.sigma["sequence"])


# Metrics


def test_log_probability(task, plain):
    p_clean, p_corrupt, ie, correct = task.trace(metric="log_probability")
    np.testing.assert_allclose(p_clean, np.log(plain[0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(p_corrupt, np.log(plain[1]), rtol=1e-4, atol=1e-5)
    patched = plain[1][..., None] + plain[2]
    np.testing.assert_allclose(ie, np.log(patched) - np.log(plain[1])[..., None], atol=1e-3)
    np.testing.assert_array_equal(correct, plain[3])


def gold_against_foil(task, foils):
    """Reads from logits the difference at the first token where the two answers, each followed by the end of the turn,
    are not the same."""
    tokenizer, ids = task.processor.tokenizer, np.asarray(task.batch.inputs.input_ids)
    places = []
    for row, other in enumerate(foils):
        begin, end = np.flatnonzero(task.batch.spans["answer"][row])[0], np.argmax(task.batch.spans["end"][row])
        tokens = [*tokenizer("\n" + other)["input_ids"][1:], ids[row, end]]
        shared = next(n for n, token in enumerate(tokens) if token != ids[row, begin + n])
        places.append((begin + shared, ids[row, begin + shared], tokens[shared], shared))
    at, gold, other, shared = map(np.array, zip(*places, strict=True))
    rows = np.arange(len(at))
    return lambda logits: np.asarray(logits)[rows, at - 1, gold] - np.asarray(logits)[rows, at - 1, other], shared


def test_logit_difference(task, by_hand):
    """Against a choice that shares the first token, one that shares none, one that goes on where the gold answer ends,
    and another sample's answer."""
    gold = [example.answers[0] for example in task.examples]
    longer = gold[2] + "1"
    choices = [(gold[0][0] + "0", gold[0]), (gold[1], "xylophone"), (gold[2], longer), None]
    examples = [dataclasses.replace(e, choices=c) for e, c in zip(task.examples, choices, strict=True)]
    with_choices = task._replace(examples=examples)
    foils = [foil(examples, row) for row in range(4)]
    assert foils[:3] == [gold[0][0] + "0", "xylophone", longer] and foils[3] in gold[:3]
    read, shared = gold_against_foil(task, foils)
    assert shared[:3].tolist() == [1, 0, len(gold[2])]
    p_clean, _, ie, correct = with_choices.trace(metric="logit_difference")
    near(p_clean, read(forward(task.model, task.batch.inputs)), 1e-4)
    for name, cell in (("L0-mlp", ("text.mlp_out", [0])), ("L7-attn", ("text.attn_out", [7]))):
        here = cells_of(task.model.config, TraceOptions()).index(name)
        near(ie[:, 0, here], by_hand(*cell, read=read), 1e-4)
    np.testing.assert_array_equal(correct, task.trace()[3])


def test_a_foil_is_never_right():
    def example(name, *answers, **fields):
        return Example(name, (), "?", answers, **fields)

    others = [example("x", "Dog"), example("y", "cat")]
    assert foil([example("own", "cat", "dog", choices=("Cat", "dog", "cow")), *others], 0) == "cow"
    assert foil([example("own", "dog"), *others], 0) == "cat"  # no choices
    assert foil([example("own", "dog", choices=("dog",)), *others], 0) == "cat"
    # Shown as letters, the choices are letters; asked without them, the right one is still no foil.
    assert foil([example("own", "A", choices=("cow", "cat"), gold=0), *others], 0) == "B"
    assert foil([example("own", "B", choices=("cow", "cat"), gold=1), *others], 0) == "A"
    assert foil([example("own", "pet", choices=("cat", "cow"), gold=0), *others], 0) == "cow"
    assert foil([example("own", "B", gold=1), example("x", "b"), example("y", "C")], 0) == "C"  # letters in a picture
    with pytest.raises(UserError, match="another answer than 'dog'"):
        foil([example("own", "dog"), others[0]], 0)


def test_a_foil_that_is_the_answer_is_refused(task):
    with pytest.raises(UserError, match="row 0 has its gold answer as its foil"):
        LogitDifference.of(task.batch.inputs, task.batch.spans["answer"], task.batch.inputs)


# Which samples, which gold answer


def test_correct_only_keeps_what_generation_says(task):
    """And the records of a trace say it of every sample."""
    examples = load_task("mini-docvqa", split="trace", limit=14)
    batch = encode(examples, task.processor, task.model.config)
    asked = encode(examples, task.processor, task.model.config, with_answer=False)
    said = np.asarray(vlm_jax.generate(task.model, asked.inputs, 2))
    gold = [batch.inputs.input_ids[row, span].tolist() for row, span in enumerate(batch.spans["answer"])]
    right = [tokens[: len(g)].tolist() == g for tokens, g in zip(said, gold, strict=True)]
    assert {len(g) for g in gold} == {2} and 2 < sum(right) < 12
    kept = interventions.trace.tracing.answered(task.model, task.processor, examples, 4)
    assert [e.id for e in kept] == [e.id for e, r in zip(examples, right, strict=True) if r]
    first = task.trace()[3]
    assert first.tolist() == [right[number] for number in (1, 3, 6, 7)]
    wrong = [dataclasses.replace(e, answers=("7000",)) for e in examples[:4]]
    with pytest.raises(UserError, match="answers no sample correctly"):
        trace_examples(task.model, task.processor, wrong, TraceOptions(correct_only=True, batch=4), "test")


def test_which_gold_answer():
    example = Example("e", (), "?", ("big cat", "cat", "a big cat", "big cat", "dog"))
    golds = {rule: with_gold_first(example, rule).answers[0] for rule in ("commonest", "shortest", "longest")}
    assert golds == {"commonest": "big cat", "shortest": "cat", "longest": "a big cat"}
    assert sorted(with_gold_first(example, "longest").answers) == sorted(example.answers)


def test_the_gold_answer_is_what_is_forced(task):
    examples = [dataclasses.replace(e, answers=(e.answers[0], e.answers[0] + "5")) for e in task.examples]
    longest = [dataclasses.replace(e, answers=e.answers[1:]) for e in examples]
    found = trace_examples(task.model, task.processor, examples, TraceOptions(gold="longest", batch=4), "test")
    batch = encode(longest, task.processor, task.model.config)
    near(found.p_clean, probability(forward(task.model, batch.inputs), batch))
    assert np.abs(found.p_clean - task.trace()[0]).max() > 0.1


# Options that cannot be


@pytest.mark.parametrize(
    "options, says",
    [
        ({"corruption": "question_nois"}, "unknown corruption.*did you mean 'question_noise'"),
        ({"sigma": "all"}, "unknown sigma 'all'.*vocabulary"),
        ({"metric": "logit_diff"}, "unknown metric.*'logit_difference'"),
        ({"gold": "first"}, "unknown gold.*shortest"),
        ({"statistic": "mean_ratios"}, "unknown statistic.*'mean_of_ratios'"),
        ({"batch": 0}, "--trace-batch is 0: give at least 1"),
        ({"replicates": 0}, "--replicates is 0"),
        ({"replicates": 2, "corruption": "mean_image"}, "mean_image is not random"),
        ({"replicates": 2, "corruption": "blurred_image"}, "drop --replicates"),
        ({"seed": -1}, "--trace-seed is -1"),
        ({"eps": -1e-8}, "--eps is -1e-08"),
        ({"noise_scale": 0.0}, "--noise-scale is 0.0: give a number above 0"),
        ({"noise_scale": float("nan")}, "--noise-scale is nan"),
        ({"window": 0}, "--window is 0: give at least 1"),
        ({"window": 9}, "window of 9 layers"),
        ({"positions": ()}, "--positions is empty"),
        ({"positions": ("last", "last")}, "last last: give.*each once"),
        ({"positions": ("questoin",)}, "did you mean 'question'"),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_impossible_options(options, says):
    with pytest.raises(UserError, match=says):
        TraceOptions(**options).check(DEPTH)


def test_possible_options():
    TraceOptions(corruption="swapped_image", replicates=2, window=8, positions=("question", "image+last")).check(DEPTH)


def test_what_only_the_samples_show(task):
    blind = [dataclasses.replace(e, images=()) for e in task.examples[:2]]
    for options, says in (
        ({"corruption": "mean_image"}, "needs images.*corrupt the question"),
        ({"positions": ("image",)}, "--positions image: no sample has such a token"),
    ):
        with pytest.raises(UserError, match=says):
            trace_examples(task.model, task.processor, blind, TraceOptions(batch=2, **options), "test")


# Summaries


def made_up(te, ie, tasks=None) -> TaskTrace:
    """One replicate; two cells."""
    te, ie = np.array(te, float), np.array(ie, float)
    tasks = ["one"] * len(te) if tasks is None else tasks
    ids = [str(number) for number in range(len(te))]
    correct = np.arange(len(te)) % 2 == 0
    return TaskTrace(ids, tasks, ["L0-attn", "L0-mlp"], 0.5 + te, np.full((len(te), 1), 0.5), ie[:, None], correct, 0.1)


def test_summary_of_a_family():
    """By every statistic, and of every task apart; a task of which no sample counts has no rates."""
    te = [0.5, 0.25, 0.125, 0.001, -0.1]
    ie = [[0.25, 0.5], [0.125, 0.0], [0.125, 0.125], [1.0, 1.0], [1.0, 1.0]]
    traced = made_up(te, ie, ["a", "a", "b", "c", "b"])
    want = {"mean_of_ratios": [2 / 3, 2 / 3], "median": [0.5, 1.0], "ratio_of_means": np.sum(ie, 0) / np.sum(te)}
    for statistic, rates in want.items():
        found = summarise(traced, TraceOptions(statistic=statistic))
        np.testing.assert_allclose(list(found["rr"].values()), rates, rtol=1e-5)
    found = summarise(traced, TraceOptions())
    assert (found["te_not_positive"], found["excluded_by_min_te"], found["correct"]) == (1, 2, 0.6)
    np.testing.assert_allclose(list(found["tasks"]["a"].values()), [0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(list(found["tasks"]["b"].values()), [1, 1], rtol=1e-5)
    assert set(found["tasks"]) == {"a", "b"}
    assert summarise(traced, TraceOptions(statistic="median"))["ranking"] == ["L0-mlp", "L0-attn"]


def test_summary_of_one_sample():
    """There are no halves whose rankings could be compared."""
    found = summarise(made_up([0.5], [[0.25, 0.5]]), TraceOptions())
    assert found["stability"] == [] and found["ranking"] == ["L0-mlp", "L0-attn"]
    with pytest.raises(UserError, match="TE"):
        summarise(made_up([0.005], [[0.25, 0.5]]), TraceOptions())


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five samples in batches of four, two replicates each."""
    out = tmp_path_factory.mktemp("run") / "trace"

    def go(**options):
        args = {"task": "mini-docvqa", "limit": 5, "batch": 4, "replicates": 2, "min_te": -1.0, "out": out} | options
        interventions.trace.__main__.main(interventions.trace.__main__.Args(**args))

    go()
    return out, go


FILES = ("samples.jsonl", "trace.parquet", "summary.parquet", "summary.json")


def test_files_of_a_run(run, tmp_path):
    out, _ = run
    config, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary"))
    fields = {field.name for field in dataclasses.fields(TraceOptions)}
    assert fields <= config.keys() and config["positions"] == ["all"] and config["corruption"] == "question_noise"
    assert json.loads((out / "manifest.json").read_text())["data"]["dataset"] == "miniworld"
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    ie = np.array([list(r["ie"].values()) for r in records]).swapaxes(1, 2)
    te = np.array([r["p_clean"] for r in records])[:, None] - np.array([r["p_corrupt"] for r in records])
    np.testing.assert_array_equal([r["te"] for r in records], te)
    assert ie.shape == (5, 2, 16) and summary["samples"] == 5 and summary["replicates"] == 2
    names = [f"L{layer}-{module}" for layer in range(8) for module in ("attn", "mlp")]
    rates = (ie.mean(1) / (te.mean(1) + 1e-8)[:, None]).mean(0)
    assert list(summary["rr"]) == names and all(list(r["ie"]) == names for r in records)
    np.testing.assert_allclose(list(summary["rr"].values()), rates, rtol=1e-6)
    assert summary["ranking"] == [names[i] for i in np.argsort(-rates, kind="stable")]
    assert {row["statistic"] for row in summary["cells"]} >= {"mean_of_ratios", "median"}
    assert all(row["replicates_low"] <= row["replicates_high"] for row in summary["cells"])
    assert summary["tasks"] == {"mini-docvqa": summary["rr"]}
    table = pq.read_table(out / "trace.parquet").to_pydict()
    assert len(table["ie"]) == 5 * 2 * 16 and set(table["cell"]) == set(names)
    by_id = {r["id"]: r for r in records}
    for at in (0, 100, 159):
        record, replicate = by_id[table["id"][at]], table["replicate"][at]
        assert table["ie"][at] == record["ie"][table["cell"][at]][replicate]
        assert table["te"][at] == record["te"][replicate]
    assert len(pq.read_table(out / "summary.parquet")) == len(summary["cells"])
    assert all((out / name).stat().st_size > 1000 for name in ("heatmap.png", "intervals.png"))
    check_run_folder(out, tmp_path)


def test_lines_have_question_answer_and_prediction(run, task):
    """The prediction is that of an evaluation. If it begins with other tokens than the answer, it is not correct."""
    records = [json.loads(line) for line in (run[0] / "samples.jsonl").read_text().splitlines()]
    examples = {example.id: example for example in load_task("mini-docvqa", split="trace", limit=5)}
    shown = [examples[record["id"]] for record in records]
    assert [(r["question"], r["answer"]) for r in records] == [(e.question, e.answers[0]) for e in shown]
    predicted = [record["prediction"] for record in records]
    assert predicted == answer(task.model, task.processor, shown, batch=4).texts
    for record in records:
        assert record["prediction"].startswith(record["answer"]) or not record["correct"]
    assert len({record["correct"] for record in records}) == 2


def test_predictions_where_an_intervention_needs_the_answer(task):
    """It has no prompt without an answer to act on."""
    width = task.model.config.text.hidden_size
    cut = ProjectOut.of(np.eye(width)[:1, None], {"text.resid_post": slots(DEPTH, [3])}, group="answer")
    assert predictions(task.model, task.processor, task.examples[:1], 4, (cut,)) == [None]


def test_lines_of_an_older_version_are_refused(tmp_path):
    old = {"id": "a", "p_clean": 0.5, "p_corrupt": [0.25], "ie": [[0.1]]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(old) + "\n")
    with pytest.raises(UserError, match="was written by an older version"):
        read_effects(tmp_path / "samples.jsonl")
    new = old | {"te": [0.25], "ie": {"L0-attn": [0.1], "L0-mlp": [0.2]}}
    (tmp_path / "samples.jsonl").write_text(json.dumps(new) + "\n")
    te, ie = read_effects(tmp_path / "samples.jsonl")
    assert te.tolist() == [[0.25]] and ie.tolist() == [[[0.1, 0.2]]]


def test_the_documented_list_of_artifacts(run):
    page = (Path(__file__).parents[3] / "docs/runs.md").read_text()
    documented = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1].replace("mini-okvqa", "mini-docvqa"))
    listing = json.loads((run[0] / "artifacts.json").read_text())
    assert documented["artifacts"] == listing["artifacts"]
    assert documented["schemas"].items() <= listing["schemas"].items()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(run, capsys):
    """Of a file that breaks off in the middle of a batch and of a line, whole batches are kept."""
    out, go = run
    whole = {name: (out / name).read_bytes() for name in FILES}
    lines = whole["samples.jsonl"].splitlines(keepends=True)
    for left in (b"".join(lines[:2]) + lines[2][:50], b"".join(lines), b"".join(lines[:4]) + lines[4][:50]):
        for name in FILES[1:]:
            (out / name).unlink()
        (out / "samples.jsonl").write_bytes(left)
        go()
        assert {name: (out / name).read_bytes() for name in FILES} == whole
    with pytest.raises(SystemExit):
        go(noise_scale=1.0)
    assert "noise_scale 2.0 there, 1.0 here" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in FILES} == whole
