"""P4, MRT: trains small editors of a frozen model's representations, and scores the model with and without them.

python -m train.edit --model mini-llava-align --train mini-docvqa mini-textvqa --out runs/edit
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from eval import judging as metrics
from eval.evaluation import AnswerOptions, evaluate
from interventions.editing.editors import editor_parameters
from interventions.editing.options import EditorOptions
from interventions.figures.base import save_figure
from interventions.figures.editing import before_and_after
from interventions.kinds.reft import Editor
from interventions.statistics import mean_interval, paired
from interventions.store import load_interventions, save_interventions
from train.artifacts import EDITING, training_log
from train.editors import EDITOR_LABELS, TrainingOptions, edited_tokens, train_editors
from train.loop import WATCHING, forget
from train.mixture import MixtureOptions
from vlm_jax import Model
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import easy_vqa, source
from vlm_jax.data.options import DataOptions
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.processes import fetch
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import load_tasks, start


@dataclasses.dataclass(frozen=True)
class Args(EditorOptions, TrainingOptions, MixtureOptions, metrics.MetricOptions, DataOptions, ModelOptions):
    """Train small editors of a frozen model's representations, and score the model with and without them.

    An editor changes the hidden state of some tokens in a subspace of a few dimensions. There are editors in the vision
    blocks, behind the projector, and on the first and last tokens of the text in the decoder's layers. This is MRT, the
    method of P4 (README.md). The labels for --label-lr and --label-decay are psi_V, psi_c, psi_P and psi_S, for the
    editors visual, cross, prefix and suffix; psi_PS with --tied; psi_M with --kind MoReS.
    """

    eval: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK [TASK ...]")] = ()
    """Tasks, families, datasets or JSONL files to score on; their test splits are used. By default the same as
    --train."""
    eval_limit: int | None = 300
    """Largest number of held-out examples of each task."""
    suffix: Literal["prompt", "published"] = "prompt"
    """Which tokens the suffix editor changes in training. prompt: the last ones of the prompt, as when the model
    answers; published: the last ones of the prompt with its answer, as in P4's released training code, though not when
    the model answers."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the editors' initial arrays and of the order of the training examples."""
    answering: tyro.conf.OmitArgPrefixes[AnswerOptions] = dataclasses.field(default_factory=AnswerOptions)
    out: Path = Path("runs/edit")
    """Folder for the results: editors.safetensors, which other commands take as --intervention, and the answers and
    scores from before and after. A stopped run with the same options continues there."""


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    args.check_editors()
    args.check_loop()
    mixture = args.mixture(args)
    train = list(itertools.chain(*mixture.values()))
    tasks = load_tasks(args.eval or args.train, split="test", limit=args.eval_limit, options=args)
    tested = list(itertools.chain(*tasks.values()))
    check_disjoint(train, tested)
    metrics.check_metric(tested, args)
    if args.suffix == "published" and "suffix" not in args.names:
        raise UserError("--suffix published needs the editor suffix, which is not trained here: drop it")
    args.check_labels([EDITOR_LABELS[name] for name in args.names])
    data = {"train": args.sources(args)}
    data["test"] = {name: source(name, split="test", options=args) for name in args.eval or args.train}

    def init(model: Model) -> dict[str, Editor]:
        return args.init(model, jax.random.key(args.seed))

    run, model, processor = start(
        args, [*train, *tested], data, check=lambda m: jax.eval_shape(lambda: init(m)), ignored=WATCHING
    )
    editors = init(model)

    def score(when: str, acting: tuple = ()) -> dict[str, dict]:
        return {
            task: evaluate(
                run,
                f"{when}/{task}/",
                model,
                processor,
                examples,
                args,
                args.answering,
                interventions=acting,
                title=f"{task} {when} training",
                label=f"{task} {when}",
            )
            for task, examples in tasks.items()
        }

    def make() -> tuple[Editor, ...]:
        begun = time.perf_counter()
        training = {"seed": args.seed, "folder": run.path("training/_").parent}
        mark = edited_tokens(editors, args.suffix == "published")
        trained = train_editors(model, processor, editors, train, args, mark=mark, **training)
        run.add("training/metrics.jsonl", training_log(f"{args.kind} editors"))
        run.timed("train", begun)
        return tuple(fetch(trained)[name] for name in sorted(trained))

    before = score("before")
    trained = run.once(
        "editors.safetensors",
        make,
        Artifact("intervention", f"{args.kind} editors of {args.model}, trained on {', '.join(mixture)}"),
        write=lambda path, made: save_interventions(path, made, model=fingerprint(model)),
        read=load_interventions,
    )
    forget(run.folder / "training", args)
    after = score("after", trained)
    results = {
        "kind": args.kind,
        "parameters": editor_parameters(editors),
        "trained": {task: len(examples) for task, examples in mixture.items()},
        "tasks": {
            task: {
                "before": mean_interval(before[task]["scores"]),
                "after": mean_interval(after[task]["scores"]),
                "change": paired(after[task]["scores"], before[task]["scores"], clusters=after[task]["clusters"]),
                "samples": after[task]["samples"],
            }
            for task in tasks
        },
    }
    run.save_json("results.json", results, Artifact("metrics", "Scores before and after the editors", EDITING))
    shown = {task: {when: found[when] for when in ("before", "after")} for task, found in results["tasks"].items()}
    save_figure(run, "accuracy", before_and_after, "Scores of every task before and after", accuracy=shown)
    show(results)
    easy_vqa.show_baseline(tested)
    print(f"{time.perf_counter() - started:.0f} s; the editors are {run.folder / 'editors.safetensors'}")


def show(results: dict) -> None:
    """Prints the numbers of trained parameters, and every task's score before and after."""
    parameters = results["parameters"]
    each = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
    print(f"{results['kind']}: {sum(parameters.values()):,} trained parameters ({each})")
    print(f"{'task':20s} before  after [95 %]             change [95 %]")
    for task, found in results["tasks"].items():
        before, after, change = found["before"], found["after"], found["change"]
        now = f"{after['mean']:.3f} [{after['low']:.3f}, {after['high']:.3f}]"
        moved = f"{change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        print(f"{task:20s} {before['mean']:.3f}   {now}   {moved}")


if __name__ == "__main__":
    main(tyro.cli(Args))
