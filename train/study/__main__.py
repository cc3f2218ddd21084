"""P0's study with every model, placement and seed, and with statistics that separate real differences from chance.

python -m train.study --recipe p0 --out runs/study
"""

import dataclasses
import time

import tyro

from train.loop import WATCHING
from train.study.cost import Estimate
from train.study.options import Args, check_options, conditions
from train.study.report import report
from train.study.study import examples_by_split, experiments, run_study
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import easy_vqa, source
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run, run_manifest


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    check_options(args)
    examples, results, plans = examples_by_split(args), {}, []
    run = Run.open(args.out, args, ignored=("plan", *WATCHING))
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


if __name__ == "__main__":
    main(tyro.cli(Args))
