"""P0's whole study: every model, placement and seed, with the statistics that say whether differences are real.

python -m eval.study --recipe p0 --out runs/study
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eval import metrics
from eval.accuracy import AnswerOptions
from eval.experiment import Experiment
from eval.metrics import MetricOptions
from eval.plan import Plan
from eval.recipes import RECIPES
from eval.report import report
from interventions.corruption import CORRUPTIONS
from interventions.grids import module_names
from interventions.placement import check_k, default_k, place, resolve
from interventions.trace import TraceOptions
from train.loop import WATCHING
from train.trunk import LoRAOptions
from vlm_jax.command import command
from vlm_jax.data import Example, easy_vqa, load_task, source
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.fingerprint import fingerprint
from vlm_jax.options import DataOptions, DeviceOptions, ModelOptions
from vlm_jax.processes import progress
from vlm_jax.runs import Run, manifest


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
            if resolve(name).seeded:
                runs = [(seed, args.seeds[i % len(args.seeds)]) for i, seed in enumerate(args.random_seeds)]
            else:
                runs = [(0, seed) for seed in args.seeds]
            found.append(Condition(name, k, tuple(runs)))
    return found


def examples_of(args: Args) -> list[dict[str, list[Example]]]:
    """What is traced, trained on and tested on, by family."""
    sizes = {"trace": args.trace, "train": args.train, "test": args.eval}
    found = [
        {family: load_task(family, split=split, limit=limit, options=args) for family in args.families}
        for split, limit in sizes.items()
    ]
    for (split, limit), parts in zip(sizes.items(), found, strict=True):
        for family, examples in parts.items():
            if len(examples) < limit:
                flag = {"test": "eval"}.get(split, split)
                raise UserError(f"{family} has {len(examples)} examples to {flag}, not {limit}: lower --{flag}")
    traced, train, test = found
    for family in args.families:
        check_disjoint([*traced[family], *train[family]], test[family])
        metrics.check(test[family], args.metric)
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
        resolve(name)
    args.tracing.check_modules()
    for kind in args.corruptions:
        if kind == args.tracing.corruption:
            raise UserError(f"--corruptions names {kind}, which --tracing.corruption has already: leave it out")


def experiments(args: Args, run: Run, traced: dict, trained: dict, tested: dict):
    """One :class:`Experiment` a model, loaded when it is reached."""
    for name in args.models:
        devices = {field.name: getattr(args, field.name) for field in dataclasses.fields(DeviceOptions)}
        model, processor = ModelOptions(model=name, dtype=args.dtype, max_pixels=args.max_pixels, **devices).load()
        folder = f"{Path(name).name}/"
        yield Experiment(
            run,
            folder,
            model,
            processor,
            traced,
            trained,
            tested,
            args.tracing,
            args.training,
            args.metric,
            args.answering,
        )


def study(args: Args, experiment: Experiment) -> dict:
    """Everything on one model: scores, placements and, by family, condition and run, the result on every sample."""
    families, depth = list(args.families), experiment.depth
    todo = conditions(args, depth)
    needs = dict.fromkeys(["rr", *(resolve(c.placement).needs for c in todo)])
    scoring = experiment.scoring([name for name in needs if name], families)
    for kind in args.corruptions:
        for family in families:
            experiment.trace(family, corruption=kind)
    cells = [
        (
            family,
            condition.placement,
            condition.k,
            place(condition.placement, scoring, family, condition.k, chosen),
            seed,
        )
        for condition in todo
        for chosen, seed in condition.runs
        for family in families
    ]
    if args.alone:
        cells += [(family, "alone", 1, [name], args.seeds[0]) for name in module_names(depth) for family in families]
    records = [
        {"family": family, "placement": "baseline", "k": 0, "names": [], "seed": 0, **experiment.baseline(family)}
        for family in families
    ]
    for family, placement, k, names, seed in progress(cells, desc=experiment.folder.rstrip("/"), unit="cell"):
        found = experiment.cell(family, names, seed)
        records.append({"family": family, "placement": placement, "k": k, "names": names, "seed": seed, **found})
    for record in records:
        record["parameters"] = experiment.parameters(record["names"]) if record["names"] else 0
    scores = {name: {f: known.tolist() for f, known in by.items()} for name, by in scoring.scores.items()}
    return {"depth": depth, "scores": scores, "records": records}


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    check(args)
    run = Run.open(args.out, args, ignored=("plan", *WATCHING))
    run.pin("data", {family: source(family, split="train", options=args) for family in args.families})
    examples, results, plans = examples_of(args), {}, []
    for experiment in experiments(args, run, *examples):
        for kind in (args.tracing.corruption, *args.corruptions):
            dataclasses.replace(args.tracing, corruption=kind).check(experiment.depth)
        if args.plan:
            plans.append(Plan.of(experiment, conditions(args, experiment.depth), args))
            continue
        experiment.check()
        run.pin(f"{experiment.folder}model", fingerprint(experiment.model))
        run.save_json(f"{experiment.folder}manifest.json", manifest(experiment.model.config, experiment.processor))
        results[experiment.folder.rstrip("/")] = study(args, experiment)
    if args.plan:
        print("\n".join(map(str, plans)))
        return
    print(report(run, results, args))
    for tested in examples[-1].values():
        easy_vqa.show_baseline(tested)
    print(f"{time.perf_counter() - started:.0f} s; tables, figures, adapters and predictions are in {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
