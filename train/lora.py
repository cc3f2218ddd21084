"""P0's experiment in one command: finds the modules that matter by causal tracing, trains LoRA there and in the
baselines' modules, and compares the results.

python -m train.lora --placement task_diff --out runs/demo
"""

import dataclasses
import functools
import itertools
import re
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from eval import judging as metrics
from eval.evaluation import AnswerOptions
from eval.judging import MetricOptions
from eval.tables import Table
from interventions.figures.base import save_figure
from interventions.figures.tracing import heatmap
from interventions.modules import check_k, default_k
from interventions.placement.rules import Scoring, choose_modules, find_placement, read_names, read_trace
from interventions.placement.scores import module_sizes
from interventions.statistics import interval_text, normalised
from interventions.trace.options import TraceOptions
from interventions.trace.result import sample_count
from train.adapter import LoRAOptions
from train.artifacts import TABLE_1
from train.loop import WATCHING
from train.study.experiment import Experiment
from vlm_jax import Model
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import Example, easy_vqa, source
from vlm_jax.data.example import TASK_FAMILIES
from vlm_jax.data.options import DataOptions
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError, nearest
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import load_examples, start


@dataclasses.dataclass(frozen=True)
class Args(LoRAOptions, DataOptions, ModelOptions):
    """Find the modules that matter for a task, train LoRA there, and compare it with LoRA elsewhere and with none.

    A module is the attention or the MLP of one layer, such as L2-attn. A causal trace corrupts the input, which lowers
    the probability of the gold answer. It then replaces the output of one module by its output for the clean input, and
    measures how much of the probability comes back: the restoration rate of the module. A placement is a rule that
    chooses modules by this rate or by another score. This is the experiment of P0, the first paper in README.md. The
    command prints P0's Table 1: the accuracy for each choice of modules.
    """

    placement: str = "task_diff"
    """The rule that chooses the modules for LoRA: all, random, shared (highest restoration rates), task_diff (largest
    excess of the rate over that of the other task family), fisher and others; docs/placement.md lists all. Or a JSON
    file with a list of module names such as ["L2-attn"]."""
    where: Literal["text", "visual"] = "text"
    """Which modules may get LoRA. text: those of the decoder's layers; visual: those of the vision tower's blocks, such
    as V2-attn. For these there are no scores, so --placement must be all, random, first, middle, last or a file."""
    baselines: bool = True
    """For comparison, also train LoRA on all modules and on K random modules."""
    k: Annotated[int | None, Range(least=1)] = None
    """Number of modules that get LoRA. By default the same share of all modules as in P0, which is 10 of 72. For
    mini-qwen3-vl with its 16 modules, this is 2."""
    train: str = "450"
    """Examples to train on: a number, the name of a task or dataset, or a JSONL file. A number takes so many examples
    from each task family of the miniworld (the tasks that come with the library)."""
    eval: str = "300"
    """Held-out examples to evaluate on: a number for each task family, a task, a dataset or a JSONL file."""
    trace: str = "96"
    """Examples to trace: a number for each task family, a task, a dataset or a JSONL file."""
    traces: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Finished traces to use instead of tracing: FAMILY FOLDER [FAMILY FOLDER ...]. Each folder is a run folder of
    interventions.trace."""
    limit: Annotated[int | None, Range(least=1)] = None
    """Largest number of examples to read from each task, dataset or file. It does not limit a number that is given to
    --train, --eval or --trace."""
    random_seeds: Annotated[tuple[int, ...], Range(least=0), tyro.conf.arg(metavar="SEED [SEED ...]")] = (42, 43, 44)
    """Seeds of the random placements. LoRA is trained once for each, and the accuracies are averaged."""
    tracing: tyro.conf.OmitArgPrefixes[TraceOptions] = dataclasses.field(default_factory=TraceOptions)
    metric: tyro.conf.OmitArgPrefixes[MetricOptions] = dataclasses.field(default_factory=MetricOptions)
    answering: tyro.conf.OmitArgPrefixes[AnswerOptions] = dataclasses.field(default_factory=AnswerOptions)
    out: Path = Path("runs/lora")
    """Folder for the results. If a run was stopped, the same command continues it and skips the finished stages."""


class Examples(NamedTuple):
    """The examples of a run, by task family."""

    traced: dict[str, list[Example]]
    """Examples to trace. Empty if the placement needs no score, or if ``--traces`` gives a trace of every family."""
    trained: dict[str, list[Example]]
    """Examples to train on."""
    tested: dict[str, list[Example]]
    """Examples to evaluate on."""
    families: list[str]
    """The families that have both training and held-out examples."""
    to_score: list[str]
    """The families for which the modules get a score."""

    def shown(self) -> list[Example]:
        """The examples of which results tell, by turns held-out ones and traced ones."""
        tested, traced = (itertools.chain(*split.values()) for split in (self.tested, self.traced))
        both = itertools.chain(*itertools.zip_longest(tested, traced))
        return [example for example in both if example is not None]

    def all(self) -> list[Example]:
        """The examples of all splits and families."""
        return [example for split in self[:3] for examples in split.values() for example in examples]


def examples_by_family(source: str, split: str, args: Args) -> dict[str, list[Example]]:
    """Task family -> examples. If an example has no family, the name of its task takes the family's place.

    Args:
        source: a number of examples for each family, the name of a task or dataset, or a JSONL file.
    """
    if _is_count(source):
        return {family: load_examples(family, split=split, limit=int(source), options=args) for family in TASK_FAMILIES}
    by_family: dict[str, list[Example]] = {}
    for example in load_examples(source, split=split, limit=args.limit, options=args):
        by_family.setdefault(example.family or example.task, []).append(example)
    return by_family


def _is_count(source: str) -> bool:
    """Whether a source is a number of examples, and not a name."""
    return re.fullmatch("-?[0-9]{1,9}", source) is not None


def read_examples(args: Args) -> Examples:
    """The examples of all splits.

    Raises:
        UserError: if held-out examples are also trained on or traced, if the splits share no family, or if the metric
            cannot score the examples.
    """
    trained, tested = examples_by_family(args.train, "train", args), examples_by_family(args.eval, "test", args)
    held_out = list(itertools.chain(*tested.values()))
    check_disjoint(itertools.chain(*trained.values()), held_out)
    families = [family for family in trained if family in tested]
    if not families:
        raise UserError(f"--train has {' and '.join(trained)}, --eval has {' and '.join(tested)}: they share no family")
    needed = find_placement(args.placement).needs
    if args.where == "visual" and needed is not None:
        raise UserError(
            f"placement {args.placement!r} needs the score {needed}, which modules of the vision tower lack: with "
            "--where visual, choose all, random, first, middle, last or a file"
        )
    to_score = list(TASK_FAMILIES) if args.placement == "task_diff" else families
    check_traces(args, needed, to_score)
    must_trace = needed is not None and not set(to_score) <= set(args.traces)
    traced = examples_by_family(args.trace, "trace", args) if must_trace else {}
    check_disjoint(itertools.chain(*traced.values()), held_out)
    missing = [family for family in to_score if needed and family not in {*traced, *args.traces}]
    if missing:
        raise UserError(
            f"placement {args.placement!r} needs traced examples of {' and '.join(missing)}: --trace has none"
        )
    for family in families:
        metrics.check_metric(tested[family], args.metric)
    return Examples(traced, trained, tested, families, to_score)


def check_traces(args: Args, needed: str | None, families: list[str]) -> None:
    """Refuses ``--traces`` that the placement would not read, or would take for another score.

    Raises:
        UserError: if the placement needs no restoration rate (RR), if a trace is named for another family, or one for
            two families.
    """
    if args.traces and needed != "rr":
        score = "no score" if needed is None else f"the score {needed}"
        raise UserError(
            f"--traces gives restoration rates, but placement {args.placement!r} needs {score}: drop --traces"
        )
    for family in args.traces:
        if family not in families:
            raise UserError(f"--traces names the family {family!r}, which is not placed{nearest(family, families)}")
    folders = [folder.resolve() for folder in args.traces.values()]
    if len(set(folders)) < len(folders):
        raise UserError(f"--traces gives {' and '.join(args.traces)} the same folder: give each family its own trace")


def sources(args: Args, examples: Examples) -> dict[str, dict]:
    """Split -> where its examples come from, for the manifest. ``{}`` if the option is a number, because then the
    examples are from the miniworld, which comes with the library."""
    names = {"train": args.train, "test": args.eval, **({"trace": args.trace} if examples.traced else {})}
    return {split: {} if _is_count(name) else source(name, split=split, options=args) for split, name in names.items()}


def placements_by_condition(args: Args, scoring: Scoring, families: list[str]) -> dict[str, list[dict[str, list[str]]]]:
    """Condition -> a list with one placement (family -> module names) for each seed. A condition is a row of P0's Table
    1, and the conditions are in its order."""
    k = modules_to_place(args, scoring.depth)
    labels = {"all": "Tower-all" if scoring.tower else "LLM-all", "random": f"Random-{k}"}
    placement_names = dict.fromkeys([*(labels if args.baselines else ()), args.placement])
    by_condition = {}
    for name in placement_names:
        seeds = args.random_seeds if find_placement(name).seeded else (args.seed,)
        other_label = f"File-{Path(name).stem}" if name.endswith(".json") else f"Top-{k}-{name.replace('_', '-')}"
        by_condition[labels.get(name, other_label)] = [
            {family: choose_modules(name, scoring, family, k, seed) for family in families} for seed in seeds
        ]
    return by_condition


def modules_to_place(args: Args, depth: int) -> int:
    """The number of modules that get LoRA: ``--k``. Without it, the number of modules in the placement file or, if the
    placement is not a file, P0's share of all modules."""
    if args.k is None and args.placement.endswith(".json"):
        return len(read_names(Path(args.placement), depth, args.where == "visual"))
    return check_k(args.k if args.k is not None else default_k(depth), depth)


def check_options(args: Args, model: Model) -> None:
    """Checks the options against the model, before anything is computed or written.

    Raises:
        UserError: if an option does not suit the model, or if two options cannot be used together.
    """
    depth, placeable = model.depths["text"], model.depths[args.where]
    if not placeable:
        raise UserError("--where is visual, but this model has no vision tower: choose text")
    modules_to_place(args, placeable)
    if args.placement.endswith(".json"):
        read_names(Path(args.placement), placeable, args.where == "visual")
    if not args.random_seeds or len(set(args.random_seeds)) < len(args.random_seeds):
        raise UserError("--random-seeds needs at least one seed, and none twice: correct it")
    args.check_loop()
    args.tracing.check(depth)
    args.tracing.check_modules()


def module_scores(args: Args, experiment: Experiment, examples: Examples) -> dict[str, dict[str, np.ndarray]]:
    """The score that the placement needs, as name of the score -> family -> score of every module. Empty if it needs
    none.

    For a family in ``--traces`` the score is read from its trace; for other families it is computed. If the score is
    the restoration rate and there are two families, this also draws their rates and the difference of the rates.
    """
    needed = find_placement(args.placement).needs
    if needed is None:
        return {}
    model_fingerprint = fingerprint(experiment.model)
    scores = {
        family: read_trace(args.traces[family], model_fingerprint, experiment.model.config.text.num_hidden_layers)
        if family in args.traces
        else experiment.scores(needed, family)
        for family in examples.to_score
    }
    if needed != "rr":
        return {needed: scores}
    counts = {}
    for family in (family for family in scores if family not in args.traces):
        summary = experiment.trace(family)
        counts[family] = sample_count(summary)
        print(
            f"{family}: traced {summary['samples']} samples, TE <= 0 in {summary['te_not_positive']}, "
            f"most restored by {', '.join(summary['ranking'][:4])}"
        )
    if len(scores) == 2:
        run = experiment.run
        save_figure(
            run, "trace/heatmap", heatmap, "Restoration rate by layer and module", panels=scores, samples=counts
        )
        (one, a), (other, b) = ((family, normalised(rates)) for family, rates in scores.items())
        difference = {f"{one} - {other}": a - b}
        title, label = "Difference of the families' normalised restoration rates", "difference of normalised RR"
        both = dict.fromkeys(difference, " and ".join(map(str, counts.values()))) if len(counts) == 2 else None
        save_figure(run, "trace/difference", heatmap, title, panels=difference, label=label, samples=both)
    return {needed: scores}


@command
def main(args: Args) -> None:
    began = time.perf_counter()
    examples = read_examples(args)
    data = sources(args, examples)
    check = functools.partial(check_options, args)
    run, model, processor = start(args, examples.all(), data, check=check, ignored=WATCHING, shown=examples.shown())
    options = (args.tracing, args, args.metric, args.answering)
    experiment = Experiment(run, "", model, processor, *examples[:3], *options)
    scores, tower = module_scores(args, experiment, examples), args.where == "visual"
    scoring = Scoring(model.depths[args.where], module_sizes(model, tower), scores, tower)
    families = examples.families
    rows = [{"condition": "Baseline", "parameters": None, "placement": None}]
    rows[0] |= {family: [_brief(experiment.baseline(family))] for family in families}
    for condition, placements in placements_by_condition(args, scoring, families).items():
        row = {"condition": condition, "placement": placements}
        row["parameters"] = {
            f: float(np.mean([experiment.adapter_parameters(p[f]) for p in placements])) for f in families
        }
        for family in families:
            row[family] = [_brief(experiment.cell(family, p[family], args.seed)) for p in placements]
        rows.append(row)
    title = "Accuracy on held-out examples by where LoRA was trained"
    run.save_json("results.json", {"rows": rows}, Artifact("metrics", title, TABLE_1))
    table = table1(rows, families)
    run.write("table.md", lambda path: path.write_text(table), Artifact("table", title))
    print(f"\nAccuracy ({args.metric.metric}) on held-out examples after LoRA training, [95 % interval].")
    print(f"\n{table}")
    for family in families:
        easy_vqa.show_baseline(examples.tested[family])
    print(f"{time.perf_counter() - began:.0f} s; adapters, samples and figures are in {args.out}")


def _brief(result: dict) -> dict:
    """A copy of a result without its two long lists, which have an entry for each sample."""
    return {name: value for name, value in result.items() if name not in ("scores", "clusters")}


def table1(rows: list[dict], families: list[str]) -> str:
    """P0's Table 1 as Markdown: accuracy per family, and trainable parameters.

    Args:
        rows: each has ``condition``, ``parameters`` (family -> count, or None) and for each family a list of results,
            one for each seed.
    """
    header = ("LoRA target", *families, "trainable parameters")
    cells = [
        (row["condition"], *(_accuracy(row[family]) for family in families), _parameters(row["parameters"]))
        for row in rows
    ]
    return Table(header, cells).markdown()


def _accuracy(scores: list[dict]) -> str:
    # All seeds are evaluated on the same samples. So the mean over seeds has the same sampling error as one seed.
    return interval_text(
        {name: np.mean([score[name] for score in scores]) for name in ("accuracy", "low", "high")}, "accuracy"
    )


def _parameters(counts: dict[str, float] | None) -> str:
    if counts is None:
        return "-"
    # Families with equal counts share one number.
    return " / ".join(dict.fromkeys(f"{count:,.0f}" for count in counts.values()))


if __name__ == "__main__":
    main(tyro.cli(Args))
