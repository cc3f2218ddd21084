"""The study: what it runs, how it names and compares, what its tables say. Cells themselves run in test_killed.py."""

import csv
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from run_folders import check_run_folder

from eval.evaluation import AnswerOptions
from eval.tables import Table
from interventions.modules import folder_name, module_names
from interventions.placement import rules
from interventions.placement.scores import ModuleScore
from interventions.trace.options import TraceOptions
from interventions.trace.result import TaskTrace, summarise
from train.study import experiment as experiments
from train.study.experiment import Experiment
from train.study.placement import report as reports
from train.study.placement.options import Args, check_options, conditions
from train.study.placement.recipes import RECIPES
from train.study.placement.report import Outcomes, comparisons, predictions, report
from train.study.placement.study import examples_by_split
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.ranges import check_ranges

DEPTH, FAMILIES = 4, ["knowledge", "perception"]
NAMES = module_names(DEPTH)


# What is run


def test_every_placement_is_compared_at_the_first_k_and_the_sweep_at_all():
    found = conditions(Args(k=(2, 5)), DEPTH)
    first = [c for c in found if c.k == 2]
    assert [c.placement for c in first] == list(RECIPES["p0"].placements)
    assert [c.placement for c in found if c.k == 5] == list(RECIPES["p0"].swept)


def test_the_recipe_names_placements_that_there_are_and_a_new_one_does_not_enlarge_it(monkeypatch):
    before = conditions(Args(), DEPTH)
    assert len(RECIPES["p0"].placements) == 15 and set(RECIPES["p0"].placements) <= set(rules.PLACEMENTS)
    monkeypatch.setattr(rules, "PLACEMENTS", dict(rules.PLACEMENTS))
    rules.placement("newest", "the last layer")(lambda scoring, family, k, seed: ["L3-attn"])
    assert "newest" in rules.PLACEMENTS and conditions(Args(), DEPTH) == before
    assert {c.placement for c in conditions(Args(placements=("newest",)), DEPTH)} >= {"newest"}  # if it is asked for


def test_seeds_of_choices_and_of_training():
    args = Args(seeds=(7, 8), random_seeds=(42, 43, 44))
    runs = {(c.placement, c.k): c.runs for c in conditions(args, 8)}
    assert runs["task_diff", 2] == ((0, 7), (0, 8))
    assert runs["random", 2] == ((42, 7), (43, 8), (44, 7))


def test_default_k_is_the_papers_share():
    assert {c.k for c in conditions(Args(), 8)} == {2, 4}
    assert {c.k for c in conditions(Args(), 36)} == {10, 20}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"families": ("knowledge",)}, "two"),
        ({"families": ("knowledge", "knowledge")}, "two"),
        ({"models": ("a/mini", "b/mini")}, "two folders of the same name"),
        ({"seeds": ()}, "--seeds"),
        ({"random_seeds": (1, 1)}, "--random-seeds"),
        ({"placements": ("task_dif",)}, "task_diff"),
    ],
)
def test_refusals(changed, message):
    with pytest.raises(UserError, match=message):
        check_options(Args(**changed))


def test_a_family_with_too_few_examples_is_refused(monkeypatch):
    monkeypatch.setattr(
        "train.study.placement.study.load_examples", lambda name, split, limit, options: ["example"] * min(limit, 5)
    )
    with pytest.raises(UserError, match="perception has 5 examples to eval, not 6: lower --eval"):
        examples_by_split(Args(families=("perception", "knowledge"), trace=5, train=5, eval=6))


def test_answers_need_a_token():
    with pytest.raises(UserError, match="--max-new-tokens is 0"):
        check_ranges(Args(answering=AnswerOptions(max_new_tokens=0)))


def test_k_out_of_range():
    with pytest.raises(UserError, match="k is 9"):
        conditions(Args(k=(9,)), DEPTH)


def test_cells_are_named_by_their_modules():
    assert folder_name(["L1-mlp", "L0-attn"], DEPTH) == folder_name(["L0-attn", "L1-mlp"], DEPTH) == "L0-attn+L1-mlp"
    assert folder_name(NAMES, DEPTH) == "all"
    long = folder_name(module_names(36)[:20], 36)
    assert long.startswith("20-") and len(long) < 20
    assert long != folder_name(module_names(36)[1:21], 36)


def test_the_papers_numbers():
    """Against the selections' sizes and the accuracies' order in the paper's text."""
    recipe = RECIPES["p0"]
    for families in recipe.selected.values():
        assert all(len(set(modules)) == 10 for modules in families.values())
        assert all(set(modules) <= set(module_names(recipe.modules // 2)) for modules in families.values())
    for reported in recipe.reported.values():
        for family in FAMILIES:
            accuracy = {name: values[family] for name, values in reported.items()}
            assert max(accuracy, key=accuracy.get) == "all" and min(accuracy, key=accuracy.get) == "baseline"
            assert accuracy["shared"] < accuracy["task_diff"] < accuracy["random"]


@pytest.mark.parametrize(
    ("needs", "given"),
    [((), []), (("trained adapter",), ["trained"]), (("corruption", "fresh adapter"), ["corrupts", "fresh"])],
)
def test_a_score_gets_what_it_says_that_it_needs(monkeypatch, tmp_path, needs, given):
    received = []

    def compute(model, groups, *provided):
        received.extend(provided)
        return np.zeros((1, 2))

    monkeypatch.setattr(experiments, "SCORES", {"new": ModuleScore(compute, needs)})
    monkeypatch.setattr(experiments, "corrupter", lambda *args: "corrupts")
    monkeypatch.setattr(experiments, "batches", lambda *args, **options: [])
    monkeypatch.setattr(Experiment, "_fresh_adapter", lambda self: "fresh")
    monkeypatch.setattr(Experiment, "_trained_adapter", lambda self, family: "trained")
    model, run = SimpleNamespace(config=None), Run.open(tmp_path / "run", {})
    examples = [{"knowledge": []}] * 3
    experiment = Experiment(run, "", model, None, *examples, TraceOptions(), None, None, None)
    assert experiment.scores("new", "knowledge").tolist() == [[0, 0]] and received == given


# How placements are compared


def record(family, placement, k, names, seed, scores):
    mean = float(np.mean(scores))
    found = {"accuracy": mean, "stderr": 0.01, "samples": len(scores), "scores": list(map(float, scores)), "tasks": {}}
    found["clusters"] = list(range(len(scores)))
    return {
        "family": family,
        "placement": placement,
        "k": k,
        "names": names,
        "seed": seed,
        "parameters": len(names) + sum("mlp" in name for name in names),
        **found,
    }


def made(gain: float, samples: int = 400) -> dict:
    """A study of one model in which task_diff is better than random by ``gain``, and LoRA helps where RR is high."""
    rng = np.random.default_rng(0)
    rr = {family: rng.normal(size=(DEPTH, 2)) for family in FAMILIES}
    records = []
    for family in FAMILIES:
        ease = rng.random(samples)

        def scores(accuracy, ease=ease):
            return ease + 0.1 * rng.normal(size=samples) < accuracy

        records.append(record(family, "baseline", 0, [], 0, scores(0.4)))
        for seed in (0, 1):
            records.append(record(family, "all", 2, NAMES, seed, scores(0.7)))
            records.append(record(family, "random", 2, NAMES[:2], seed, scores(0.5)))
            records.append(record(family, "task_diff", 2, NAMES[2:4], seed, scores(0.5 + gain)))
            records.append(record(family, "shared", 2, NAMES[4:6], seed, scores(0.5)))
        for name, value in zip(NAMES, rr[family].ravel(), strict=True):
            records.append(record(family, "alone", 1, [name], 0, scores(0.5 + 0.08 * value)))
    return {"depth": DEPTH, "records": records, "scores": {"rr": {f: rr[f].tolist() for f in FAMILIES}}}


def test_a_planted_difference_is_found_and_none_where_there_is_none():
    for gain, expected in ((0.2, True), (0.0, False)):
        found = comparisons(Outcomes(made(gain), FAMILIES))
        p = {(row["placement"], row["family"]): row["p_holm"] for row in found if row["against"] == "random"}
        assert (p["task_diff", "knowledge"] < 0.01) == expected
        assert (p["task_diff", "both"] < 0.01) == expected
        assert p["shared", "knowledge"] > 0.05


def test_comparisons_by_hand():
    known = Outcomes(made(0.2), FAMILIES)
    row = next(r for r in comparisons(known) if (r["placement"], r["family"]) == ("task_diff", "both"))
    first, second = ([known.scores(f, name, 2) for f in FAMILIES] for name in ("task_diff", "random"))
    first, second = np.concatenate(first, 1), np.concatenate(second, 1)
    assert row["difference"] == pytest.approx(first.mean() - second.mean())
    assert row["gained"] == ((first[0] == 1) & (second[0] == 0)).sum()
    assert row["lost"] == ((first[0] == 0) & (second[0] == 1)).sum()


def test_predictions_tell_where_lora_helps():
    found = predictions(Outcomes(made(0.0), FAMILIES), made(0.0)["scores"])
    assert all(found[family]["spearman"]["rr"] > 0.7 for family in FAMILIES)
    shuffled = {
        "rr": {f: np.random.default_rng(3).permutation(np.ravel(made(0.0)["scores"]["rr"][f])) for f in FAMILIES}
    }
    found = predictions(Outcomes(made(0.0), FAMILIES), shuffled)
    assert all(abs(found[family]["spearman"]["rr"]) < 0.7 for family in FAMILIES)


# What is written


@pytest.fixture
def written(tmp_path):
    """The report of a made study on made traces, and its run folder."""
    run = Run.open(tmp_path / "run", {"a": 1})
    options, rng = TraceOptions(), np.random.default_rng(1)
    for family in FAMILIES:
        te = rng.uniform(0.2, 0.6, (20, 1))
        ie = te[..., None] * rng.uniform(0, 1, (20, 1, len(NAMES)))
        ids = [f"{family}/{i}" for i in range(20)]
        clean = np.full(20, 0.7)
        traced = TaskTrace(ids, ["one", "two"] * 10, NAMES, clean, clean[:, None] - te, ie, clean > 0, 0.5)
        run.save_json(f"mini/trace/{family}/summary.json", summarise(traced, options), Artifact("metrics", family))
        records = [
            {"id": i, "te": te[n].tolist(), "ie": dict(zip(NAMES, ie[n].T.tolist(), strict=True))}
            for n, i in enumerate(ids)
        ]
        run.save_lines(f"mini/trace/{family}/samples.jsonl", records, Artifact("samples", family))
    return run.folder, report(run, {"mini": made(0.2)}, Args(corruptions=()))


def test_report_writes_tables_and_figures(written, tmp_path):
    folder, text = written
    assert "task_diff, k = 2" in text and "better than as many random modules (Holm): task_diff, k = 2 (+0." in text
    for name in ("table1", "table2", "table3", "comparisons"):
        assert all((folder / f"tables/mini/{name}.{ending}").stat().st_size > 50 for ending in ("md", "csv", "tex"))
    for name in ("figure2", "figure3", "figure4", "intervals", "stability", "placements", "alone"):
        assert (folder / f"figures/mini/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"figures/mini/{name}.pdf").read_bytes().startswith(b"%PDF")
    check_run_folder(folder, tmp_path / "redrawn")
    summary = json.loads((folder / "summary.json").read_text())["mini"]
    assert {row["placement"] for row in summary["comparisons"]} == {"task_diff", "shared"}


def test_table_1_has_the_papers_columns_and_our_means(written):
    folder, _ = written
    with open(folder / "tables/mini/table1.csv", newline="") as file:
        rows = {row["LoRA on"]: row for row in csv.DictReader(file)}
    known = Outcomes(made(0.2), FAMILIES)
    assert rows["task_diff, k = 2"]["knowledge"].startswith(f"{known.scores('knowledge', 'task_diff', 2).mean():.3f} [")
    assert rows["all modules"]["Qwen3-VL-4B (paper), knowledge / perception"] == "0.614 / 0.818"
    assert rows["random, k = 2"]["knowledge less random"] == "-"


def test_table_3_ranks_by_the_difference_of_normalised_rr(written):
    folder, _ = written
    with open(folder / "tables/mini/table3.csv", newline="") as file:
        rows = {row["family"]: row for row in csv.DictReader(file)}
    one, other = (np.array(made(0.2)["scores"]["rr"][f]) for f in FAMILIES)
    difference = (one / one.max() - other / other.max()).ravel()
    for name in NAMES[2:4]:
        assert f"{name} ({difference[NAMES.index(name)]:+.2f})" in rows["knowledge"]["modules (k = 2)"]


def test_table_in_three_forms(tmp_path):
    run = Run.open(tmp_path / "run", {"a": 1})
    Table(("a_b", "n"), [("x|y", "1")]).save(run, "t", "A table")
    assert (run.folder / "t.csv").read_text() == "a_b,n\nx|y,1\n"
    assert r"a\_b & n \\" in (run.folder / "t.tex").read_text()
    assert (run.folder / "t.md").read_text().splitlines()[1] == "| --- | --- |"


def test_findings_name_only_what_is_sure():
    known = Outcomes(made(0.0), FAMILIES)
    lines = reports.findings(known, comparisons(known), {})
    assert lines and all(line.endswith("none.") or "exclude" in line for line in lines)


def test_args_are_frozen_data():
    assert dataclasses.asdict(Args())["training"]["batch"] == 8
