"""P3: TaLo. Which layers hurt a task, and what does cutting one at test time change? (methods: arXiv 2602.01167)

python -m interventions.talo --task mini-okvqa mini-docvqa --out runs/talo

The model runs once, in :func:`tabulate`, which makes a table of the samples that are right under every cut. All else
is computed from that table by :mod:`interventions.talo.selection`.
"""

import itertools

import numpy as np
import tyro

from interventions.statistics import interval_text
from interventions.store import save_interventions
from interventions.talo.artifacts import RESULTS, SAMPLES, TABLE
from interventions.talo.options import Args
from interventions.talo.report import compare, records, task_report
from interventions.talo.selection import BASE, layer_name
from interventions.talo.tables import TaskTable, layer_cut, subtask, tabulate
from vlm_jax import Model
from vlm_jax.data import Example, source
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.startup import load_tasks, start


def check_sizes(tasks: dict[str, list[Example]], args: Args) -> None:
    """Refuses a task that has too few samples to choose a layer on some and to evaluate it on others."""
    for label, examples in tasks.items():
        try:
            args.check(len(examples))
        except UserError as error:
            raise UserError(f"{label}: {error}") from None


def show(results: dict, args: Args) -> None:
    """Prints two tables: the chosen layers and their gains, and how reliable such choices are."""

    def span(part: dict) -> str:
        return interval_text(part, sign="+")

    print(f"{f'cut: {args.cut}':18s} base  layer   on {args.shot:2d}+   on the others [95 %]")
    for label, r in results.items():
        print(f"{label:16s} {r['base']:6.3f}  {r['layer']:5s}  {r['probe_gain']:+6.3f}   {span(r['eval_gain'])}")
    print(
        f"\n{f'{args.draws} probe sets':16s} on them  on the others [95 %]     minus a random layer     stable  "
        "best of all     p"
    )
    for label, r in results.items():
        over, best = r["over_probe_sets"], r["best_of_all"]
        print(
            f"{label:16s} {over['probe_gain']:+7.3f}  {span(over['held_out'])}  {span(over['over_random'])}  "
            f"{over['stability']:6.2f}  {layer_name(best['layer']):>3s} {best['delta']:+.3f}  {best['p']:6.3f}"
        )
    print()


@command
def main(args: Args) -> None:
    loaded = load_tasks(args.task, split=args.split, limit=args.limit, options=args)
    check_sizes(loaded, args)
    data = {name: source(name, split=args.split, options=args) for name in args.task}

    def check(model: Model) -> None:
        args.layers(model.config.text.num_hidden_layers)

    run, model, processor = start(args, itertools.chain(*loaded.values()), data, check=check)
    model, acting = args.applied(run, model, args.model)
    tasks, results, lines = {}, {}, []
    for label, examples in loaded.items():

        def make(label=label, examples=examples) -> dict:
            options = {"interventions": acting, "batch": args.batch, "label": label}
            base, correct = tabulate(model, processor, examples, args.cut, **options)
            return {"base": base, "correct": correct}

        strata = np.array([subtask(example) for example in examples])
        table = Artifact("arrays", f"{label}: which samples are right under every cut", TABLE)
        tasks[label] = TaskTable(examples, **run.once(f"{label}/table.npz", make, table), strata=strata)
        results[label], choice = task_report(tasks[label], args)
        lines += [{"task": label, **record} for record in records(tasks[label], choice)]
        if choice.layer != BASE:
            cut = layer_cut(model.config.text.num_hidden_layers, choice.layer, args.cut)
            run.write(
                f"{label}/cut.safetensors",
                lambda path, cut=cut: save_interventions(path, (cut,)),
                Artifact("intervention", f"{label}: the cut that TaLo chose, layer {choice.layer}"),
            )
    run.save_lines("samples.jsonl", lines, Artifact("samples", "Every sample under every cut", SAMPLES))
    halves = compare(run, tasks, args)
    content = {"metric": "forced_greedy", "tasks": results, "halves": halves}
    run.save_json("results.json", content, Artifact("metrics", "Chosen layers and their gains", RESULTS))
    show(results, args)
    for half in halves:
        stability = f"in {half['together']:.2f} of resamples or more" if len(half["names"]) > 1 else "the only one"
        print(f"alike ({args.similarity}; {stability}): {', '.join(half['names'])}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
