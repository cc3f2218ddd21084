"""Accuracy of a model on a task: without changes, with a LoRA adapter, or under a saved intervention.

python -m eval.accuracy --task mini-docvqa --limit 300 --out runs/docvqa
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eval.artifacts import LMMS_EVAL_SAMPLES, RESULTS
from eval.evaluation import AnswerOptions, Scored, answer_and_score
from eval.judging import METRICS, MetricOptions, check_metric
from eval.results import file_name, lmms_eval_results, lmms_eval_samples
from interventions.kinds.packed import digest
from interventions.options import StateOptions
from interventions.statistics import interval_text
from vlm_jax.data import easy_vqa, source
from vlm_jax.data.options import DataOptions
from vlm_jax.prompts import prompt_of
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import Range
from vlm_jax.runs.startup import load_examples, start


@dataclasses.dataclass(frozen=True)
class Args(AnswerOptions, MetricOptions, StateOptions, DataOptions, ModelOptions):
    """Let a model answer the questions of a task, and score the answers.

    The prompt and the default metric (exact match) are those of P0, the first paper in README.md. With --metric task,
    answers are scored as the task's benchmark scores them.
    """

    task: str = "mini-okvqa"
    """The task to score: a task's name (docs/data.md lists them), a family of tasks (knowledge, perception,
    p0-knowledge ...), a JSONL file or a folder."""
    steps: Literal["all", "prefill"] = "all"
    """Where interventions act. all: on the prompt and on generated tokens; prefill: on the prompt only. An adapter acts
    on every token."""
    split: str = "test"
    """Which part of a named task to use: trace, train, eval or test. For a public dataset, all gives every row that its
    benchmark scores."""
    limit: Annotated[int | None, Range(least=1)] = 300
    """Largest number of samples to evaluate; None for all of them."""
    out: Path = Path("runs/accuracy")
    """Folder for the results: results.json, samples.jsonl, and samples_TASK.jsonl in the format of lmms-eval. A stopped
    run with the same options continues there."""


def show(task: str, scores: Scored) -> None:
    """Prints the main value of every task's metrics and the mean score over all samples, with 95 % intervals."""
    for name, parts in scores.summaries.items():
        for metric, summary in parts.items():
            headline = METRICS[metric].headline
            value, title = summary.values[headline], "" if headline == "exact_match" else f" {headline}"
            unread = f", {summary.unparsed} unread" if summary.unparsed else ""
            unread += f", {summary.incomplete} incomplete groups" if summary.incomplete else ""
            print(f"{name or task:20s} {value}  ({summary.samples} samples{unread}){title}")
    print(f"{'all':20s} {interval_text(scores.results, 'accuracy')}  ({scores.results['samples']} samples)")


def metric_options(args: Args) -> dict:
    """The options that change scores and that P0 does not specify."""
    return {"normalisation": args.normalisation, "multi_gold": args.multi_gold, "choices": args.choices}


def in_lmms_eval_shape(args: Args, scores: Scored, samples: dict[str, list[dict]], prompt: str) -> dict:
    """The part of ``results.json`` that has lmms-eval's keys. ``prompt``: the questions', with ``{QUESTION}``."""
    whole = args.limit is None or sum(map(len, samples.values())) < args.limit
    names = ("dtype", "weights", "min_pixels", "max_pixels", "steps")
    model_args = {"pretrained": args.model} | {name: getattr(args, name) for name in names}
    for name in ("adapter", "adapter_weights", "intervention"):
        model_args[name] = ";".join(map(str, getattr(args, name))) or None
    return lmms_eval_results(
        scores.summaries,
        samples,
        config={
            "model": "vlm_jax",
            "model_args": ",".join(f"{name}={value}" for name, value in model_args.items() if value is not None),
            "batch_size": args.batch,
            "limit": args.limit,
        },
        task_config={
            "doc_to_text": prompt,
            "test_split": args.split,
            "generation_kwargs": {"max_new_tokens": args.max_new_tokens, "temperature": 0, "do_sample": False},
            "metadata": metric_options(args),
        },
        original={task: len(lines) if whole else None for task, lines in samples.items()},
    )


@command
def main(args: Args) -> None:
    examples = load_examples(args.task, split=args.split, limit=args.limit, options=args)
    check_metric(examples, args)
    data = source(args.task, split=args.split, options=args)
    run, model, processor = start(args, examples, data, with_answer=False)
    model, interventions = args.applied(run, model, args.model)
    answers, scores = answer_and_score(
        run,
        "",
        model,
        processor,
        examples,
        args,
        args,
        interventions=interventions,
        steps=args.steps,
        title=args.task,
        label=args.task,
    )
    results = {
        "task": args.task,
        "metric": args.metric,
        "metric_options": metric_options(args),
        "compiled_shapes": answers.compiled_shapes,
        "interventions": digest(interventions),
        **scores.results,
    }
    prompts = [prompt_of(example).replace("{QUESTION}", example.question) for example in examples]
    samples = lmms_eval_samples(examples, prompts, answers.texts, scores.judged, args)
    for task, lines in samples.items():
        artifact = Artifact("samples", f"{task}: scored answers as lmms-eval writes them", LMMS_EVAL_SAMPLES)
        run.save_lines(f"samples_{file_name(task)}.jsonl", lines, artifact)
    content = {**results, **in_lmms_eval_shape(args, scores, samples, prompt_of(examples[0]))}
    run.save_json("results.json", content, Artifact("metrics", f"{args.task}: accuracy", RESULTS))
    show(args.task, scores)
    easy_vqa.show_baseline(examples)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
