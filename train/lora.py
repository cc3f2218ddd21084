"""P0's study in one command: trace, place LoRA, train it there and nowhere else, evaluate beside the baselines.

python -m train.lora --placement task_diff --out runs/demo
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from eval.accuracy import answer, score
from eval.tables import table1
from interventions.adapters import load_peft, merge, parameters, save_peft
from interventions.figures import heatmap
from interventions.placement import (
    PLACEMENTS,
    check_k,
    default_k,
    normalised,
    random_k,
    read_names,
    shared,
    task_diff,
)
from interventions.trace import Trace, TraceOptions, module_names, summarise, trace_examples
from train.trunk import LoRAOptions, train_lora
from vlm_jax import Model
from vlm_jax.data import Example, load_task
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError, command, nearest
from vlm_jax.options import ModelOptions
from vlm_jax.prompts import Batch, check_fit, encode
from vlm_jax.runs import Run

FAMILIES = ("knowledge", "perception")


@dataclasses.dataclass(frozen=True)
class Args(LoRAOptions, ModelOptions):
    """Trace knowledge and perception tasks, place LoRA where they differ, train, evaluate, print P0's Table 1."""

    placement: str = "task_diff"
    """Where LoRA goes: all, random, shared, task_diff, or a JSON file with module names such as ["L2-attn"]."""
    baselines: bool = True
    """Also train LoRA on all modules and on k random ones, to compare with."""
    k: int | None = None
    """Modules to place LoRA in; by default P0's share of them (10 of 72), which is 2 of the mini model's 16."""
    train: str = "450"
    """Training examples per task family, or a task name or JSONL file to train on."""
    eval: str = "300"
    """Evaluation examples per task family, or a task name or JSONL file to evaluate on."""
    trace: str = "96"
    """Examples to trace per task family, or a task name or JSONL file to trace."""
    random_seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED [SEED ...]")] = (42, 43, 44)
    """Seeds of the random placements, whose scores are averaged."""
    noise_scale: float = 2.0
    """s of equation 5: noise has standard deviation s * sigma_E."""
    min_te: float = 0.01
    """Samples whose TE is below this do not enter RR_mean."""
    out: Path = Path("runs/lora")
    """Run folder; a stopped run goes on from the stages it has finished."""


def examples_of(source: str, split: str) -> dict[str, list[Example]]:
    """Examples by family, from a number per family, a task name or a JSONL file."""
    if source.lstrip("-").isdigit():
        return {family: load_task(family, split=split, limit=int(source)) for family in FAMILIES}
    found: dict[str, list[Example]] = {}
    for example in load_task(source, split=split):
        if example.family is None:
            raise UserError(
                f'{source}: example {example.id!r} has no "family": add "knowledge" or "perception" to every line'
            )
        found.setdefault(example.family, []).append(example)
    return {family: found[family] for family in FAMILIES if family in found}


def conditions(
    args: Args, model: Model, rr_mean: dict[str, np.ndarray], families: list[str]
) -> dict[str, list[dict[str, list[str]]]]:
    """Condition -> one placement (family -> module names) per seed, in the order of P0's Table 1."""
    depth = model.config.text.num_hidden_layers
    k = modules_to_place(args, depth)
    every = {family: module_names(depth) for family in families}
    randoms = [{family: random_k(depth, k, seed) for family in families} for seed in args.random_seeds]
    found = {"LLM-all": [every], f"Random-{k}": randoms} if args.baselines else {}
    match args.placement:
        case "all":
            found["LLM-all"] = [every]
        case "random":
            found[f"Random-{k}"] = randoms
        case "shared":
            found[f"Top-{k}-shared"] = [{family: shared(rr_mean[family], k) for family in families}]
        case "task_diff":
            other = dict(zip(FAMILIES, reversed(FAMILIES), strict=True))
            found[f"Top-{k}-task-diff"] = [
                {family: task_diff(rr_mean[family], rr_mean[other[family]], k) for family in families}
            ]
        case path:
            names = read_names(Path(path), depth)
            found[f"File-{Path(path).stem}"] = [dict.fromkeys(families, names)]
    return found


def modules_to_place(args: Args, depth: int) -> int:
    """k: as given, or as many as the placement file names, or P0's share of the modules."""
    if args.k is None and args.placement.endswith(".json"):
        return len(read_names(Path(args.placement), depth))
    return check_k(args.k if args.k is not None else default_k(depth), depth)


def check_options(args: Args, depth: int) -> None:
    """Refuses options that cannot be, before anything is computed or written."""
    modules_to_place(args, depth)
    if args.placement not in PLACEMENTS:
        if not args.placement.endswith(".json"):
            raise UserError(
                f"unknown placement {args.placement!r}{nearest(args.placement, PLACEMENTS)} (or give a .json file)"
            )
        read_names(Path(args.placement), depth)
    for name in ("r", "epochs", "batch", "accumulation"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: give at least 1")
    if not args.random_seeds or min(args.seed, *args.random_seeds) < 0:
        raise UserError("--seed and --random-seeds must be 0 or more: give at least one random seed")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout is {args.dropout}: give a number from 0 to below 1")


@command
def main(args: Args) -> None:
    started = time.perf_counter()
    train, test = examples_of(args.train, "train"), examples_of(args.eval, "test")
    check_disjoint(itertools.chain(*train.values()), itertools.chain(*test.values()))
    families = [family for family in train if family in test]
    if not families:
        raise UserError(f"--train has {' and '.join(train)}, --eval has {' and '.join(test)}: they share no family")
    needs_trace = args.placement in ("shared", "task_diff")
    traced = examples_of(args.trace, "trace") if needs_trace else {}
    missing = [f for f in (FAMILIES if args.placement == "task_diff" else families) if needs_trace and f not in traced]
    if missing:
        raise UserError(
            f"placement {args.placement!r} needs traced examples of {' and '.join(missing)}: --trace has none"
        )
    model, processor = args.load()
    check_options(args, model.config.text.num_hidden_layers)
    run = Run.open(args.out, args, model.config, processor)
    for examples in (*train.values(), *test.values(), *traced.values()):
        check_fit(examples, processor, model.config)

    options = TraceOptions(noise_scale=args.noise_scale, min_te=args.min_te, seed=args.seed)
    rr_mean = {}
    for family, examples in traced.items():
        rr_mean[family] = trace_family(run, model, processor, family, examples, options)
    if set(rr_mean) == set(FAMILIES):
        a, b = (normalised(rr_mean[family]) for family in FAMILIES)
        run.write("trace/heatmap.png", lambda path: heatmap(path, rr_mean))
        difference = {"knowledge - perception": a - b}
        run.write("trace/difference.png", lambda path: heatmap(path, difference, label="difference of normalised RR"))

    def evaluate(name: str, family: str, model: Model = model) -> dict:
        def make():
            begun = time.perf_counter()
            predictions = answer(model, processor, test[family], label=family)
            results, records = score(test[family], predictions.texts)
            run.save_lines(f"samples/{name}/{family}.jsonl", records)
            run.timed(f"evaluate {name} {family}", begun)
            return results

        return run.once(f"scores/{name}/{family}.json", make)

    rows = [{"condition": "Baseline", "parameters": None, "placement": None}]
    rows[0] |= {family: [evaluate("Baseline", family)] for family in families}
    encoded: dict[str, Batch] = {}
    for condition, placements in conditions(args, model, rr_mean, families).items():
        row = {"condition": condition, "placement": placements, **{family: [] for family in families}}
        row["parameters"] = {f: float(np.mean([parameters(model, p[f], args.r) for p in placements])) for f in families}
        for number, placement in enumerate(placements):
            name = condition if len(placements) == 1 else f"{condition}/{args.random_seeds[number]}"
            for family in families:
                folder = run.path(f"adapters/{name}/{family}")
                if not folder.is_dir():
                    begun = time.perf_counter()
                    if family not in encoded:
                        encoded[family] = encode(train[family], processor, model.config)
                    lora = train_lora(model, placement[family], encoded[family], args, f"{name} {family}")
                    save_peft(lora, model, folder)
                    run.timed(f"train {name} {family}", begun)
                row[family].append(evaluate(name, family, merge(model, load_peft(model, folder))))
        rows.append(row)
    run.save_json("results.json", {"rows": rows})
    table = table1(rows, families)
    run.write("table.md", lambda path: path.write_text(table))
    print(f"\nAccuracy (exact match) on held-out examples after LoRA training; ± is the standard error.\n\n{table}")
    print(f"{time.perf_counter() - started:.0f} s; adapters, samples and figures are in {args.out}")


def trace_family(run: Run, model: Model, processor, family: str, examples, options: TraceOptions) -> np.ndarray:
    """RR_mean ``(L, 2)`` of a family, traced now or read from an interrupted run."""

    def make() -> dict:
        begun = time.perf_counter()
        traced = trace_examples(model, processor, examples, options, family)
        trace: Trace = traced.trace
        summary = summarise(traced, options.min_te)
        run.save_arrays(f"trace/{family}.npz", **trace._asdict(), ids=np.array(traced.ids))
        run.timed(f"trace {family}", begun)
        return summary

    summary = run.once(f"trace/{family}.json", make)
    print(
        f"{family}: traced {summary['samples']} samples, TE <= 0 in {summary['te_not_positive']}, "
        f"most restored by {', '.join(summary['ranking'][:4])}"
    )
    return np.array(list(summary["rr_mean"].values())).reshape(-1, 2)


if __name__ == "__main__":
    main(tyro.cli(Args))
