"""A study's options, and the conditions that follow from them."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eval.evaluation import AnswerOptions
from eval.judging import MetricOptions
from interventions.modules import check_k, default_k
from interventions.placement.rules import find_placement
from interventions.trace.corruption import CORRUPTIONS
from interventions.trace.options import TraceOptions
from train.study.recipes import RECIPES
from train.trunk import LoRAOptions
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.runs.options import DeviceOptions


def _list(what: str):
    return tyro.conf.arg(metavar=f"{what} [{what} ...]")


@dataclasses.dataclass(frozen=True)
class Args(DataOptions, DeviceOptions):
    """Trace, score, place, train and evaluate LoRA on every model under every placement, and compare the placements.

    Cells (model x family x placement x seed) are independent: a stopped study goes on where it was, and the same
    modules chosen twice are trained once. --plan says what it will cost.
    """

    recipe: Literal[tuple(RECIPES)] = "p0"
    """Which paper's study."""
    models: Annotated[tuple[str, ...], _list("MODEL")] = ("mini-qwen3-vl", "mini-gemma3")
    """Embedded models, Hugging Face folders or hub ids."""
    families: Annotated[tuple[str, ...], _list("TASK")] = ("knowledge", "perception")
    """Two task families to tell apart: the miniworld's, or p0-knowledge and p0-perception for the paper's datasets."""
    trace: int = 192
    """Examples to trace, per family."""
    train: int = 300
    """Examples to train on, per family."""
    eval: int = 600
    """Held-out examples, per family."""
    placements: Annotated[tuple[str, ...], _list("NAME")] = ()
    """Placements to compare; the recipe's by default (docs/placement.md lists them)."""
    k: Annotated[tuple[int, ...], _list("K")] = ()
    """Modules to place LoRA in. The first is the one that all placements are compared at, by default P0's share of
    them (10 of 72); the others are for the recipe's sweep, by default twice as many."""
    seeds: Annotated[tuple[int, ...], _list("SEED")] = (0, 1)
    """Seeds of training (adapters, order of the data, dropout): every placement is trained with each."""
    random_seeds: Annotated[tuple[int, ...], _list("SEED")] = (42, 43, 44, 45, 46)
    """Seeds of random placements, each trained with the next of --seeds in turn. P0 has the first three."""
    corruptions: Annotated[tuple[Literal[tuple(CORRUPTIONS)], ...], _list("KIND")] = (
        "swapped_question",
        "image_noise",
        "swapped_image",
    )
    """Other corruptions to trace with, whose RR are compared with the first's."""
    alone: bool = True
    """Also train every module alone, to see whether a score tells where LoRA helps."""
    tracing: TraceOptions = dataclasses.field(default_factory=TraceOptions)
    training: LoRAOptions = dataclasses.field(default_factory=lambda: LoRAOptions(batch=8, accumulation=1))
    metric: MetricOptions = dataclasses.field(default_factory=MetricOptions)
    answering: AnswerOptions = dataclasses.field(default_factory=AnswerOptions)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the parameters; the checkpoint's own by default."""
    max_pixels: int | None = None
    """Larger images are shrunk to this many pixels (models that take any size)."""
    plan: bool = False
    """Print what the study consists of and costs, and stop."""
    out: Path = Path("runs/study")
    """Run folder; a stopped study goes on from there."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """A placement at one k, with the seeds of its runs: of the choice of modules, and of training."""

    placement: str
    k: int
    runs: tuple[tuple[int, int], ...]


def conditions(args: Args, depth: int) -> list[Condition]:
    """What is compared on a model of ``depth`` layers; the first of --k comes first."""
    recipe = RECIPES[args.recipe]
    share = default_k(depth)
    ks = args.k or tuple(dict.fromkeys(min(share * times, 2 * depth) for times in (1, 2)))
    found = []
    for number, k in enumerate(ks):
        check_k(k, depth)
        for name in (args.placements or recipe.placements) if number == 0 else recipe.swept:
            if find_placement(name).seeded:
                runs = [(seed, args.seeds[i % len(args.seeds)]) for i, seed in enumerate(args.random_seeds)]
            else:
                runs = [(0, seed) for seed in args.seeds]
            found.append(Condition(name, k, tuple(runs)))
    return found


def check(args: Args) -> None:
    """Refuses options that cannot be."""
    if len(args.families) != 2 or len(set(args.families)) != 2:
        raise UserError(f"--families names {len(set(args.families))} families: task_diff tells two apart, name two")
    names = [Path(name).name for name in args.models]
    if len(set(names)) < len(names):
        raise UserError("--models names two models alike: give folders of different names")
    for name in ("seeds", "random_seeds"):
        seeds = getattr(args, name)
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise UserError(f"--{name.replace('_', '-')} must be different numbers of 0 or more, at least one")
    for name in ("models", "placements", "k", "corruptions"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names one twice: name each once, repeats are no new evidence")
    for name in args.placements:
        find_placement(name)
    args.tracing.check_modules()
    for kind in args.corruptions:
        if kind == args.tracing.corruption:
            raise UserError(f"--corruptions names {kind}, which --tracing.corruption has already: leave it out")
