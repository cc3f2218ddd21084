"""Fine-tunes whole parts of a model, such as its text decoder, on a task. The other parts do not change.

python -m train.tune --train mini-docvqa --out runs/tune
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from eval import judging as metrics
from eval.evaluation import AnswerOptions, evaluate
from interventions.statistics import interval_text
from train.kept import tuned_model
from train.loop import WATCHING, LoopOptions, fit
from train.meter import About
from train.objective import Epochs, LabelOptions, adamw, model_loss, scaled_rate, warmup_cosine
from train.subsets import TRAINABLE_PARTS, ByPart, check_trainable
from vlm_jax import Model
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.data import Example, easy_vqa, source
from vlm_jax.data.options import DataOptions
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import own_rows
from vlm_jax.processor import Processor
from vlm_jax.prompts import Fitted, fitted, room_of
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import BATCH, RATE, Range
from vlm_jax.runs.startup import load_examples, start

#: A common peak learning rate for full fine-tuning of a model of width 2560.
_LR = 2e-5


@dataclasses.dataclass(frozen=True)
class Args(LabelOptions, LoopOptions, metrics.MetricOptions, DataOptions, ModelOptions):
    """Fine-tune whole parts of a model on a task, and score the model on held-out examples before and after.

    The labels for --label-lr and --label-decay are the trained parts: text, visual, registers.
    """

    train: str = "mini-docvqa"
    """Task, family, dataset or JSONL file to train on."""
    eval: str | None = None
    """Task, family, dataset or JSONL file to score on; its test split is used. By default the same as --train."""
    limit: Annotated[int | None, Range(least=1)] = 3000
    """Largest number of training examples."""
    eval_limit: Annotated[int | None, Range(least=1)] = 300
    """Largest number of held-out examples."""
    parts: Annotated[tuple[Literal["text", "visual", "registers"], ...], tyro.conf.arg(metavar="PART [PART ...]")] = (
        "text",
    )
    """The parts to train. text: the text decoder with its embeddings; visual: the vision tower with the projector;
    registers: the embeddings of its registers alone, if they have any of their own (train.register)."""
    epochs: Annotated[int, Range(least=1)] = 3
    """Number of passes over all training examples."""
    batch: Annotated[int, BATCH] = 16
    """Training examples in a step."""
    lr: Annotated[float | None, RATE] = None
    """Peak learning rate of the optimiser AdamW. The rate rises from 0 to the peak, then falls to 0 along a cosine. By
    default 2e-5 x 2560 / WIDTH, where WIDTH is the model's hidden size."""
    warmup: Annotated[float, Range(least=0, below=1)] = 1 / 30
    """Share of the steps in which the learning rate rises."""
    decay: Annotated[float, Range(least=0, most=100)] = 0.0
    """Weight decay of AdamW."""
    betas: Annotated[tuple[float, float], Range(least=0, below=1)] = (0.9, 0.999)
    """How much AdamW's means of the gradients and of their squares keep from one step to the next."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the random order of the training examples."""
    answering: tyro.conf.OmitArgPrefixes[AnswerOptions] = dataclasses.field(default_factory=AnswerOptions)
    save_every: Annotated[int, Range(least=1)] = 200
    """Number of steps from one checkpoint to the next. A stopped run continues from the last checkpoint."""
    out: Path = Path("runs/tune")
    """Folder for the results: the tuned model in model/ (a Hugging Face folder), and the answers and scores from before
    and after the training. A stopped run with the same options continues there."""


def check_parts(model: Model, args: Args) -> None:
    """Refuses parts that the model lacks, and labels that are not among the parts."""
    parts = sorted({name.partition(".")[0] for name in named_leaves(model)})
    parts += ["registers"] * (model.text.register_embeddings is not None)
    if missing := set(args.parts) - set(parts):
        raise UserError(f"the model has no part {sorted(missing)[0]!r}: it has {', '.join(parts)}")
    args.check_labels(args.parts)
    if set(args.parts) - {"registers"}:
        check_trainable(model)


def tune(model: Model, processor: Processor, examples: list[Example], args: Args, folder: Path | None = None) -> Model:
    """The model after its parts ``args.parts`` were trained on the examples. Checkpoints are written to ``folder``."""
    check_parts(model, args)
    epochs = Epochs(len(examples), args.epochs, args.batch, seed=args.seed)
    room, process_rows = room_of(examples, processor, model.config), own_rows(args.batch)

    def step_batch(step: int) -> Fitted:
        rows = epochs.rows(step)[0, process_rows]
        batch = fitted([examples[row] for row in rows], room, processor, model.config, process_rows)
        return jax.tree.map(lambda a: a[None], batch._replace(inputs=batch.inputs.turned()))

    lr = args.lr if args.lr is not None else scaled_rate(_LR, model.config.text.hidden_size)
    warmup = max(1, int(args.warmup * epochs.steps + 1e-9))
    schedule = functools.partial(warmup_cosine, steps=epochs.steps, warmup=warmup)
    optimiser = functools.partial(adamw, betas=args.betas)
    transforms, rates = args.optimisers(args.parts, lr, schedule, optimiser, args.decay)
    about = About(
        rate=rates,
        ids=lambda step: [examples[row].id for row in epochs.rows(step)[0]],
        tokens=args.batch * room.length,
    )
    trained = fit(
        model_loss,
        model,
        step_batch,
        transforms,
        ByPart(args.parts),
        steps=epochs.steps,
        rows=args.batch,
        seed=args.seed,
        clip=1.0,
        name="tune",
        folder=folder,
        options=args,
        about=about,
    )
    return trained.params


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    task = args.eval or args.train
    examples = load_examples(args.train, split="train", limit=args.limit, options=args)
    test = load_examples(task, split="test", limit=args.eval_limit, options=args)
    check_disjoint(examples, test)
    metrics.check_metric(test, args)
    args.check_loop()
    if not args.parts:
        raise UserError(f"--parts is empty: choose from {', '.join(TRAINABLE_PARTS)}")
    sources = {"train": args.train, "test": task}
    data = {split: source(name, split=split, options=args) for split, name in sources.items()}
    check = functools.partial(check_parts, args=args)
    run, model, processor = start(args, [*examples, *test], data, check=check, ignored=WATCHING, shown=test)

    def score(name: str, model: Model) -> dict:
        title = f"{task} {name} training"
        return evaluate(run, f"{name}/", model, processor, test, args, args.answering, title=title, label=name)

    def train(folder: Path) -> Model:
        return tune(model, processor, examples, args, folder)

    before = score("before", model)
    title = f"{args.model}, its {' and '.join(args.parts)} tuned on {args.train}"
    tuned = tuned_model(run, "model", title, processor, train, args, args)
    after = score("after", tuned)
    for name, result in (("before", before), ("after", after)):
        print(f"{task} {name}: {interval_text(result, 'accuracy')}  ({result['samples']} samples)")
    easy_vqa.show_baseline(test)
    print(f"{time.perf_counter() - started:.0f} s; the tuned model is {run.folder / 'model'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
