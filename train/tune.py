"""Fine-tunes whole parts of a model, such as its text decoder, on a task; the other parts stay as they are.

python -m train.tune --train mini-docvqa --out runs/tune
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from eval import judging as metrics
from eval.evaluation import AnswerOptions, evaluate
from train.loop import WATCHING, LoopOptions, fit, forget
from train.meter import About
from train.trunk import answer_loss
from vlm_jax import Model, save
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.data import Example, easy_vqa, load_task, source
from vlm_jax.data.options import DataOptions
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.mesh.sharding import own_rows
from vlm_jax.prompts import Fitted, fitted, room_of
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.processes import fetch, is_first
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import start

#: Of a model's pytree: the vision tower holds the projector too.
PARTS = ("text", "visual")
#: A common rate of full fine-tuning at P0's width; narrower models get more, as for LoRA.
_LR, _LR_WIDTH = 2e-5, 2560


@dataclasses.dataclass(frozen=True)
class Args(LoopOptions, metrics.MetricOptions, DataOptions, ModelOptions):
    """Fine-tune parts of a model on a task, and score it on held-out examples before and after."""

    train: str = "mini-docvqa"
    """Task, family, dataset or JSONL file to train on."""
    eval: str | None = None
    """Task, family, dataset or JSONL file to score on. By default that of --train, whose test split is used."""
    limit: int | None = 3000
    """Largest number of training examples."""
    eval_limit: int | None = 300
    """Largest number of held-out examples."""
    parts: Annotated[tuple[Literal["text", "visual"], ...], tyro.conf.arg(metavar="PART [PART ...]")] = ("text",)
    """What is trained. text: the decoder with its embeddings; visual: the vision tower with its projector."""
    epochs: Annotated[int, Range(least=1)] = 3
    """How often all training examples are seen."""
    batch: Annotated[int, Range(least=1)] = 16
    """Training examples of a step."""
    lr: float | None = None
    """Peak learning rate of AdamW, after a warm-up; it falls to 0 along a cosine. By default 2e-5 at width 2560, times
    2560 / width."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the order of the data."""
    answering: tyro.conf.OmitArgPrefixes[AnswerOptions] = dataclasses.field(default_factory=AnswerOptions)
    save_every: Annotated[int, Range(least=1)] = 200
    """Steps between checkpoints. A stopped run goes on from the last one."""
    out: Path = Path("runs/tune")
    """Run folder: model/ (a Hugging Face folder), scores before and after, samples."""


@flax.struct.dataclass
class Rest:
    """A model without its trained parts: the arrays by name, and how the whole is put together."""

    leaves: dict[str, jax.Array]
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    structure: jax.tree_util.PyTreeDef = flax.struct.field(pytree_node=False)

    def joined(self, trained: dict[str, jax.Array]) -> Model:
        return self.structure.unflatten([{**self.leaves, **trained}[name] for name in self.names])


def split(model: Model, parts: tuple[str, ...]) -> tuple[dict[str, jax.Array], Rest]:
    """The arrays of these parts by name, and the rest.

    Raises:
        UserError: for a part that the model lacks.
    """
    leaves = named_leaves(model)
    label = {name: name.partition(".")[0] for name in leaves}
    if missing := set(parts) - set(label.values()):
        raise UserError(
            f"the model has no part {sorted(missing)[0]!r}: it has {', '.join(sorted(set(label.values())))}"
        )
    trained = {name: leaf for name, leaf in leaves.items() if label[name] in parts}
    rest = {name: leaf for name, leaf in leaves.items() if name not in trained}
    return trained, Rest(rest, tuple(leaves), jax.tree.structure(model))


def loss(trained: dict[str, jax.Array], rest: Rest, batch: Fitted, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of the gold tokens and the end of their turn. The batch's inputs are
    :meth:`Inputs.turned`."""
    model, inputs = rest.joined(trained), batch.inputs.turned()
    x, _ = model.hidden(inputs, remat=True)
    target = jnp.take_along_axis(inputs.input_ids, batch.index, 1)
    return answer_loss(model, x, batch.index, batch.valid, target)


@functools.cache
def optimiser(lr: float, steps: int) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule(lr, steps), weight_decay=0.0))


def schedule(lr: float, steps: int) -> optax.Schedule:
    """A short warm-up to ``lr``, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, lr, max(1, steps // 30), steps)


def tune(model: Model, processor, examples: list[Example], args: Args, folder: Path | None = None) -> Model:
    """The model with ``args.parts`` trained on the examples; checkpoints go to ``folder``."""
    per_epoch = max(1, len(examples) // args.batch)
    steps = per_epoch * args.epochs
    room, own = room_of(examples, processor, model.config), own_rows(args.batch)

    def rows_of(step: int) -> np.ndarray:
        rng = np.random.default_rng([args.seed, step // per_epoch])
        order = np.resize(rng.permutation(len(examples)), per_epoch * args.batch).reshape(per_epoch, -1)
        return order[step % per_epoch]

    def step_batch(step: int) -> Fitted:
        batch = fitted([examples[row] for row in rows_of(step)[own]], room, processor, model.config, own)
        return jax.tree.map(lambda a: a[None], batch._replace(inputs=batch.inputs.turned()))

    trained, rest = split(model, args.parts)
    lr = args.lr if args.lr is not None else _LR * _LR_WIDTH / model.config.text.hidden_size
    about = About(
        rate=schedule(lr, steps),
        ids=lambda step: [examples[row].id for row in rows_of(step)],
        tokens=args.batch * room.length,
    )
    tuned = fit(
        loss,
        trained,
        rest,
        step_batch,
        optimiser(lr, steps),
        steps=steps,
        rows=args.batch,
        seed=args.seed,
        label="tune",
        folder=folder,
        options=args,
        about=about,
    )
    return rest.joined(tuned)


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    task = args.eval or args.train
    train = load_task(args.train, split="train", limit=args.limit, options=args)
    test = load_task(task, split="test", limit=args.eval_limit, options=args)
    check_disjoint(train, test)
    metrics.check(test, args)
    args.check_loop()
    if not args.parts:
        raise UserError(f"--parts names none: choose from {', '.join(PARTS)}")
    sources = {"train": args.train, "test": task}
    data = {split: source(name, split=split, options=args) for split, name in sources.items()}
    check = functools.partial(split, parts=args.parts)
    run, model, processor = start(args, [*train, *test], data, check=check, ignored=WATCHING)

    def score(name: str, model: Model) -> dict:
        return evaluate(run, f"{name}/", model, processor, test, args, args.answering, label=name)

    before = score("before", model)
    folder = run.folder / "model"
    if not run.has("model"):
        begun = time.perf_counter()
        tuned = tune(model, processor, train, args, run.path("training/_").parent)
        tuned = fetch(tuned, keep=is_first()) if jax.process_count() > 1 else tuned
        run.write("model", lambda path: (save(tuned, path), processor.save_pretrained(path)))
        run.timed("train", begun)
    forget(run.folder / "training", args)
    after = score("after", args.load_model(str(folder))[0])
    for name, result in (("before", before), ("after", after)):
        print(f"{task} {name}: {result['accuracy']:.3f} ± {result['stderr']:.3f}  ({result['samples']} samples)")
    easy_vqa.show_baseline(test)
    print(f"{time.perf_counter() - started:.0f} s; the tuned model is {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args))
