"""Trains an embedded model from random weights in three stages: facts as text, then pictures, then questions.

python -m train.pretrain --out runs/pretrain
"""

import dataclasses
import functools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import optax
import tyro

from train import mini
from train.artifacts import training_log
from train.inherit import inherited
from train.loop import LoopOptions, fit
from train.meter import About
from train.objective import LabelOptions, model_loss, muon_adamw, warmup_cosine
from train.subsets import TRAINABLE_PARTS, ByPart
from vlm_jax import Model, load, save
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.checkpoints.load import load_processor
from vlm_jax.checkpoints.sources import read_config
from vlm_jax.config import Config
from vlm_jax.data import Example, pretraining
from vlm_jax.errors import UserError
from vlm_jax.inputs import LENGTH_BUCKET, Inputs, bucket
from vlm_jax.processor import Processor
from vlm_jax.prompts import P0_PROMPT, PLAIN_PROMPT, Fitted, encode, positions
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import PageOptions
from vlm_jax.runs.ranges import BATCH, RATE, Range

STAGES = ("text", "align", "instruct")
#: Without a number of turns: how many steps share an encoded window of turns, and the number of which the width of
#: answers is a multiple, so that few programs are compiled.
_WINDOW, _ANSWER = 16, 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(LabelOptions, PageOptions):
    """Pre-train an embedded model on the miniworld, a small procedural world that comes with the library
    (docs/data.md).

    There are three stages. text teaches facts without pictures; align teaches to name, describe and read pictures;
    instruct teaches to answer questions. The labels for --label-lr and --label-decay are text and visual.
    """

    out: Path
    """Folder for the models: OUT/text, OUT/align and OUT/instruct, one Hugging Face folder for each stage, and
    OUT/backbone, the text-only model after the text stage, and OUT/half, the model after half of the steps of
    instruct. A folder of a run with other options is refused."""
    model: Literal["mini-qwen3-vl", "mini-gemma3", "mini-llava"] = "mini-qwen3-vl"
    """The embedded model to train."""
    stages: tuple[Literal["text", "align", "instruct"], ...] = STAGES
    """The stages to run. Each starts from the model of the stage before it."""
    spatial: bool = False
    """Whether every stage also teaches where things are: what follows from statements such as "The star is left of the
    cross.", pictures with several shapes to describe, and questions about them (mini-vsr, mini-vqa, mini-caption)."""
    steps: Annotated[tuple[int, int, int], Range(least=0)] = (500, 3000, 2600)
    """Number of training steps in each of the three stages."""
    turns: Annotated[tuple[int, int, int] | None, Range(least=0)] = (12000, 24000, 36000)
    """Number of different turns (a message and its answer) in each of the three stages. None: no two steps read the
    same turn, so that nothing can be learnt by heart."""
    decoder: str | None = None
    """A model of the same shape (an embedded name or a folder) whose decoder the first stage starts from. None: random
    weights. Tokens that it lacks start as the mean of those in which it writes them."""
    tower: str | None = None
    """A model of the same shape whose vision tower and projector the first stage starts from, as LLaVA starts from a
    trained CLIP. None: random weights."""
    batch: Annotated[int, BATCH] = 64
    """Turns in a step."""
    lr: Annotated[tuple[float, float, float], RATE] = (2e-3, 2e-3, 2e-3)
    """Peak learning rate of each stage. The rate rises from 0 to the peak, then falls along a cosine to a twentieth of
    it. The optimiser is Muon for matrices and AdamW for the rest."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of the initial weights and of the order of the data."""
    save_every: Annotated[int, Range(least=1)] = 500
    """Number of steps from one checkpoint to the next. A stopped stage continues from its last checkpoint."""


def turn_of(stage: str, index: int, count: int, spatial: bool) -> pretraining.Turn:
    """A turn of a stage with ``count`` turns. Those of the stage "align" begin with easy ones and become more
    difficult."""
    if stage == "text":
        return pretraining.text_fact(index, spatial)
    if stage == "align":
        return pretraining.alignment(index, min(1.0, 1.25 * index / count), spatial)
    return pretraining.instruction(index, spatial)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The encoded turns of one stage, in memory.

    index, valid: positions ``(N, A)`` of the answers' tokens, and which of them are not padding.
    """

    inputs: Inputs
    index: np.ndarray
    valid: np.ndarray

    @classmethod
    def encode(
        cls, turns: list[pretraining.Turn], processor: Processor, config: Config, width: int | None = None
    ) -> "Pool":
        """The pool of these turns. The answers' width is a multiple of ``width``; None: that of the longest."""
        examples = [Example(str(i), (t.image,) if t.image else (), t.prompt, (t.answer,)) for i, t in enumerate(turns)]
        prompts = [P0_PROMPT if turn.qa else PLAIN_PROMPT for turn in turns]
        batch = encode(examples, processor, config, prompt=prompts)
        answers = batch.spans["answer"] | batch.spans["end"]
        return cls(batch.inputs, *positions(answers, width and bucket(int(answers.sum(1).max()), width)))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each turn ``(N,)``."""
        return self.inputs.attention_mask.sum(1)

    def draw(self, rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
        """``count`` random turns of similar length among turns ``low`` to ``high - 1``. Their length bucket is drawn
        with the probability of its share of the turns."""
        buckets = -(-self.lengths[low:high] // LENGTH_BUCKET)
        rows = low + np.flatnonzero(buckets == rng.choice(buckets))
        return rng.choice(rows, count)

    def take(self, rows: np.ndarray) -> Fitted:
        """These turns as one micro-batch, cut to the length of the longest one. Arrays get a leading axis of 1."""
        longest = bucket(int(self.lengths[rows].max()))
        inputs = self.inputs.take(rows, images=None if self.inputs.images is None else len(rows)).cut(longest)
        return jax.tree.map(lambda a: a[None], Fitted(inputs.turned(), self.index[rows], self.valid[rows]))


def turn_range(stage: str, step: int, steps: int, count: int) -> tuple[int, int]:
    """The first and the last turn (+ 1) that a step may use. In the stage "align" this range moves from easy turns to
    difficult ones."""
    if stage != "align":
        return 0, count
    high = int(count * min(1.0, 0.15 + 1.2 * step / steps))
    return max(0, high - count // 2), high


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, because a window's cache needs a hash
class Batches:
    """The micro-batch of each step of a stage: a pure function of the step. ``number``: the stage's."""

    args: Args
    number: int
    processor: Processor
    config: Config

    @functools.cached_property
    def pool(self) -> Pool:
        """All turns of the stage, where their number is given."""
        assert self.args.turns is not None, "without a number of turns there is no pool"
        return self._encoded(range(self.args.turns[self.number]), self.args.turns[self.number])

    @functools.lru_cache(maxsize=2)  # noqa: B019 (there are few stages)
    def window(self, number: int) -> Pool:
        """The turns that are read by :data:`_WINDOW` steps and by no others."""
        size, count = _WINDOW * self.args.batch, self.args.steps[self.number] * self.args.batch
        return self._encoded(range(number * size, (number + 1) * size), count, width=_ANSWER)

    def _encoded(self, indices: range, count: int, **options: int) -> Pool:
        turns = [turn_of(STAGES[self.number], index, count, self.args.spatial) for index in indices]
        return Pool.encode(turns, self.processor, self.config, **options)

    def __call__(self, step: int) -> Fitted:
        args = self.args
        if args.turns is None:
            # Turns of similar length come into one step, as below.
            pool, order = self.window(step // _WINDOW), np.random.default_rng([args.seed, self.number, step // _WINDOW])
            parts = np.argsort(pool.lengths, kind="stable").reshape(_WINDOW, args.batch)
            return pool.take(parts[order.permutation(_WINDOW)[step % _WINDOW]])
        span = turn_range(STAGES[self.number], step, args.steps[self.number], args.turns[self.number])
        rng = np.random.default_rng([args.seed, self.number, step])
        return self.pool.take(self.pool.draw(rng, *span, args.batch))


def run_stage(stage: str, model: Model, batches: Batches, args: Args, folder: Path, until: int) -> Model:
    """Trains the model in one stage up to step ``until``, and returns it."""
    i = STAGES.index(stage)
    steps = args.steps[i]
    folder.mkdir(parents=True, exist_ok=True)

    def schedule(peak: float) -> optax.Schedule:
        return warmup_cosine(peak, steps, min(200, steps // 10), peak / 20)

    transforms, rates = args.optimisers(TRAINABLE_PARTS, args.lr[i], schedule, muon_adamw, decay=0.02)
    trained = fit(
        model_loss,
        model,
        batches,
        transforms,
        ByPart(TRAINABLE_PARTS),
        steps=until,
        seed=args.seed,
        clip=1.0,
        name=stage,
        folder=folder,
        options=LoopOptions(save_every=args.save_every),
        about=About(rate=rates),
    )
    return trained.params


def copy_files(source: Path, folder: Path, *leave_out: str) -> None:
    """Copies the files that belong to the weights (tokeniser, processor, chat template), except those named in
    ``leave_out``."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in leave_out:
            shutil.copy(file, folder)


@command
def main(args: Args) -> None:
    args.check_labels(TRAINABLE_PARTS)
    run = Run.open(args.out, args, ignored=("stages", "save_every"))
    run.begin()  # writes the configuration before the stages write their own files into the folder
    base = untrained = args.out / "untrained"
    with tempfile.TemporaryDirectory() as temporary:  # an earlier run's model stays until this is the same run
        mini.WRITERS[args.model](Path(temporary), args.spatial)
        config = read_config(Path(temporary))
        model = jax.jit(functools.partial(Model, config))(jax.random.key(args.seed))
        processor = load_processor(Path(temporary), config)
        assert processor is not None, "the writers of untrained models write a processor"
        model = inherited(model, processor.tokenizer, args.decoder, args.tower)
        run.pin("untrained", fingerprint(model), from_the_start=True)
        copy_files(Path(temporary), base)
        save(model, base)
    run.add("untrained", Artifact("model", f"{args.model} before its training"))
    half = args.out / "half"
    last = max(map(STAGES.index, args.stages), default=-1)
    for stage in STAGES[: last + 1]:
        folder = args.out / stage
        if stage in args.stages:
            model, processor = load(base)
            assert processor is not None, "the writers of untrained models write a processor"
            started, number = time.perf_counter(), STAGES.index(stage)
            batches = Batches(args, number, processor, model.config)
            if stage == "instruct" and not (half / "model.safetensors").is_file():
                copy_files(untrained, half)
                # The stage then goes on from the checkpoint of this step, so it is as if it had not stopped.
                save(run_stage(stage, model, batches, args, folder, args.steps[number] // 2), half)
                run.add("half", Artifact("model", f"{args.model} after half of the stage 'instruct'"))
            model = run_stage(stage, model, batches, args, folder, args.steps[number])
            copy_files(untrained, folder)  # the folder of the stage before also has that stage's metrics and recipe
            save(model, folder)
            if stage == "text":
                copy_files(untrained, args.out / "backbone", "preprocessor_config.json")
                save(model.backbone(), args.out / "backbone")
                run.add("backbone", Artifact("model", f"{args.model}: the text-only model"))
            recipe = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "stages", "save_every")}
            recipe |= {"stage": stage, "seconds": round(time.perf_counter() - started)}
            (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
            run.add(stage, Artifact("model", f"{args.model} after the stage {stage!r}, with its training's log"))
            run.add(f"{stage}/metrics.jsonl", training_log(f"{args.model}, the stage {stage!r}"))
        elif not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder} holds no finished stage {stage!r}: run it first, without --stages")
        base = folder


if __name__ == "__main__":
    main(tyro.cli(Args))
