"""Accuracy of a model on a task: as it is, with a LoRA adapter, or under a saved intervention.

python -m eval.accuracy --task mini-docvqa --limit 300 --out runs/docvqa
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

import vlm_jax
from eval.metrics import (
    METRICS,
    Judged,
    MetricOptions,
    Summary,
    check,
    clusters_of,
    judge,
    mean,
    metric_name,
    summarise_tasks,
)
from eval.results import file_name, lmms_eval_results, lmms_eval_samples
from interventions.adapters import load_peft, merge
from interventions.groups import bind
from interventions.store import describe, digest, load_interventions
from vlm_jax import Model
from vlm_jax.command import command
from vlm_jax.data import Example, easy_vqa, load_task, source
from vlm_jax.errors import UserError
from vlm_jax.fingerprint import fingerprint
from vlm_jax.log import Log
from vlm_jax.options import DataOptions, ModelOptions
from vlm_jax.processes import apart, fetch, gathered, progress
from vlm_jax.prompts import P0_PROMPT, batches, check_fit, shape_of
from vlm_jax.runs import Run, digests

#: Generation takes longer to compile than padding costs, so prompts of nearly any length share a shape.
_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated: greedily."""

    batch: int = 64
    """Samples per compiled call."""
    max_new_tokens: int = 12
    """Longest answer, in tokens."""

    def check(self) -> None:
        """Refuses options that cannot be."""
        for field in dataclasses.fields(AnswerOptions):
            if (value := getattr(self, field.name)) < 1:
                raise UserError(f"--{field.name.replace('_', '-')} is {value}: give at least 1")


@dataclasses.dataclass(frozen=True)
class Args(AnswerOptions, MetricOptions, DataOptions, ModelOptions):
    """Score a model's greedy answers to P0's prompt, by exact match or as the task's own benchmark does."""

    task: str = "mini-okvqa"
    """Task name, family (knowledge, perception, p0-knowledge ...), JSONL file or folder."""
    adapter: Path | None = None
    """PEFT folder of a LoRA adapter to evaluate with."""
    intervention: Path | None = None
    """File of saved interventions (interventions.store) to evaluate under, such as a cut that TaLo selected."""
    steps: Literal["all", "prefill"] = "all"
    """Whether interventions also act on generated tokens, or on the prompt only."""
    split: str = "test"
    """Split of a named task: trace, train, eval, test, or of a public dataset all that its benchmark scores."""
    limit: int | None = 300
    """Samples to evaluate."""
    out: Path = Path("runs/accuracy")
    """Run folder: results.json, samples.jsonl, and samples_TASK.jsonl in lmms-eval's shape."""


class Answers(NamedTuple):
    """The model's greedy answers, in the order of the examples, and how many shapes were compiled for them."""

    texts: list[str]
    compiled_shapes: int


def answer(
    model: Model,
    processor,
    examples: list[Example],
    interventions=(),
    *,
    batch: int = 64,
    max_new_tokens: int = 12,
    steps: Literal["all", "prefill"] = "all",
    label: str = "",
    prompt: str = P0_PROMPT,
    log: Log | None = None,
) -> Answers:
    """Greedy answers to a prompt, under interventions or without; token groups are looked up in every batch.

    Args:
        log: where answers go as they come, and where those of an earlier session are.
    """
    log, ids = Log() if log is None else log, [example.id for example in examples]
    shapes: set = set()
    with apart(model, interventions) as (team, model, interventions):
        own = team.own(len(examples))

        def groups():
            mine = [examples[row] for row in own]
            how = {"prompt": prompt, "step": _LENGTH_STEP, "with_answer": False}
            for rows, encoded in batches(mine, processor, model.config, batch, **how):
                shapes.add(shape_of(encoded))
                yield [own[row] for row in rows], encoded

        part = log.part(team, ids)
        with progress(total=len(own), desc=f"answer {label}".strip(), unit="sample", leave=False) as bar:
            for rows, encoded in part.missing(groups(), ids):
                bar.update(len(part.records) - bar.n)
                acting = bind(interventions, encoded)
                tokens = fetch(vlm_jax.generate(model, encoded.inputs, max_new_tokens, acting, steps=steps))
                texts = processor.tokenizer.batch_decode(tokens[: len(rows)], skip_special_tokens=True)
                part.append([{"id": ids[row], "answer": text.strip()} for row, text in zip(rows, texts, strict=True)])
                bar.update(len(rows))
    log.join(part, ids, team)
    by_id = {record["id"]: record["answer"] for record in log.records}
    compiled = set().union(*gathered(sorted(map(str, shapes))))
    return Answers([by_id[example.id] for example in examples], len(compiled))


class Scored(NamedTuple):
    """The scores of some answers: in all and per task, one by one, and as the metrics report them."""

    results: dict
    records: list[dict]
    judged: list[Judged]
    summaries: dict[str, dict[str, Summary]]


def scored(examples: list[Example], answers: list[str], options: MetricOptions) -> Scored:
    """Scores answers by a metric, or each by its task's own.

    ``results``: the mean score (``accuracy``) with its standard error, in all and per task, where ``metrics`` has the
    metric's own values. ``records``: a sample each; ``correct`` says whether the score is the full one.
    """
    judged = judge(examples, answers, options)
    summaries = summarise_tasks(examples, judged, options)
    records = [
        {
            "id": e.id,
            "task": e.task,
            "family": e.family,
            "question": e.question,
            "answers": list(e.answers),
            "prediction": a,
            "correct": j.score == 1,
            "metric": metric_name(e, options),
            "score": j.score,
            "read": j.read,
        }
        for e, a, j in zip(examples, answers, judged, strict=True)
    ]

    def accuracy(rows: list[int]) -> dict:
        found = mean([judged[row].score for row in rows], clusters_of([examples[row] for row in rows]))
        return {"accuracy": found.value, "stderr": found.stderr, "samples": len(rows)}

    tasks = {
        task: {
            **accuracy([row for row, e in enumerate(examples) if e.task == task]),
            "metrics": {name: summary.asdict() for name, summary in parts.items()},
        }
        for task, parts in summaries.items()
    }
    return Scored({**accuracy(list(range(len(examples)))), "tasks": tasks}, records, judged, summaries)


def score(examples: list[Example], answers: list[str], options: MetricOptions | None = None) -> tuple[dict, list[dict]]:
    """``results`` and ``records`` of :func:`scored`; P0's exact match by default."""
    found = scored(examples, answers, options or MetricOptions())
    return found.results, found.records


def show(task: str, scores: Scored) -> None:
    """Prints every task's headline, and the mean score over all of them."""
    for name, parts in scores.summaries.items():
        for metric, summary in parts.items():
            headline = METRICS[metric].headline
            value, title = summary.values[headline], "" if headline == "exact_match" else f" {headline}"
            unread = f", {summary.unparsed} unread" if summary.unparsed else ""
            unread += f", {summary.incomplete} incomplete groups" if summary.incomplete else ""
            score = f"{value.value:.3f} ± {value.stderr:.3f}"
            print(f"{name or task:20s} {score}  ({summary.samples} samples{unread}){title}")
    mean_score = f"{scores.results['accuracy']:.3f} ± {scores.results['stderr']:.3f}"
    print(f"{'all':20s} {mean_score}  ({scores.results['samples']} samples)")


def metric_options(args: Args) -> dict:
    """What P0 leaves open, as it was decided here."""
    return {"normalisation": args.normalisation, "multi_gold": args.multi_gold, "choices": args.choices}


def in_lmms_eval_shape(args: Args, found: Scored, samples: dict[str, list[dict]]) -> dict:
    """The keys of lmms-eval's results, for :func:`main`."""
    whole = args.limit is None or sum(map(len, samples.values())) < args.limit
    names = ("dtype", "min_pixels", "max_pixels", "adapter", "intervention", "steps")
    model_args = {"pretrained": args.model} | {name: getattr(args, name) for name in names}
    return lmms_eval_results(
        found.summaries,
        samples,
        config={
            "model": "vlm_jax",
            "model_args": ",".join(f"{name}={value}" for name, value in model_args.items() if value is not None),
            "batch_size": args.batch,
            "limit": args.limit,
        },
        task_config={
            "doc_to_text": P0_PROMPT,
            "test_split": args.split,
            "generation_kwargs": {"max_new_tokens": args.max_new_tokens, "temperature": 0, "do_sample": False},
            "metadata": metric_options(args),
        },
        original={task: len(lines) if whole else None for task, lines in samples.items()},
    )


@command
def main(args: Args) -> None:
    examples = load_task(args.task, split=args.split, limit=args.limit, options=args)
    args.check()
    check(examples, args)
    model, processor = args.load()
    pinned = {"model": fingerprint(model)}
    if args.adapter is not None:  # part of the model: it acts on every token whatever --steps says
        model = merge(model, load_peft(model, args.adapter))
        pinned["adapter"] = digests(args.adapter)
    interventions = () if args.intervention is None else load_interventions(args.intervention)
    for intervention in interventions:
        print(describe(intervention))
    check_fit(examples, processor, model.config, with_answer=False)
    run = Run.open(args.out, args, model.config, processor)
    run.pin("data", source(args.task, split=args.split, options=args))
    for name, value in pinned.items():
        run.pin(name, value)
    begun = time.perf_counter()
    answers = answer(
        model,
        processor,
        examples,
        interventions,
        batch=args.batch,
        max_new_tokens=args.max_new_tokens,
        steps=args.steps,
        label=args.task,
        log=run.log("predictions.jsonl"),
    )
    run.timed("answer", begun)
    found = scored(examples, answers.texts, args)
    results = {
        "task": args.task,
        "metric": args.metric,
        "metric_options": metric_options(args),
        "compiled_shapes": answers.compiled_shapes,
        "interventions": digest(interventions),
        **found.results,
    }
    run.save_lines("samples.jsonl", found.records)
    prompts = [P0_PROMPT.replace("{QUESTION}", example.question) for example in examples]
    samples = lmms_eval_samples(examples, prompts, answers.texts, found.judged, args)
    for task, lines in samples.items():
        run.save_lines(f"samples_{file_name(task)}.jsonl", lines)
    run.save_json("results.json", {**results, **in_lmms_eval_shape(args, found, samples)})
    show(args.task, found)
    easy_vqa.show_baseline(examples)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
