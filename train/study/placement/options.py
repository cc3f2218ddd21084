"""A study's options, and the conditions that follow from them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from eval.evaluation import AnswerOptions
from eval.judging import MetricOptions
from interventions.modules import check_k, default_k
from interventions.placement.rules import find_placement
from interventions.trace.corruption import CORRUPTIONS
from interventions.trace.options import TraceOptions
from train.adapter import LoRAOptions
from train.study.placement.recipes import RECIPES
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.runs.options import LoadOptions
from vlm_jax.runs.ranges import Range

# The command line lists the names; static checkers cannot compute them.
if TYPE_CHECKING:
    CorruptionName = str
else:
    CorruptionName = Literal[tuple(CORRUPTIONS)]


def _list(what: str):
    return tyro.conf.arg(metavar=f"{what} [{what} ...]")


@dataclasses.dataclass(frozen=True)
class Args(DataOptions, LoadOptions):
    """Compare rules that choose the modules for LoRA, on several models, with several seeds.

    A module is the attention or the MLP of one layer. For every model and task family the study traces the model (which
    measures how important each module is), lets every rule choose modules, trains LoRA on them, and evaluates it on
    held-out examples. Modules that several rules choose are trained once. Use --plan to see the cost first. P0 is the
    first paper in README.md.
    """

    recipe: Literal["p0"] = "p0"
    """The study to run. Each has options of its own: --recipe NAME --help shows them. p0: this one. p4, p4-full and
    p4-control: P4's representation editors."""
    models: Annotated[tuple[str, ...], _list("MODEL")] = ("mini-qwen3-vl", "mini-gemma3")
    """The models to study: embedded models, Hugging Face folders or hub ids."""
    families: Annotated[tuple[str, ...], _list("TASK")] = ("knowledge", "perception")
    """The two task families to compare: knowledge and perception of the miniworld, which comes with the library, or
    p0-knowledge and p0-perception for the paper's datasets."""
    trace: Annotated[int, Range(least=1)] = 192
    """Number of examples of each family to trace."""
    train: Annotated[int, Range(least=1)] = 300
    """Number of examples of each family to train on."""
    eval: Annotated[int, Range(least=1)] = 600
    """Number of held-out examples of each family to evaluate on."""
    placements: Annotated[tuple[str, ...], _list("NAME")] = ()
    """The placements to compare, which are rules that choose modules (docs/placement.md lists them). By default those
    of the recipe."""
    k: Annotated[tuple[int, ...], Range(least=1), _list("K")] = ()
    """Numbers of modules that get LoRA. All placements are compared at the first number, by default 10 of 72 as in P0.
    The recipe names some placements that are also run at the other numbers, by default twice the first."""
    seeds: Annotated[tuple[int, ...], Range(least=0), _list("SEED")] = (0, 1)
    """Seeds of training (initial adapters, order of the data, dropout). Every placement is trained with each of
    them."""
    random_seeds: Annotated[tuple[int, ...], Range(least=0), _list("SEED")] = (42, 43, 44, 45, 46)
    """Seeds of the placements that choose random modules. Each is trained with one of --seeds, in turn. P0 uses the
    first three."""
    corruptions: Annotated[tuple[CorruptionName, ...], _list("KIND")] = (
        "swapped_question",
        "image_noise",
        "swapped_image",
    )
    """Further corruptions to trace with, besides --corruption. The report shows how well their results agree."""
    alone: bool = True
    """Also train LoRA on each module alone, to measure whether a score predicts where LoRA helps."""
    tracing: OmitArgPrefixes[TraceOptions] = dataclasses.field(default_factory=TraceOptions)
    training: OmitArgPrefixes[LoRAOptions] = dataclasses.field(
        default_factory=lambda: LoRAOptions(batch=8, accumulation=1)
    )
    metric: OmitArgPrefixes[MetricOptions] = dataclasses.field(default_factory=MetricOptions)
    answering: OmitArgPrefixes[AnswerOptions] = dataclasses.field(default_factory=AnswerOptions)
    plan: bool = False
    """Print the estimated cost of the study (examples, FLOPs, memory, hours by device), then stop."""
    out: Path = Path("runs/study")
    """Folder for the results. A stopped study with the same options continues there."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """A placement at one k, with the seeds of its runs."""

    placement: str
    k: int
    runs: tuple[tuple[int, int], ...]
    """(Seed of the choice of modules, seed of the training) of each run."""


def conditions(args: Args, depth: int) -> list[Condition]:
    """The conditions to compare on a model of ``depth`` layers. Those with the first of --k come first."""
    recipe = RECIPES[args.recipe]
    share = default_k(depth)
    ks = args.k or tuple(dict.fromkeys(min(share * times, 2 * depth) for times in (1, 2)))
    compared = []
    for number, k in enumerate(ks):
        check_k(k, depth)
        for name in (args.placements or recipe.placements) if number == 0 else recipe.swept:
            if find_placement(name).seeded:
                runs = [(seed, args.seeds[i % len(args.seeds)]) for i, seed in enumerate(args.random_seeds)]
            else:
                runs = [(0, seed) for seed in args.seeds]
            compared.append(Condition(name, k, tuple(runs)))
    return compared


def check_options(args: Args) -> None:
    """Checks the options that can be checked without a model.

    Raises:
        UserError: for names or seeds that are missing or repeated, unknown placements, or options that exclude each
            other.
    """
    if len(args.families) != 2 or len(set(args.families)) != 2:
        raise UserError(f"--families names {len(set(args.families))} families, but a study compares two: name two")
    names = [Path(name).name for name in args.models]
    if len(set(names)) < len(names):
        raise UserError("--models has two folders of the same name: rename one, because results are stored by name")
    for name in ("seeds", "random_seeds"):
        seeds = getattr(args, name)
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"--{name.replace('_', '-')} needs at least one number, and none twice: correct it")
    for name in ("models", "placements", "k", "corruptions"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} has a value twice: give each value once")
    for name in args.placements:
        find_placement(name)
    args.tracing.check_modules()
    for kind in args.corruptions:
        if kind == args.tracing.corruption:
            raise UserError(f"--corruptions has {kind}, which --corruption already names: leave it out")
