"""P1's Registering: tunes a model so that text reads pictures only through the registers behind them.

python -m train.register --registers 4 --train mini-okvqa mini-docvqa --out runs/register
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from eval import judging as metrics
from eval.evaluation import AnswerOptions
from interventions.figures.base import save_figure
from interventions.figures.editing import before_and_after
from train.artifacts import REGISTERING
from train.kept import tuned_model
from train.loop import WATCHING
from train.mixture import MixtureOptions
from train.registering import RegisterOptions, train_registers, trained_parameters
from train.scored import MixedData, compared, score_tasks, show_tasks
from vlm_jax import Model
from vlm_jax.data import easy_vqa
from vlm_jax.data.options import DataOptions
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import start


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
    eval_limit: Annotated[int | None, Range(least=1)] = 300
    """Largest number of held-out examples of each task."""
    answering: tyro.conf.OmitArgPrefixes[AnswerOptions] = dataclasses.field(default_factory=AnswerOptions)
    out: Path = Path("runs/register")
    """Folder for the results: the tuned model in model/, a Hugging Face folder with registers.json, and the answers and
    scores. A stopped run with the same options continues there."""


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    args.check_loop()
    data = MixedData.read(args)
    run, model, processor = start(args, [*data.train, *data.tested], data.sources, ignored=WATCHING, shown=data.tested)

    def train(folder: Path) -> Model:
        return train_registers(model, processor, data.train, args, folder)

    scores = {
        "before": score_tasks(run, "before", data.tasks, model.with_registers(None), processor, args),
        "untuned": score_tasks(run, "untuned", data.tasks, model, processor, args),
    }
    title = f"{args.model} with {args.registers} registers, tuned on {', '.join(data.mixture)}"
    tuned = tuned_model(run, "model", title, processor, train, args, args)
    scores["after"] = score_tasks(run, "after", data.tasks, tuned, processor, args)
    registers = model.config.text.registers
    assert registers is not None, "RegisterOptions.load gives the model registers"
    results = {
        "registers": dataclasses.asdict(registers),
        "parameters": trained_parameters(model, args),
        "trained": {task: len(examples) for task, examples in data.mixture.items()},
        "tasks": compared(scores),
    }
    run.save_json("results.json", results, Artifact("metrics", "Scores without and with registers", REGISTERING))
    shown = {
        task: {when: found[when] | {"folders": [f"{when}/{task}"]} for when in scores}
        for task, found in results["tasks"].items()
    }
    save_figure(run, "accuracy", before_and_after, "Scores without registers, untuned and tuned", accuracy=shown)
    show(results)
    easy_vqa.show_baseline(data.tested)
    print(f"{time.perf_counter() - started:.0f} s; the tuned model is {run.folder / 'model'}")


def show(results: dict) -> None:
    """Prints the number of trained parameters, and every task's scores."""
    registers = results["registers"]
    print(f"{registers['count']} registers, mask {registers['mask']}: {results['parameters']:,} trained parameters")
    show_tasks(results["tasks"], ("before", "untuned", "after"))


if __name__ == "__main__":
    main(tyro.cli(Args))
