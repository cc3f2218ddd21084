"""Answer, score and keep: once, and the same as answering and scoring by hand."""

import json

import jax
import pytest

import eval.accuracy
import vlm_jax
from eval import evaluation
from eval.evaluation import AnswerOptions, answer, answer_and_score, evaluate, score_answers
from eval.judging import MetricOptions, clusters_of
from interventions import Gate
from interventions.placement.adapters import init_lora, merge, save_peft
from interventions.placement.combine import combine
from vlm_jax.data import load_task
from vlm_jax.runs.folder import Run

ANSWERING = AnswerOptions(batch=4, max_new_tokens=3)


@pytest.fixture(scope="module")
def task():
    return *vlm_jax.load("mini-qwen3-vl"), load_task("mini-docvqa", split="test", limit=4)


def lines(run: Run, name: str) -> list[dict]:
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def test_what_is_kept_equals_answering_and_scoring_by_hand(task, tmp_path):
    run = Run.open(tmp_path / "run", {})
    result = evaluate(run, "before/", *task, MetricOptions(), ANSWERING, title="DocVQA", label="docvqa")
    texts = answer(*task, batch=4, max_new_tokens=3).texts
    expected = score_answers(task[2], texts)
    assert [line["answer"] for line in lines(run, "before/predictions.jsonl")] == texts
    assert lines(run, "before/samples.jsonl") == expected.records
    assert result == {
        **expected.results,
        "scores": [record["score"] for record in expected.records],
        "clusters": clusters_of(task[2]).tolist(),
    }
    assert json.loads((run.folder / "before/score.json").read_text()) == result
    assert "evaluate before" in json.loads((run.folder / "seconds.json").read_text())


def test_a_finished_evaluation_is_read_and_a_stopped_one_goes_on_from_its_answers(task, tmp_path, monkeypatch):
    result = evaluate(Run.open(tmp_path / "run", {}), "", *task, MetricOptions(), ANSWERING, title="DocVQA")
    monkeypatch.setattr(vlm_jax, "generate", lambda *args, **options: pytest.fail("answered again"))
    monkeypatch.setattr(evaluation, "answer", lambda *args, **options: pytest.fail("read no score"))
    assert evaluate(Run.open(tmp_path / "run", {}), "", *task, MetricOptions(), ANSWERING, title="DocVQA") == result
    monkeypatch.setattr(evaluation, "answer", answer)
    (tmp_path / "run/score.json").unlink()
    assert evaluate(Run.open(tmp_path / "run", {}), "", *task, MetricOptions(), ANSWERING, title="DocVQA") == result


def test_interventions_change_the_answers(task, tmp_path):
    model = task[0]
    depth = model.config.text.num_hidden_layers
    cut = (Gate.cut(depth, range(depth)),)
    runs = [Run.open(tmp_path / name, {}) for name in ("plain", "cut")]
    plain, under = (
        answer_and_score(run, "", *task, MetricOptions(), ANSWERING, title="DocVQA", interventions=interventions)
        for run, interventions in zip(runs, ((), cut), strict=True)
    )
    assert plain.answers.texts != under.answers.texts
    assert under.answers.texts == answer(*task, cut, batch=4, max_new_tokens=3).texts
    assert jax.tree.leaves(plain.scored.results) != jax.tree.leaves(under.scored.results)


def test_the_command_adds_up_adapters(task, tmp_path, capsys):
    """Of the decoder and of the vision tower; their weights matter, and DoRA is merged alone."""
    model, processor, examples = task
    make = {"r": 2, "alpha": 64.0, "dropout": 0.0}
    loras = [
        init_lora(model, [name], **make, key=jax.random.key(i), use_dora=dora)
        for i, (name, dora) in enumerate([("L2-mlp", False), ("V1-attn", False), ("L5-attn", True)])
    ]
    loras = [lora.replace(weights=jax.tree.map(lambda w: w + 0.3, lora.weights)) for lora in loras]
    for i, lora in enumerate(loras):
        save_peft(lora, model, tmp_path / f"adapter{i}")
    folders = [tmp_path / f"adapter{i}" for i in range(3)]

    def answers(folders, weights=()):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        options = {"task": "mini-docvqa", "limit": 4, "max_new_tokens": 3, "batch": 4, "out": out}
        eval.accuracy.main(eval.accuracy.Args(**options, adapter=tuple(folders), adapter_weights=weights))
        capsys.readouterr()
        return [json.loads(line)["answer"] for line in (out / "predictions.jsonl").read_text().splitlines()]

    def by_hand(lora):
        return answer(merge(model, lora), processor, examples, batch=4, max_new_tokens=3).texts

    got = answers(folders[:2], (0.5, -1.5))
    assert got == by_hand(combine(loras[:2], (0.5, -1.5))) != by_hand(combine(loras[:2], (1, 1)))
    assert answers(folders[2:]) == by_hand(loras[2]) != answers([])
