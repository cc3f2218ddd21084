"""Trains an embedded model from nothing: text facts -> alignment -> instruction mix."""

import dataclasses
import functools
import json
import shutil
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
import tyro

from train import mini
from train.loop import LoopOptions, fit
from train.meter import About
from train.objective import LabelOptions, model_loss, muon_adamw, warmup_cosine
from train.subsets import ByPart
from vlm_jax import Model, load, save
from vlm_jax.checkpoints.sources import read_config
from vlm_jax.data import Example, pretraining
from vlm_jax.errors import UserError
from vlm_jax.inputs import LENGTH_BUCKET, Inputs, bucket
from vlm_jax.prompts import P0_PROMPT, PLAIN_PROMPT, Fitted, encode, positions
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run

STAGES = ("text", "align", "instruct")
#: The parts of a model, which are the labels of its parameters. The vision tower includes the projector.
PARTS = ("text", "visual")


@dataclasses.dataclass(frozen=True)
class Args(LabelOptions):
    """Pre-train an embedded model on the miniworld, stage after stage, each a checkpoint folder of its own."""

    out: Path
    """Folder for the stages: OUT/text, OUT/align, OUT/instruct, each a Hugging Face folder, and OUT/backbone: the
    text-only model that the text stage made. A folder of a run with other options is refused."""
    model: Literal["mini-qwen3-vl", "mini-gemma3", "mini-llava"] = "mini-qwen3-vl"
    """Which of the embedded models to train."""
    stages: tuple[Literal["text", "align", "instruct"], ...] = STAGES
    """Which stages to run; a stage starts from the one before it."""
    steps: tuple[int, int, int] = (500, 3000, 2600)
    """Steps of the three stages."""
    turns: tuple[int, int, int] = (12000, 24000, 36000)
    """Different turns that a stage draws its batches from."""
    batch: int = 64
    """Turns per step."""
    lr: tuple[float, float, float] = (2e-3, 2e-3, 2e-3)
    """Peak learning rate of each stage (Muon and AdamW; warm-up, then a cosine to a twentieth)."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    save_every: int = 500
    """Steps between checkpoints; a stopped stage goes on from the last one."""


def turns_of(stage: str, count: int) -> list[pretraining.Turn]:
    """The turns of a stage. Alignment's are in order of difficulty: ``batches`` keeps to that order."""
    match stage:
        case "text":
            return [pretraining.text_fact(i) for i in range(count)]
        case "align":
            return [pretraining.alignment(i, min(1.0, 1.25 * i / count)) for i in range(count)]
        case "instruct":
            return [pretraining.instruction(i) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Pool:
    """Encoded turns of one stage, in memory: inputs, answer positions ``(N, A)`` and which of them count."""

    inputs: Inputs
    index: np.ndarray
    valid: np.ndarray

    @classmethod
    def encode(cls, turns: list[pretraining.Turn], processor, config) -> "Pool":
        examples = [Example(str(i), (t.image,) if t.image else (), t.prompt, (t.answer,)) for i, t in enumerate(turns)]
        prompts = [P0_PROMPT if turn.qa else PLAIN_PROMPT for turn in turns]
        batch = encode(examples, processor, config, prompt=prompts)
        return cls(batch.inputs, *positions(batch.spans["answer"] | batch.spans["end"]))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each turn ``(N,)``."""
        return self.inputs.attention_mask.sum(1)

    def draw(self, rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
        """``count`` turns of one length bucket among turns ``low`` to ``high``; a bucket is as likely as its share."""
        buckets = -(-self.lengths[low:high] // LENGTH_BUCKET)
        rows = low + np.flatnonzero(buckets == rng.choice(buckets))
        return rng.choice(rows, count)

    def take(self, rows: np.ndarray) -> Fitted:
        """One micro-batch with a leading axis of 1, cut to the length that its longest turn needs."""
        longest = bucket(int(self.lengths[rows].max()))
        inputs = self.inputs.take(rows, images=None if self.inputs.images is None else len(rows)).cut(longest)
        return jax.tree.map(lambda a: a[None], Fitted(inputs.turned(), self.index[rows], self.valid[rows]))


def turn_range(stage: str, step: int, steps: int, count: int) -> tuple[int, int]:
    """Which turns a step draws from. Alignment's window moves from easy to difficult ones."""
    if stage != "align":
        return 0, count
    high = int(count * min(1.0, 0.15 + 1.2 * step / steps))
    return max(0, high - count // 2), high


def run_stage(stage: str, model: Model, processor, args: Args, folder: Path) -> Model:
    """The model after a stage."""
    i = STAGES.index(stage)
    steps, turns = args.steps[i], args.turns[i]
    pool = Pool.encode(turns_of(stage, turns), processor, model.config)
    folder.mkdir(parents=True, exist_ok=True)

    def batches(step: int) -> Fitted:
        rng = np.random.default_rng([args.seed, i, step])
        return pool.take(pool.draw(rng, *turn_range(stage, step, steps, turns), args.batch))

    def schedule(peak: float) -> optax.Schedule:
        return warmup_cosine(peak, steps, min(200, steps // 10), peak / 20)

    transforms, rates = args.optimisers(PARTS, args.lr[i], schedule, muon_adamw, decay=0.02)
    trained = fit(
        model_loss,
        model,
        batches,
        transforms,
        ByPart(PARTS),
        steps=steps,
        seed=args.seed,
        clip=1.0,
        name=stage,
        folder=folder,
        options=LoopOptions(save_every=args.save_every),
        about=About(rate=rates),
    )
    return trained.params


def copy_files(source: Path, folder: Path, *leave_out: str) -> None:
    """Everything that goes with the weights (tokeniser, processor, chat template), but what is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in leave_out:
            shutil.copy(file, folder)


@command
def main(args: Args) -> None:
    args.check_labels(PARTS)
    run = Run.open(args.out, args, ignored=("stages", "save_every"))
    run.begin()  # the configuration is on disk before the stages, which write into the folder by themselves
    base = untrained = args.out / "untrained"
    mini.WRITERS[args.model](base)
    config = read_config(base)
    model = jax.jit(functools.partial(Model, config))(jax.random.key(args.seed))
    save(model, base)
    run.add("untrained", Artifact("model", f"{args.model} with random weights"))
    last = max(map(STAGES.index, args.stages), default=-1)
    for stage in STAGES[: last + 1]:
        folder = args.out / stage
        if stage in args.stages:
            model, processor = load(base)
            started = time.perf_counter()
            model = run_stage(stage, model, processor, args, folder)
            copy_files(untrained, folder)  # not from the stage before, whose metrics and recipe are its own
            save(model, folder)
            if stage == "text":
                copy_files(untrained, args.out / "backbone", "preprocessor_config.json")
                save(model.backbone(), args.out / "backbone")
                run.add("backbone", Artifact("model", f"{args.model}: the text-only model"))
            recipe = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "stages", "save_every")}
            recipe |= {"stage": stage, "seconds": round(time.perf_counter() - started)}
            (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
            run.add(stage, Artifact("model", f"{args.model} after the stage {stage!r}, with its training's log"))
        elif not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder} holds no finished stage {stage!r}: run it first, without --stages")
        base = folder


if __name__ == "__main__":
    main(tyro.cli(Args))
