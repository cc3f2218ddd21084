"""P0's study with every model, placement and seed, and with statistics that separate real differences from chance."""

import dataclasses
import functools
import time

from train.loop import WATCHING
from train.study.placement.cost import Estimate
from train.study.placement.options import Args, check_options, conditions
from train.study.placement.report import report
from train.study.placement.study import examples_by_split, experiments, run_study
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import easy_vqa, source
from vlm_jax.runs.folder import Run, run_manifest
from vlm_jax.runs.pictures import save_pictures


def run_placements(args: Args) -> None:
    """Runs the study on every model, and prints and writes the report."""
    started = time.perf_counter()
    check_options(args)
    examples, results, plans = examples_by_split(args), {}, []
    run = Run.open(args.out, args, ignored=("plan", *WATCHING))
    tested = [example for part in examples[-1].values() for example in part]
    run.when_begun = functools.partial(save_pictures, examples=tested)
    run.pin("data", {family: source(family, split="train", options=args) for family in args.families})
    for experiment in experiments(args, run, *examples):
        for kind in (args.tracing.corruption, *args.corruptions):
            dataclasses.replace(args.tracing, corruption=kind).check(experiment.depth)
        if args.plan:
            plans.append(Estimate.of(experiment, conditions(args, experiment.depth), args))
            continue
        experiment.check()
        run.pin(f"{experiment.folder}model", fingerprint(experiment.model))
        described = run_manifest(experiment.model.config, experiment.processor)
        run.save_json(f"{experiment.folder}manifest.json", described, None)
        results[experiment.folder.rstrip("/")] = run_study(args, experiment)
    if args.plan:
        print("\n".join(map(str, plans)))
        return
    print(report(run, results, args))
    for tested in examples[-1].values():
        easy_vqa.show_baseline(tested)
    print(f"{time.perf_counter() - started:.0f} s; tables, figures, adapters and predictions are in {args.out}")
