"""What eval.accuracy writes: lmms-eval's keys, files that repeat byte for byte, refusals before any work."""

import json
from pathlib import Path

import pytest
from PIL import Image

import eval.accuracy
from eval.evaluation import score_answers
from eval.judging import METRICS, MetricOptions
from eval.results import file_name, lmms_eval_results, lmms_eval_samples
from vlm_jax.data import Example


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """The same run twice."""
    folders = [tmp_path_factory.mktemp("results") / name for name in "ab"]
    for out in folders:
        how = {"metric": "anls", "limit": 6, "batch": 6, "max_new_tokens": 4}
        eval.accuracy.main(eval.accuracy.Args(task="perception", out=out, **how))
    return folders


def test_keys_of_lmms_eval(folders):
    results = json.loads((folders[0] / "results.json").read_text())
    tasks = {"mini-docvqa", "mini-infovqa", "mini-textvqa"}
    for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"):
        assert set(results[key]) == tasks
    for task in tasks:
        values = results["results"][task]
        assert set(values) == {"alias", "anls,none", "anls_stderr,none"}
        lines = [json.loads(line) for line in (folders[0] / f"samples_{task}.jsonl").read_text().splitlines()]
        assert [line["doc_id"] for line in lines] == [0, 1]
        assert values["anls,none"] == sum(line["anls"] for line in lines) / 2 == results["tasks"][task]["accuracy"]
        assert results["n-samples"][task] == {"original": None, "effective": 2}
        for line in lines:
            assert set(line) == {"doc_id", "id", "target", "input", "resps", "filtered_resps", "doc_hash", "anls"}
            assert line["input"].startswith("You are a visual question answering system.")
            assert len(line["doc_hash"]) == 64
    assert results["higher_is_better"]["mini-docvqa"] == {"anls": True}
    assert results["config"]["model_args"] == "pretrained=mini-qwen3-vl,steps=all"
    assert results["metric_options"] == {"normalisation": "lower", "multi_gold": "any", "choices": "listed"}


def test_a_repeated_run_writes_the_same_bytes(folders):
    one, two = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "seconds.json"}
        for folder in folders
    )
    assert one == two and sum(len(path.parts) == 1 for path in one) == 10 and one[Path(".lock")] == b""


def test_doc_hash_covers_what_an_example_holds():
    def hashed(**change):
        fields = {"id": "1", "images": (Image.new("RGB", (4, 4)),), "question": "?", "answers": ("x",), "task": "t"}
        example = Example(**fields | change)
        judged = METRICS["exact_match"].judge(example, "x", MetricOptions())
        return lmms_eval_samples([example], ["?"], ["x"], [judged], MetricOptions())["t"][0]["doc_hash"]

    changes = [{}, {"question": "!"}, {"answers": ("y",)}, {"images": (Image.new("RGB", (4, 4), "red"),)}, {"id": "2"}]
    assert len({hashed(**change) for change in changes}) == len(changes)
    assert hashed() == hashed()


def test_values_of_a_task_with_two_metrics():
    """Every metric's values stand side by side; of the yes-ratio neither direction is better."""
    examples = [
        Example("1", (), "?", ("yes",), task="t", metric="pope"),
        Example("2", (), "?", ("cat",), task="t", metric="exact_match"),
    ]
    options = MetricOptions("task")
    found = score_answers(examples, ["yes", "dog"], options)
    samples = lmms_eval_samples(examples, ["?", "?"], ["yes", "dog"], found.judged, options)
    made = lmms_eval_results(found.summaries, samples, config={}, task_config={}, original={"t": 2})
    assert made["results"]["t"]["exact_match,none"] == 0 and made["results"]["t"]["pope_accuracy,none"] == 1
    assert made["higher_is_better"]["t"]["pope_yes_ratio"] is None and made["higher_is_better"]["t"]["exact_match"]
    assert [line.get("pope", line.get("exact_match")) for line in samples["t"]] == [1, 0]
    assert found.results["accuracy"] == 0.5


def test_score_is_exact_match_by_default():
    examples = [Example(str(i), (), "?", ("cat",), task=task) for i, task in enumerate("aab")]
    results, records, *_ = score_answers(examples, ["Cat.", "dog", "cat"])
    assert (results["accuracy"], results["samples"]) == (2 / 3, 3)
    assert results["stderr"] == pytest.approx((2 / 3 * 1 / 3 / 3) ** 0.5)
    assert {task: part["accuracy"] for task, part in results["tasks"].items()} == {"a": 0.5, "b": 1}
    assert [record["correct"] for record in records] == [True, False, True]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"metric": "exact"}, "did you mean 'exact_match'"),
        ({"metric": "yes_no"}, "neither yes nor no"),
        ({"metric": "multiple_choice"}, "has no choices"),
    ],
    ids=lambda value: value.get("metric") if isinstance(value, dict) else "",
)
def test_refused_before_the_model_is_loaded(tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as stop:
        eval.accuracy.main(
            eval.accuracy.Args(model="no-such-model", task="mini-docvqa", limit=2, out=tmp_path / "out", **options)
        )
    assert stop.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_file_names():
    assert file_name("docvqa_val") == "docvqa_val" and file_name("a/b c") == "a_b_c"
