"""LoRA where it matters, in one command: trace, place, train there and nowhere else, evaluate beside the baselines.

python -m train.lora --placement task_diff --out runs/demo
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated

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
from interventions.statistics import normalised
from interventions.trace.options import TraceOptions
from train.artifacts import TABLE_1
from train.loop import WATCHING
from train.study.experiment import Experiment
from train.trunk import LoRAOptions
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import Example, easy_vqa, load_task, source
from vlm_jax.data.example import TASK_FAMILIES
from vlm_jax.data.options import DataOptions
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import ModelOptions


@dataclasses.dataclass(frozen=True)
class Args(LoRAOptions, DataOptions, ModelOptions):
    """Trace knowledge and perception tasks, place LoRA where they differ, train, evaluate, print P0's Table 1."""

    placement: str = "task_diff"
    """Where LoRA goes: all, random, shared, task_diff, gradient_norm ... (docs/placement.md lists them), or a JSON file
    with module names such as ["L2-attn"]."""
    baselines: bool = True
    """Also train LoRA on all modules and on k random ones, to compare with."""
    k: int | None = None
    """Modules to place LoRA in; by default P0's share of them (10 of 72), which is 2 of the mini model's 16."""
    train: str = "450"
    """Training examples per task family, or a task, dataset or JSONL file to train on."""
    eval: str = "300"
    """Evaluation examples per task family, or a task, dataset or JSONL file to evaluate on."""
    trace: str = "96"
    """Examples to trace per task family, or a task, dataset or JSONL file to trace."""
    traces: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Run folders of finished traces to place LoRA by, instead of tracing: FAMILY FOLDER [FAMILY FOLDER]."""
    limit: int | None = None
    """At most so many examples of a named task, dataset or file."""
    random_seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED [SEED ...]")] = (42, 43, 44)
    """Seeds of the random placements, whose scores are averaged."""
    tracing: TraceOptions = dataclasses.field(default_factory=TraceOptions)
    metric: MetricOptions = dataclasses.field(default_factory=MetricOptions)
    answering: AnswerOptions = dataclasses.field(default_factory=AnswerOptions)
    out: Path = Path("runs/lora")
    """Run folder; a stopped run goes on from the stages it has finished."""


def examples_of(source: str, split: str, args: Args) -> dict[str, list[Example]]:
    """Examples by family, from a number per family, a task or dataset name or a JSONL file. Those of no family go by
    their task's name."""
    if source.lstrip("-").isdigit():
        return {family: load_task(family, split=split, limit=int(source), options=args) for family in TASK_FAMILIES}
    found: dict[str, list[Example]] = {}
    for example in load_task(source, split=split, limit=args.limit, options=args):
        found.setdefault(example.family or example.task, []).append(example)
    return found


def source_of(name: str, split: str, args: Args) -> dict:
    """For the manifest: see :func:`vlm_jax.data.source`."""
    return {} if name.isdigit() else source(name, split=split, options=args)


def conditions(args: Args, scoring: Scoring, families: list[str]) -> dict[str, list[dict[str, list[str]]]]:
    """Condition -> one placement (family -> module names) per seed, in the order of P0's Table 1."""
    k = modules_to_place(args, scoring.depth)
    labels = {"all": "LLM-all", "random": f"Random-{k}"}
    wanted = dict.fromkeys([*(labels if args.baselines else ()), args.placement])
    found = {}
    for name in wanted:
        seeds = args.random_seeds if find_placement(name).seeded else (args.seed,)
        title = f"File-{Path(name).stem}" if name.endswith(".json") else f"Top-{k}-{name.replace('_', '-')}"
        found[labels.get(name, title)] = [
            {family: choose_modules(name, scoring, family, k, seed) for family in families} for seed in seeds
        ]
    return found


def modules_to_place(args: Args, depth: int) -> int:
    """k: as given, or as many as the placement file names, or P0's share of the modules."""
    if args.k is None and args.placement.endswith(".json"):
        return len(read_names(Path(args.placement), depth))
    return check_k(args.k if args.k is not None else default_k(depth), depth)


def check_options(args: Args, depth: int) -> None:
    """Refuses options that cannot be, before anything is computed or written."""
    find_placement(args.placement)
    modules_to_place(args, depth)
    if args.placement.endswith(".json"):
        read_names(Path(args.placement), depth)
    for name in ("r", "epochs", "batch", "accumulation"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: give at least 1")
    if not args.random_seeds or min(args.seed, *args.random_seeds) < 0:
        raise UserError("--seed and --random-seeds must be 0 or more: give at least one random seed")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout is {args.dropout}: give a number from 0 to below 1")
    args.tracing.check(depth)
    args.tracing.check_modules()


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    train, test = examples_of(args.train, "train", args), examples_of(args.eval, "test", args)
    held_out = list(itertools.chain(*test.values()))
    check_disjoint(itertools.chain(*train.values()), held_out)
    families = [family for family in train if family in test]
    if not families:
        raise UserError(f"--train has {' and '.join(train)}, --eval has {' and '.join(test)}: they share no family")
    needed = find_placement(args.placement).needs
    to_score = list(TASK_FAMILIES) if args.placement == "task_diff" else families
    own = needed is not None and not set(to_score) <= set(args.traces)
    traced = examples_of(args.trace, "trace", args) if own else {}
    check_disjoint(itertools.chain(*traced.values()), held_out)
    missing = [family for family in to_score if needed and family not in {*traced, *args.traces}]
    if missing:
        raise UserError(
            f"placement {args.placement!r} needs traced examples of {' and '.join(missing)}: --trace has none"
        )
    for family in families:
        metrics.check(test[family], args.metric)
    model, processor = args.load()
    depth = model.config.text.num_hidden_layers
    check_options(args, depth)
    given = {family: read_trace(folder, fingerprint(model)) for family, folder in args.traces.items()}
    run = Run.open(args.out, args, model.config, processor, ignored=WATCHING)
    sources = {"train": args.train, "test": args.eval, **({"trace": args.trace} if own else {})}
    run.pin("data", {split: source_of(name, split, args) for split, name in sources.items()})
    run.pin("model", fingerprint(model))
    training = LoRAOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LoRAOptions)})
    options = (args.tracing, training, args.metric, args.answering)
    experiment = Experiment(run, "", model, processor, traced, train, test, *options)
    experiment.check()
    scores = {}
    if needed:
        scores[needed] = {f: given[f] if f in given else experiment.scores(needed, f) for f in to_score}
    scoring = Scoring(depth, module_sizes(model), scores)
    for family in (f for f in to_score if needed == "rr" and f not in given):
        summary = experiment.trace(family)
        print(
            f"{family}: traced {summary['samples']} samples, TE <= 0 in {summary['te_not_positive']}, "
            f"most restored by {', '.join(summary['ranking'][:4])}"
        )
    if len(rr := scores.get("rr", {})) == 2:
        save_figure(run, "trace/heatmap", heatmap, "Restoration rate by layer and module", panels=rr)
        (one, a), (other, b) = ((family, normalised(values)) for family, values in rr.items())
        difference = {f"{one} - {other}": a - b}
        title, label = "Difference of the families' normalised restoration rates", "difference of normalised RR"
        save_figure(run, "trace/difference", heatmap, title, panels=difference, label=label)

    rows = [{"condition": "Baseline", "parameters": None, "placement": None}]
    rows[0] |= {family: [_brief(experiment.baseline(family))] for family in families}
    for condition, placements in conditions(args, scoring, families).items():
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
    print(f"\nAccuracy ({args.metric.metric}) on held-out examples after LoRA training; ± is the standard error.")
    print(f"\n{table}")
    for family in families:
        easy_vqa.show_baseline(test[family])
    print(f"{time.perf_counter() - started:.0f} s; adapters, samples and figures are in {args.out}")


def _brief(found: dict) -> dict:
    return {name: value for name, value in found.items() if name not in ("scores", "clusters")}


def table1(rows: list[dict], families: list[str]) -> str:
    """P0's Table 1 as Markdown: accuracy per family, and trainable parameters.

    Args:
        rows: ``condition``, ``parameters`` (family -> count, or None) and per family a list of scores, one per seed.
    """
    header = ("LoRA target", *families, "trainable parameters")
    cells = [
        (row["condition"], *(_accuracy(row[family]) for family in families), _parameters(row["parameters"]))
        for row in rows
    ]
    return Table(header, cells).markdown()


def _accuracy(scores: list[dict]) -> str:
    mean = np.mean([score["accuracy"] for score in scores])
    # Seeds share their samples, so averaging over them does not shrink the sampling error.
    error = np.mean([score["stderr"] for score in scores])
    return f"{mean:.3f} ± {error:.3f}"


def _parameters(counts: dict[str, float] | None) -> str:
    if counts is None:
        return "-"
    return " / ".join(dict.fromkeys(f"{count:,.0f}" for count in counts.values()))


if __name__ == "__main__":
    main(tyro.cli(Args))
