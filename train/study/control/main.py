"""P4's study of controllability: how often the answer is turned, and what else changes."""

import itertools
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from eval.tables import Table
from interventions.statistics import accuracy, interval_text
from train.loop import WATCHING
from train.study.artifacts import CONTROL_SUMMARY
from train.study.control.options import Args
from train.study.control.places import PLACES, check_grid
from train.study.control.study import CLASSES, Control, begun, pictures_of
from train.subsets import check_trainable
from vlm_jax import Model
from vlm_jax.data import source
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.processes import progress
from vlm_jax.runs.startup import start

#: The measures of a condition, in the order of the table.
MEASURES = ("fixed question turned", "rewordings turned", "another class unchanged", "own question unchanged")


def run_control(args: Args) -> None:
    """Runs every task, class and condition, and prints and writes the report."""
    began = time.perf_counter()
    args.check_loop()
    args.check_tasks()
    pictures = {task: pictures_of(task) for task in args.tasks}
    every = [example for both in pictures.values() for split in both for example, _ in split[:50]]
    data = {task: source(task) for task in args.tasks}

    def check(model: Model) -> None:
        check_grid(model)
        check_trainable(model)
        jax.eval_shape(lambda: begun(model, args.rank, jax.random.key(0)))

    run, model, processor = start(args, every, data, check=check, ignored=WATCHING)
    rows = []
    for task in args.tasks:
        control = Control(args, run, task, pictures[task], model, processor).base()
        turned = CLASSES[task][0]
        unedited = {name: control.answers(name, None) for name in turned}
        rows += [{"task": task, "condition": "unedited", "right": right(itertools.chain(*unedited.values()))}]
        cells = list(itertools.product(PLACES, turned))
        found: dict[str, dict[str, list[float]]] = {}
        for condition, name in progress(cells, desc=task, unit="cell"):
            values = measure(control.answers(name, condition), unedited[name])
            for measured, value in values.items():
                found.setdefault(condition, {}).setdefault(measured, []).extend(value)
        for condition, values in found.items():
            rows.append({"task": task, "condition": condition, **{m: _interval(v) for m, v in values.items()}})
    content = {"rows": rows}
    run.save_json("summary.json", content, Artifact("metrics", "Answers turned and unchanged", CONTROL_SUMMARY))
    cells = [(row["task"], row["condition"], *(_span(row[m]) for m in MEASURES)) for row in rows if "right" not in row]
    table = Table(("pictures", "edited", *MEASURES), cells)
    table.save(run, "tables/control", "How often answers are turned and unchanged")
    for row in rows:
        if "right" in row:
            print(f"{row['task']}: unedited, right answers: {_span(row['right'])}")
    print(f"\n{table.markdown()}")
    print(f"{time.perf_counter() - began:.0f} s; tables and editors are in {args.out}")


def right(records: Iterable[dict]) -> dict:
    """How often the unedited model answers the questions about classes as is true."""
    scores: dict[str, list[float]] = {}
    for record in records:
        if record["kind"] != "own question":
            scores.setdefault(record["picture"], []).append(float(record["answer"] == record["true"]))
    return accuracy([np.mean(values) for values in scores.values()])


def measure(edited: Sequence[dict], unedited: Sequence[dict]) -> dict[str, list[float]]:
    """The scores of one class under a condition: for each measure, the mean of each picture's questions.

    An answer is turned if the unedited model gave the true one and the edited model gives the other. It is unchanged if
    both give the same. Of the questions about classes only those count that the unedited model answers right.
    """
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in MEASURES}
    for now, before in zip(edited, unedited, strict=True):
        assert now["id"] == before["id"], "both asked the same"
        if before["answer"] != before["true"] and now["kind"] != "own question":
            continue
        name = {"fixed": 0, "another class": 2, "own question": 3}.get(now["kind"], 1)
        expected = {"yes": "no", "no": "yes"}[now["true"]] if name < 2 else before["answer"]
        scores[MEASURES[name]].setdefault(now["picture"], []).append(float(now["answer"] == expected))
    return {name: [float(np.mean(values)) for values in of.values()] for name, of in scores.items()}


def _interval(values: list[float]) -> dict:
    """The mean over pictures and its interval; None where no question counts."""
    return accuracy(values) if values else {"mean": None, "low": None, "high": None}


def _span(found: dict) -> str:
    if found["mean"] is None:
        return "-"
    return interval_text(found)
