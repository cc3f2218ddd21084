"""P4, MRT: trains small editors of a frozen model's representations, and scores the model with and without them.

python -m train.edit --model mini-llava-align --train mini-docvqa mini-textvqa --out runs/edit
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from eval import judging as metrics
from eval.evaluation import AnswerOptions
from interventions.editing.editors import editor_parameters
from interventions.editing.options import EditorOptions
from interventions.figures.base import save_figure
from interventions.figures.editing import before_and_after
from interventions.kinds.reft import Editor
from train.artifacts import EDITING
from train.editors import EDITOR_LABELS, TrainingOptions, edited_tokens, train_editors
from train.kept import trained_interventions
from train.loop import WATCHING
from train.mixture import MixtureOptions
from train.scored import MixedData, compared, score_tasks, show_tasks
from vlm_jax import Model
from vlm_jax.data import easy_vqa
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import start


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
    eval_limit: Annotated[int | None, Range(least=1)] = 300
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
    data = MixedData.read(args)
    if args.suffix == "published" and "suffix" not in args.names:
        raise UserError("--suffix published needs the editor suffix, which is not trained here: drop it")
    args.check_labels([EDITOR_LABELS[name] for name in args.names])

    def init(model: Model) -> dict[str, Editor]:
        return args.init(model, jax.random.key(args.seed))

    run, model, processor = start(
        args,
        [*data.train, *data.tested],
        data.sources,
        check=lambda m: jax.eval_shape(lambda: init(m)),
        ignored=WATCHING,
        shown=data.tested,
    )
    editors = init(model)

    def train(folder: Path) -> dict[str, Editor]:
        mark = edited_tokens(editors, args.suffix == "published")
        return train_editors(model, processor, editors, data.train, args, mark=mark, seed=args.seed, folder=folder)

    scores = {"before": score_tasks(run, "before", data.tasks, model, processor, args)}
    title = f"{args.kind} editors of {args.model}, trained on {', '.join(data.mixture)}"
    trained = trained_interventions(run, "editors.safetensors", title, model, train, args)
    scores["after"] = score_tasks(run, "after", data.tasks, model, processor, args, trained)
    results = {
        "kind": args.kind,
        "parameters": editor_parameters(editors),
        "trained": {task: len(examples) for task, examples in data.mixture.items()},
        "tasks": compared(scores),
    }
    run.save_json("results.json", results, Artifact("metrics", "Scores before and after the editors", EDITING))
    shown = {
        task: {when: found[when] | {"folders": [f"{when}/{task}"]} for when in scores}
        for task, found in results["tasks"].items()
    }
    save_figure(run, "accuracy", before_and_after, "Scores of every task before and after", accuracy=shown)
    show(results)
    easy_vqa.show_baseline(data.tested)
    print(f"{time.perf_counter() - started:.0f} s; the editors are {run.folder / 'editors.safetensors'}")


def show(results: dict) -> None:
    """Prints the numbers of trained parameters, and every task's score before and after."""
    parameters = results["parameters"]
    each = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
    print(f"{results['kind']}: {sum(parameters.values()):,} trained parameters ({each})")
    show_tasks(results["tasks"], ("before", "after"))


if __name__ == "__main__":
    main(tyro.cli(Args))
