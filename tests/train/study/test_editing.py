"""P4's study: what it compares, what its report says, and one small run of it."""

import json

import jax
import numpy as np
import pytest
from run_folders import check_run_folder

import vlm_jax
from interventions.editing.options import EditorOptions
from train.study import __main__ as command
from train.study.editing.options import Args
from train.study.editing.recipes import FULL, RECIPES, Condition
from train.study.editing.report import parts_of, report
from train.study.editing.study import Cell, Study
from vlm_jax import UserError
from vlm_jax.data import load_task
from vlm_jax.runs.folder import Run


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_begin_with_the_method_and_name_no_condition_twice(recipe):
    names = [condition.name for condition in RECIPES[recipe]]
    assert names[0] == FULL and len(set(names)) == len(names)
    model = vlm_jax.load("mini-llava")[0]
    for condition in RECIPES[recipe]:
        if condition.editors is not None:  # each can be made for the embedded model
            jax.eval_shape(lambda condition=condition: condition.editors.init(model, jax.random.key(0)))


def test_the_hours_recipe_has_what_the_paper_ablates():
    names = {condition.name for condition in RECIPES["p4"]}
    assert {f"without {editor}" for editor in ("visual", "cross", "prefix", "suffix")} <= names
    assert {f"{editor} alone" for editor in ("visual", "cross", "prefix", "suffix")} <= names
    assert {"length 2", "length 10", "all layers", "published suffix", "zero-shot"} <= names
    assert sum(name.startswith("LoRA") for name in names) == 3 and "whole decoder" in names
    assert names <= {condition.name for condition in RECIPES["p4-full"]}
    assert {"NoReFT", "DiReFT", "ConsReFT", "LobiReFT", "NodiReFT", "MoReS"} <= {c.name for c in RECIPES["p4-full"]}


def test_some_conditions_are_chosen_with_the_method():
    chosen = Args(conditions=("length 2",)).chosen()
    assert [condition.name for condition in chosen] == [FULL, "length 2"]
    assert len(Args().chosen()) == len(RECIPES["p4"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"conditions": ("lenght 2",)}, "recipe p4 has no condition 'lenght 2'; did you mean 'length 2'"),
        ({"seeds": ()}, "--seeds needs at least one number"),
        ({"seeds": (1, 1)}, "none twice"),
    ],
)
def test_refused_options(options, says):
    with pytest.raises(UserError, match=says):
        Args(**options).chosen()


def test_the_recipe_decides_the_options(monkeypatch):
    def chosen(*words):
        monkeypatch.setattr("sys.argv", ["study", *words])
        return command.options()

    assert chosen("--recipe", "p4", "--limit", "8") is Args and chosen("--recipe=p4-full") is Args
    assert chosen() is chosen("--recipe", "p0") is command.PlacementArgs
    with pytest.raises(SystemExit):
        chosen("--recipe", "p5")
    assert chosen("--recipes", "p4") is command.PlacementArgs


def test_a_study_without_a_trained_task_to_compare_on_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(Args(train=("mini-vsr",), eval=("digits",), limit=4, eval_limit=4, out=tmp_path / "run"))
    assert "--eval has none of the tasks of --train" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tested():
    return [e for task in ("mini-okvqa", "mini-vsr", "digits") for e in load_task(task, split="test", limit=20)]


def test_columns_of_the_table(tested):
    parts = parts_of(tested, {"mini-okvqa", "mini-vsr"})
    assert list(parts) == ["trained tasks", "their held-out wordings", "digits"]
    assert parts["trained tasks"].sum() == 40 and parts["digits"].sum() == 20
    asked = [tested[i].question for i in np.flatnonzero(parts["their held-out wordings"])]
    familiar = [tested[i].question for i in np.flatnonzero(parts["trained tasks"] & ~parts["their held-out wordings"])]
    assert asked and all("this creature" not in question for question in asked)
    assert any("this creature" in question for question in familiar)


def test_the_report_compares_with_the_method(tested, tmp_path):
    """Scores whose differences are known."""
    rng = np.random.default_rng(0)
    full = (rng.random((2, len(tested))) < 0.6).astype(float)
    worse = full * (rng.random(full.shape) < 0.5)
    conditions = [Condition(FULL, "method", EditorOptions()), Condition("worse", "a section", EditorOptions())]
    conditions.append(Condition("zero-shot", "baseline"))
    cells = {
        conditions[0]: [Cell(100, scores, 0.5, 0.1) for scores in full],
        conditions[1]: [Cell(50, scores, 0.25, 0.1) for scores in worse],
        conditions[2]: [Cell(0, np.zeros(len(tested)), None, None)],
    }
    run = Run.open(tmp_path / "run", Args())
    run.begin()
    table = report(run, cells, tested, np.arange(len(tested)), {"mini-okvqa", "mini-vsr"})
    rows = {row["condition"]: row for row in json.loads((run.folder / "summary.json").read_text())["rows"]}
    known = slice(0, 40)
    assert rows[FULL]["accuracy"]["trained tasks"]["mean"] == pytest.approx(full[:, known].mean())
    difference = rows["worse"]["minus_full"]
    assert difference["difference"] == pytest.approx(worse[:, known].mean() - full[:, known].mean())
    assert difference["low"] < difference["difference"] < difference["high"] <= 0
    assert difference["p_holm"] >= difference["p"] and "minus_full" not in rows[FULL]
    assert rows["zero-shot"]["accuracy"]["digits"]["mean"] == 0 and rows["zero-shot"]["step_seconds"] is None
    assert table.count("\n") == 5 and "| worse | 50 |" in table and "| zero-shot | 0 |" in table
    check_run_folder(run.folder, tmp_path)


def test_a_small_lora_is_as_large_as_the_editors():
    model, processor = vlm_jax.load("mini-llava")
    study = Study(Args(), None, model, processor, [], [])  # no run: nothing is trained
    (small,) = (c for c in RECIPES["p4"] if c.lora == "as large as MRT")
    lora = study._begun(small, 0)["lora"]
    count, wanted = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (
        lora.weights, [e.weights for e in EditorOptions().init(model, jax.random.key(0)).values()]))  # fmt: skip
    assert abs(count - wanted) <= 0.5 * 448 * 8 and lora.sites == {"text.self_attn.q_proj", "text.self_attn.v_proj"}


@pytest.mark.slow
def test_a_small_study(tmp_path, capsys):
    """Every kind of condition once: editors, LoRA in both towers, the whole decoder, nothing."""
    names = ("published suffix", "LoRA, decoder and tower", "whole decoder", "zero-shot")
    args = Args(
        train=("mini-okvqa", "mini-vsr"), eval=("mini-okvqa", "digits"), limit=8, eval_limit=4, epochs=1, batch=4,
        seeds=(0,), conditions=names, out=tmp_path / "run",
    )  # fmt: skip
    command.main(args)
    rows = json.loads((args.out / "summary.json").read_text())["rows"]
    assert [row["condition"] for row in rows] == [FULL, "published suffix", "zero-shot", *names[1:3]]
    assert [row["parameters"] for row in rows] == [12_850, 12_850, 0, 1_638_400, 1_509_504]
    check_run_folder(args.out, tmp_path)
    chart = json.loads((args.out / "figures/conditions.json").read_text())["chart"]
    assert all((args.out / folder).is_dir() for row in chart["rows"] for folder in row["folders"])
    before = (args.out / "summary.json").read_bytes()
    command.main(args)  # nothing is left to do
    assert (args.out / "summary.json").read_bytes() == before and "| MRT | 12,850 |" in capsys.readouterr().out
