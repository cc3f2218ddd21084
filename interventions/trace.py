"""P0: causal tracing of a task's examples, with everything that the paper leaves open as an option.

python -m interventions.trace --task mini-okvqa --limit 64 --out runs/trace
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import jax
import numpy as np
import tyro

from interventions import statistics
from interventions.corruption import (
    CORRUPTIONS,
    Corrupter,
    Survey,
    Surveyor,
    counterpart,
)
from interventions.figures import heatmap, intervals
from interventions.grids import MODULE_SITES, module_names, patch_grid, windows
from interventions.groups import label, members
from interventions.placement import PAPER_SHARE
from interventions.read import Difference, Gold
from interventions.sweep import PREFIX_BUCKET, Variants, sweep_runs
from vlm_jax import Inputs, Model
from vlm_jax.command import command
from vlm_jax.config import Config
from vlm_jax.data import Example, load_task, source, task_label
from vlm_jax.data.metrics import LETTERS, normalise
from vlm_jax.errors import UserError, nearest
from vlm_jax.fingerprint import fingerprint
from vlm_jax.log import Log
from vlm_jax.options import DataOptions, ModelOptions
from vlm_jax.processes import apart, fetch, progress
from vlm_jax.prompts import Batch, batches, check_fit, encode
from vlm_jax.runs import Run


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """How a task is traced. Every default is P0's choice, or ours where P0 is silent."""

    corruption: Literal[tuple(CORRUPTIONS)] = "question_noise"
    """How the prompt is corrupted: noise on the question's embeddings (P0) or on the image's, DeepStack included;
    another sample's question or image; the mean image embedding; blurred pixels."""
    noise_scale: float = 2.0
    """s of equation 5: noise has standard deviation s * sigma_E."""
    sigma: Literal["sequence", "question", "vocabulary"] = "sequence"
    """What sigma_E is measured on: all real tokens of the task's prompts (P0), their question tokens, or the embedding
    table. DeepStack's noise has sigmas of its own."""
    replicates: int = 1
    """Independent corruptions of every sample; all cells of a replicate meet the same one."""
    positions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GROUP [GROUP ...]")] = ("all",)
    """Tokens that a patch restores: all (P0), or groups such as question, last, image, answer; several are patched
    apart."""
    window: int = 1
    """Layers that a patch restores at once, around each layer (P0: 1; ROME: 10)."""
    heads: bool = False
    """Patch every attention head apart instead of attention and MLP outputs."""
    metric: Literal["probability", "log_probability", "logit_difference"] = "probability"
    """What TE and IE are differences of: the geometric mean probability of the gold tokens (P0), their mean
    log-probability, or the logit of the gold answer minus that of a foil where the two first differ."""
    gold: Literal["commonest", "shortest", "longest"] = "commonest"
    """Which of several gold answers is forced; the first where none is commonest."""
    correct_only: bool = False
    """Trace only samples whose gold tokens greedy decoding would write, whatever it writes behind them."""
    min_te: float = 0.01
    """Samples whose TE, in the metric's units, is below this do not enter RR: the ratio would be noise over noise."""
    eps: float = 1e-8
    """eps of equation 4."""
    statistic: Literal["mean_of_ratios", "ratio_of_means", "median"] = "mean_of_ratios"
    """How samples are summed up in the ranking: mean of IE / TE (P0), mean IE / mean TE, or median of IE / TE."""
    batch: int = 16
    """Samples per compiled call."""
    seed: int = 0
    """Seed of the noise and the swaps; a sample's do not depend on the batch that it is in."""

    def check(self, depth: int) -> None:
        """Refuses options that cannot be."""
        for field in dataclasses.fields(TraceOptions):
            known, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in known:
                raise UserError(f"unknown {field.name} {value!r}{nearest(str(value), known)}")
        for name, least in (("batch", 1), ("replicates", 1), ("seed", 0), ("eps", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least {least}")
        if not 0 < self.noise_scale < float("inf"):
            raise UserError(f"--noise-scale is {self.noise_scale}: give a number above 0")
        if not self.positions or len(set(self.positions)) < len(self.positions):
            named = " ".join(self.positions) or "empty"
            raise UserError(f"--positions is {named}: give at least one token group, such as all, each once")
        for group in self.positions:
            members(group)
        windows(depth, self.window)
        if self.replicates > 1 and not CORRUPTIONS[self.corruption].random:
            raise UserError(f"--corruption {self.corruption} leaves nothing to chance: drop --replicates")

    def check_modules(self) -> None:
        """Refuses options whose cells are not modules, for what places LoRA by them."""
        if self.heads or len(self.positions) > 1:
            raise UserError("placing LoRA needs one RR a module: drop --tracing.heads, give one of --tracing.positions")


class TaskTrace(NamedTuple):
    """A traced task as NumPy arrays: of N samples, R replicates and C cells ``p_clean (N,)``, ``p_corrupt (N, R)`` and
    ``ie (N, R, C)`` in the metric's units, and ``correct (N,)``: whether greedy decoding writes the gold answer."""

    ids: list[str]
    tasks: list[str]
    cells: list[str]
    p_clean: np.ndarray
    p_corrupt: np.ndarray
    ie: np.ndarray
    correct: np.ndarray
    sigma: float

    @property
    def te(self) -> np.ndarray:
        """TE of every sample and replicate ``(N, R)``."""
        return self.p_clean[:, None] - self.p_corrupt


def trace_examples(
    model: Model, processor, examples: list[Example], options: TraceOptions, label: str, log: Log | None = None
) -> TaskTrace:
    """Traces every example.

    Args:
        log: where results go as they come, and where those of an earlier session are.
    """
    options.check(model.config.text.num_hidden_layers)
    examples = [forced(example, options.gold) for example in examples]
    if options.correct_only:
        examples = answered(model, processor, examples, options.batch)
    log, ids = Log() if log is None else log, [example.id for example in examples]
    with apart(model) as (team, model):
        own = team.own(len(examples))

        def groups() -> Iterator[tuple[list[int], Batch]]:
            mine = [examples[row] for row in own]
            for rows, batch in batches(mine, processor, model.config, options.batch, align=PREFIX_BUCKET):
                yield [own[row] for row in rows], batch

        found = survey(model, groups())
        if CORRUPTIONS[options.corruption].visual and found.mean_image is None:
            raise UserError(
                f"--corruption {options.corruption} needs images, and no sample has one: corrupt the question"
            )
        corrupt = Corrupter(model, processor, examples, found, options)
        part = log.part(team, ids)
        with progress(total=len(own), desc=f"trace {label}", unit="sample") as bar:
            for rows, batch in part.missing(groups(), ids):
                bar.update(len(part.records) - bar.n)
                part.append(trace_batch(corrupt, rows, batch))
                bar.update(len(rows))
    log.join(part, ids, team)
    by_id = {record["id"]: record for record in log.records}
    kept = [by_id[example.id] for example in examples]
    columns = {name: np.array([record[name] for record in kept]) for name in ("p_clean", "p_corrupt", "ie", "correct")}
    return TaskTrace(
        [example.id for example in examples],
        [example.task for example in examples],
        cell_names(model.config, options),
        sigma=found.sigma[options.sigma],
        **columns,
    )


def trace_batch(corrupt: Corrupter, rows: Sequence[int], batch: Batch) -> list[dict]:
    """One record a sample of a batch, whose examples are those of ``rows``: ``id, correct, p_clean, p_corrupt (R,)``
    and ``ie (R, C)`` as JSON has them."""
    model, options = corrupt.model, corrupt.options
    examples = [corrupt.examples[row] for row in rows]
    read = gold = Gold.of(batch.inputs, batch.spans["answer"])
    if options.metric == "logit_difference":
        read = _difference(corrupt, rows, batch)
    variants, shape = grid(model.config, options, batch)
    features = _features(model, batch.inputs)
    p_corrupt, ie = [], []
    for replicate in range(options.replicates):
        base = corrupt(rows, batch, replicate)
        runs = sweep_runs(model, batch.inputs, variants, read, base=base, clean=(), features=features)
        clean, corrupted, patched = (measured(r, options.metric) for r in (runs.clean, runs.base, runs.variants))
        patched = patched.reshape(*shape, -1).swapaxes(0, 1).reshape(len(variants), -1)  # layer by layer
        p_corrupt.append(corrupted)
        ie.append((patched - corrupted).T)
    scores = runs.clean if read is gold else _scores(model, batch.inputs, gold.replace(first=0))
    correct = fetch(scores.correct)
    return [
        {
            "id": example.id,
            "task": example.task,
            "correct": bool(correct[i]),
            "p_clean": _short(clean[i]),
            "p_corrupt": [_short(p[i]) for p in p_corrupt],
            "ie": [[_short(value) for value in cells[i]] for cells in ie],
        }
        for i, example in enumerate(examples)
    ]


def _difference(corrupt: Corrupter, rows: Sequence[int], batch: Batch) -> Difference:
    examples = corrupt.examples
    foils = [dataclasses.replace(examples[row], answers=(foil(examples, row),)) for row in rows]
    foils += foils[-1:] * (len(batch.inputs.input_ids) - len(rows))
    encoded = encode(foils, corrupt.processor, corrupt.model.config)
    return Difference.of(batch.inputs, batch.spans["answer"] | batch.spans["end"], encoded.inputs)


def survey(model: Model, groups: Iterable[tuple[Sequence[int], Batch]]) -> Survey:
    """What corruptions need to know of a whole task, from all its batches."""
    surveyor = Surveyor(model)
    for rows, batch in groups:
        surveyor.add(batch, len(rows))
    return surveyor.survey()


@jax.jit
def _features(model: Model, inputs: Inputs):
    return model.features(inputs)[0]


@jax.jit
def _scores(model: Model, inputs: Inputs, gold: Gold):
    embedded, _ = model.embed(inputs)
    x, _, _ = model.text.scan(embedded.x, model.window(inputs), deepstack=embedded.deepstack)
    return gold(model, model.text.norm(x), 0)


def _short(value: np.float32) -> float:
    """The float with the fewest digits that is the same float32."""
    return float(str(np.float32(value)))


def measured(scores, metric: str) -> np.ndarray:
    """What a run's read-out is in the metric's units, ``(..., B)``."""
    match metric:
        case "probability":
            return fetch(scores.probability)
        case "log_probability":
            return fetch(scores.log_probability)
        case "logit_difference":
            return fetch(scores)


def forced(example: Example, rule: str) -> Example:
    """The example with the gold string of a rule in front."""
    if rule == "commonest":  # as they come
        return example
    answers = sorted(example.answers, key=len, reverse=rule == "longest")
    return dataclasses.replace(example, answers=tuple(answers))


def foil(examples: Sequence[Example], row: int) -> str:
    """A wrong answer to compare with: another choice, or where there is none the answer of another sample."""
    example = examples[row]
    right = {normalise(answer) for answer in example.answers}
    choices, gold = example.choices or (), example.gold
    if choices and gold is not None and example.answers[0] not in choices and example.answers[0] in set(LETTERS):
        choices = LETTERS[: len(choices)]  # which the question asks for
    wrong = [choice for i, choice in enumerate(choices) if i != gold and normalise(choice) not in right]
    return wrong[0] if wrong else counterpart(examples, row).answers[0]


def answered(model: Model, processor, examples: list[Example], size: int) -> list[Example]:
    """The examples whose gold answer greedy decoding would write."""
    right = np.zeros(len(examples), bool)
    for rows, batch in batches(examples, processor, model.config, size, align=PREFIX_BUCKET):
        gold = Gold.of(batch.inputs, batch.spans["answer"]).replace(first=0)
        right[rows] = fetch(_scores(model, batch.inputs, gold).correct)[: len(rows)]
    kept = [example for example, keep in zip(examples, right, strict=True) if keep]
    if not kept:
        raise UserError("the model answers no sample rightly: drop --correct-only or choose other samples")
    return kept


def grid(config: Config, options: TraceOptions, batch: Batch) -> tuple[Variants, tuple[int, ...]]:
    """The patches of a batch, and the shape of their grid: sites, layers, then heads and token groups if any."""
    tokens = None
    if options.positions != ("all",):
        labels = label(batch)
        tokens = [np.isin(labels, members(group)) for group in options.positions]
        for group, mask in zip(options.positions, tokens, strict=True):
            if not mask.any():
                raise UserError(f"--positions {group}: a batch of samples has no such token, choose other groups")
    depth, window = config.text.num_hidden_layers, options.window
    if options.heads:
        heads = config.text.num_attention_heads
        return patch_grid(("text.head_out",), depth, window=window, heads=heads, tokens=tokens)
    return patch_grid(MODULE_SITES, depth, window=window, tokens=tokens)


def cell_names(config: Config, options: TraceOptions) -> list[str]:
    """``L0-attn, L0-mlp, L1-attn, ...``; heads are ``L0-H0, L0-H1, ...``; of several token groups each is named:
    ``L0-attn@question, L0-attn@last, ...``."""
    depth = config.text.num_hidden_layers
    heads = range(config.text.num_attention_heads)
    names = [f"L{layer}-H{head}" for layer in range(depth) for head in heads] if options.heads else module_names(depth)
    groups = [f"@{group}" for group in options.positions] if len(options.positions) > 1 else [""]
    return [name + group for name in names for group in groups]


def summarise(traced: TaskTrace, options: TraceOptions) -> dict:
    """What ``summary.json`` says of a traced task: RR of every cell by the chosen statistic with its 95 % bootstrap
    interval over samples, the ranking, all statistics side by side, how stable the ranking is, and counts."""
    te, how = traced.te, {"min_te": options.min_te, "eps": options.eps}
    rows = statistics.summary(te, traced.ie, traced.cells, seed=options.seed, **how)
    chosen = [row for row in rows if row["statistic"] == options.statistic]
    if not chosen:  # says why
        statistics.rr(te, traced.ie, statistic=options.statistic, **how)
    ranked = sorted(chosen, key=lambda row: row["rank"])
    try:
        top = sorted({max(1, round(PAPER_SHARE * len(traced.cells))), 10})
        how |= {"seed": options.seed, "statistic": options.statistic}
        stability = statistics.rank_stability(te, traced.ie, top=top, **how)
    except UserError:  # too few samples to be halved
        stability = []
    return {
        "samples": len(te),
        "replicates": te.shape[1],
        "te_not_positive": int((te.mean(1) <= 0).sum()),
        "excluded_by_min_te": int((te.mean(1) < options.min_te).sum()),
        "correct": float(traced.correct.mean()),
        "p_clean": float(traced.p_clean.mean()),
        "p_corrupt": float(traced.p_corrupt.mean()),
        "sigma_E": traced.sigma,
        "statistic": options.statistic,
        "ranking": [row["cell"] for row in ranked],
        "rr": {row["cell"]: row["rr"] for row in chosen},
        "tasks": {task: rates for task in dict.fromkeys(traced.tasks) if (rates := _of_task(traced, task, options))},
        "stability": stability,
        "cells": rows,
    }


def _of_task(traced: TaskTrace, task: str, options: TraceOptions) -> dict[str, float]:
    """RR of every cell in one of the tasks of a family, none where no sample of it counts."""
    here = np.array(traced.tasks) == task
    how = {"min_te": options.min_te, "eps": options.eps, "statistic": options.statistic}
    try:
        found = statistics.rr(traced.te[here], traced.ie[here], **how)
    except UserError:
        return {}
    return dict(zip(traced.cells, found.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Args(TraceOptions, DataOptions, ModelOptions):
    """Trace which layers' attention and MLP outputs restore the answer when the prompt is corrupted (P0)."""

    task: str = "mini-okvqa"
    """Task name, family (knowledge, perception), dataset or JSONL file."""
    limit: int = 96
    """Samples to trace."""
    out: Path = Path("runs/trace")
    """Run folder: samples.jsonl, trace.parquet, summary.json, summary.parquet, heatmap.png, intervals.png."""


@command
def main(args: Args) -> None:
    examples = load_task(args.task, split="trace", limit=args.limit, options=args)
    model, processor = args.load()
    args.check(model.config.text.num_hidden_layers)
    check_fit([forced(example, args.gold) for example in examples], processor, model.config)
    run = Run.open(args.out, args, model.config, processor)
    run.pin("data", source(args.task, split="trace", options=args))
    run.pin("model", fingerprint(model))
    summary = trace_task(run, "", model, processor, task_label(args.task), examples, args)
    print(
        f"{args.task}: {summary['samples']} samples, TE <= 0 in {summary['te_not_positive']}, "
        f"p_clean {summary['p_clean']:.3f}, p_corrupt {summary['p_corrupt']:.3f}"
    )
    rows = {row["cell"]: row for row in summary["cells"] if row["statistic"] == args.statistic}
    for name in summary["ranking"][:10]:
        print(f"  {name:10s} RR {rows[name]['rr']:+.3f}  [{rows[name]['low']:+.3f}, {rows[name]['high']:+.3f}]")
    print(f"written to {args.out}")


def trace_task(
    run: Run, folder: str, model: Model, processor, task: str, examples: list[Example], options: TraceOptions
) -> dict:
    """The summary of a task that is traced into ``folder`` of a run, now or in an earlier session, with its files:
    ``samples.jsonl`` as results come; ``summary.json``, ``summary.parquet``, ``trace.parquet`` and figures."""

    def make() -> dict:
        begun = time.perf_counter()
        traced = trace_examples(model, processor, examples, options, task, run.log(f"{folder}samples.jsonl"))
        summary = {"task": task, "fingerprint": fingerprint(model), **summarise(traced, options)}
        run.write(f"{folder}trace.parquet", lambda path: statistics.tidy(path, {task: traced}, options.eps))
        run.write(f"{folder}summary.parquet", lambda path: statistics.tidy_summary(path, summary["cells"]))
        if set(traced.cells) == set(module_names(model.config.text.num_hidden_layers)):
            run.write(f"{folder}heatmap.png", lambda path: heatmap(path, {task: by_module(summary)}))
        found = {task: bounds(summary)}
        run.write(f"{folder}intervals.png", lambda path: intervals(path, traced.cells, found))
        run.timed(f"trace {folder or task}".rstrip("/"), begun)
        return summary

    return run.once(f"{folder}summary.json", make)


def bounds(summary: dict) -> statistics.Interval:
    """RR of every cell by the chosen statistic, with its interval over samples."""
    rows = [row for row in summary["cells"] if row["statistic"] == summary["statistic"]]
    return statistics.Interval(*(np.array([row[name] for row in rows]) for name in ("rr", "low", "high")))


def by_module(summary: dict) -> np.ndarray:
    """RR ``(L, 2)`` of a summary, last axis attention, MLP."""
    rates = summary["rr"]
    depth = len(rates) // 2
    return np.array([rates[name] for name in module_names(depth)]).reshape(depth, 2)


if __name__ == "__main__":
    main(tyro.cli(Args))
