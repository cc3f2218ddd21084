"""Runs P0's study on each model: traces, scores, placements, trainings and held-out results."""

from collections.abc import Iterator
from pathlib import Path

from eval import judging as metrics
from interventions.modules import module_names
from interventions.placement.rules import choose_modules, find_placement
from train.study.experiment import Experiment
from train.study.placement.options import Args, conditions
from vlm_jax.data import Example
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.errors import UserError
from vlm_jax.runs.folder import Run
from vlm_jax.runs.processes import progress
from vlm_jax.runs.startup import load_examples


def examples_by_split(args: Args) -> list[dict[str, list[Example]]]:
    """The examples to trace, to train on and to test on: for each of these, family -> examples.

    Raises:
        UserError: if a family has too few examples, if test examples are also trained on or traced, or if the metric
            cannot score the examples.
    """
    sizes = {"trace": args.trace, "train": args.train, "test": args.eval}
    by_split = [
        {family: load_examples(family, split=split, limit=limit, options=args) for family in args.families}
        for split, limit in sizes.items()
    ]
    for (split, limit), parts in zip(sizes.items(), by_split, strict=True):
        for family, examples in parts.items():
            if len(examples) < limit:
                flag = {"test": "eval"}.get(split, split)
                raise UserError(f"{family} has {len(examples)} examples to {flag}, not {limit}: lower --{flag}")
    traced, train, test = by_split
    for family in args.families:
        check_disjoint([*traced[family], *train[family]], test[family])
        metrics.check_metric(test[family], args.metric)
    return by_split


def experiments(args: Args, run: Run, traced: dict, trained: dict, tested: dict) -> Iterator[Experiment]:
    """One :class:`Experiment` for each model. A model is loaded when the loop reaches it."""
    for name in args.models:
        model, processor = args.load_model(name)
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


def run_study(args: Args, experiment: Experiment) -> dict:
    """Runs the study on one model.

    Returns:
        ``depth``: the number of layers. ``scores``: name -> family -> the score of every module. ``records``: for each
        family, condition and run, the modules with LoRA and the held-out results.
    """
    families, depth = list(args.families), experiment.depth
    todo = conditions(args, depth)
    needs = dict.fromkeys(["rr", *(find_placement(c.placement).needs for c in todo)])
    scoring = experiment.scoring([name for name in needs if name], families)
    for kind in args.corruptions:
        for family in families:
            experiment.trace(family, corruption=kind)
    cells = [
        (
            family,
            condition.placement,
            condition.k,
            choose_modules(condition.placement, scoring, family, condition.k, chosen),
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
        result = experiment.cell(family, names, seed)
        records.append({"family": family, "placement": placement, "k": k, "names": names, "seed": seed, **result})
    for record in records:
        record["parameters"] = experiment.adapter_parameters(record["names"]) if record["names"] else 0
    scores = {name: {f: score.tolist() for f, score in by.items()} for name, by in scoring.scores.items()}
    return {"depth": depth, "scores": scores, "records": records}
