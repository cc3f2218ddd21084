"""P1's Registering: tunes a model so that text reads pictures only through the registers behind them.

python -m train.register --registers 4 --train mini-okvqa mini-docvqa --out runs/register
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated

import jax
import tyro

from eval import judging as metrics
from eval.evaluation import AnswerOptions, evaluate
from interventions.figures.base import save_figure
from interventions.figures.editing import before_and_after
from interventions.statistics import mean_interval, paired
from train.artifacts import REGISTERING, training_log
from train.loop import WATCHING, forget
from train.mixture import MixtureOptions
from train.registering import RegisterOptions, train_registers, trained_parameters
from vlm_jax import Model, save
from vlm_jax.data import easy_vqa, source
from vlm_jax.data.options import DataOptions
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.processes import fetch, is_first
from vlm_jax.runs.startup import load_tasks, start


@dataclasses.dataclass(frozen=True)
class Args(RegisterOptions, MixtureOptions, metrics.MetricOptions, DataOptions):
    """Tune a model so that text reads pictures only through a few register tokens behind them (P1, section 4), and
    score it three times: as it is, with registers but not tuned, and tuned.

    The vision tower and the projector stay as they are. Every command takes the tuned model as --model, registers
    included; vlm_jax.generate can then drop the pictures' keys and values after the prompt (docs/registers.md).
    """

    eval: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = ()
    """Tasks, families, datasets or JSONL files to score on; their test splits are used. By default the same as
    --train."""
    eval_limit: int | None = 300
    """Largest number of held-out examples of each task."""
    answering: tyro.conf.OmitArgPrefixes[AnswerOptions] = dataclasses.field(default_factory=AnswerOptions)
    out: Path = Path("runs/register")
    """Folder for the results: the tuned model in model/, a Hugging Face folder with registers.json, and the answers and
    scores. A stopped run with the same options continues there."""


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    args.check_loop()
    mixture = args.mixture(args)
    train = list(itertools.chain(*mixture.values()))
    tasks = load_tasks(args.eval or args.train, split="test", limit=args.eval_limit, options=args)
    tested = list(itertools.chain(*tasks.values()))
    check_disjoint(train, tested)
    metrics.check_metric(tested, args)
    data = {"train": args.sources(args)}
    data["test"] = {name: source(name, split="test", options=args) for name in args.eval or args.train}
    run, model, processor = start(args, [*train, *tested], data, ignored=WATCHING)

    def score(when: str, model: Model) -> dict[str, dict]:
        return {
            task: evaluate(
                run,
                f"{when}/{task}/",
                model,
                processor,
                examples,
                args,
                args.answering,
                title=f"{task} {when}",
                label=f"{task} {when}",
            )
            for task, examples in tasks.items()
        }

    def make_model() -> Model:
        begun = time.perf_counter()
        tuned = train_registers(model, processor, train, args, run.path("training/_").parent)
        run.add("training/metrics.jsonl", training_log(f"{args.model} with registers"))
        run.timed("train", begun)
        return fetch(tuned, keep=is_first()) if jax.process_count() > 1 else tuned

    scores = {"before": score("before", model.with_registers(None)), "untuned": score("untuned", model)}
    tuned = run.once(
        "model",
        make_model,
        Artifact("model", f"{args.model} with {args.registers} registers, tuned on {', '.join(mixture)}"),
        write=lambda path, tuned: (save(tuned, path), processor.save_pretrained(path)),
        read=lambda path: args.load_model(str(path))[0],
    )
    forget(run.folder / "training", args)
    scores["after"] = score("after", tuned)
    registers = model.config.text.registers
    assert registers is not None, "RegisterOptions.load gives the model registers"
    results = {
        "registers": dataclasses.asdict(registers),
        "parameters": trained_parameters(model, args),
        "trained": {task: len(examples) for task, examples in mixture.items()},
        "tasks": {
            task: {
                **{when: mean_interval(of[task]["scores"]) for when, of in scores.items()},
                "change": paired(
                    scores["after"][task]["scores"],
                    scores["before"][task]["scores"],
                    clusters=scores["after"][task]["clusters"],
                ),
                "samples": scores["after"][task]["samples"],
            }
            for task in tasks
        },
    }
    run.save_json("results.json", results, Artifact("metrics", "Scores without and with registers", REGISTERING))
    shown = {task: {when: found[when] for when in scores} for task, found in results["tasks"].items()}
    save_figure(run, "accuracy", before_and_after, "Scores without registers, untuned and tuned", accuracy=shown)
    show(results)
    easy_vqa.show_baseline(tested)
    print(f"{time.perf_counter() - started:.0f} s; the tuned model is {run.folder / 'model'}")


def show(results: dict) -> None:
    """Prints the number of trained parameters, and every task's scores."""
    registers = results["registers"]
    print(f"{registers['count']} registers, mask {registers['mask']}: {results['parameters']:,} trained parameters")
    print(f"{'task':20s} before  untuned  tuned [95 %]             change [95 %]")
    for task, found in results["tasks"].items():
        after, change = found["after"], found["change"]
        now = f"{after['mean']:.3f} [{after['low']:.3f}, {after['high']:.3f}]"
        moved = f"{change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        print(f"{task:20s} {found['before']['mean']:.3f}   {found['untuned']['mean']:.3f}    {now}   {moved}")


if __name__ == "__main__":
    main(tyro.cli(Args))
