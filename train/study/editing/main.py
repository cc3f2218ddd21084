"""P4's study: the editors against parts of themselves, other sizes and places, LoRA and full tuning."""

import itertools
import time

from eval import judging as metrics
from train.loop import WATCHING
from train.study.editing.options import Args
from train.study.editing.report import report
from train.study.editing.study import Study
from train.subsets import check_trainable
from vlm_jax.data import easy_vqa, source
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.runs.processes import progress
from vlm_jax.runs.startup import load_tasks, start


def run_study(args: Args) -> None:
    """Runs every condition with every seed, and prints and writes the report."""
    began = time.perf_counter()
    args.check_loop()
    conditions, mixture = args.chosen(), args.mixture(args)
    trained = list(itertools.chain(*mixture.values()))
    tasks = load_tasks(args.eval, split="test", limit=args.eval_limit, options=args)
    tested = list(itertools.chain(*tasks.values()))
    trained_on = {example.task for example in trained}
    if not trained_on & {example.task for example in tested}:
        raise UserError("--eval has none of the tasks of --train, on which the conditions are compared: add one")
    check_disjoint(trained, tested)
    metrics.check_metric(tested, args)
    data = {"train": args.sources(args)}
    data["test"] = {name: source(name, split="test", options=args) for name in args.eval}
    run, model, processor = start(
        args, [*trained, *tested], data, check=check_trainable, ignored=WATCHING, shown=tested
    )
    study = Study(args, run, model, processor, trained, tested)
    todo = [(condition, seed) for condition in conditions for seed in args.seeds]
    cells: dict = {condition: [] for condition in conditions}
    for condition, seed in progress(todo, desc="study", unit="cell"):
        if condition.name == "zero-shot" and cells[condition]:
            continue  # nothing is trained, so another seed would be the same
        cells[condition].append(study.cell(condition, seed))
    print(report(run, cells, tested, metrics.clusters_of(tested), trained_on))
    for examples in tasks.values():
        easy_vqa.show_baseline(examples)
    print(f"{time.perf_counter() - began:.0f} s; tables, figures and what was trained are in {args.out}")
