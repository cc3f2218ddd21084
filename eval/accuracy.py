"""Accuracy of a model on a task: as it is, with a LoRA adapter, or under a saved intervention.

python -m eval.accuracy --task mini-docvqa --limit 300 --out runs/docvqa
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import tyro

from eval.artifacts import LMMS_EVAL_SAMPLES, RESULTS, SAMPLES
from eval.evaluation import AnswerOptions, Scored, answer, scored
from eval.judging import METRICS, MetricOptions, check
from eval.results import file_name, lmms_eval_results, lmms_eval_samples
from interventions.placement.adapters import load_peft, merge
from interventions.store import describe, digest, load_interventions
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import easy_vqa, load_task, source
from vlm_jax.data.options import DataOptions
from vlm_jax.prompts import P0_PROMPT, check_fit
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run, digests
from vlm_jax.runs.options import ModelOptions


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
        log=run.log("predictions.jsonl", None),
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
    run.save_lines("samples.jsonl", found.records, Artifact("samples", f"{args.task}: scored answers", SAMPLES))
    prompts = [P0_PROMPT.replace("{QUESTION}", example.question) for example in examples]
    samples = lmms_eval_samples(examples, prompts, answers.texts, found.judged, args)
    for task, lines in samples.items():
        artifact = Artifact("samples", f"{task}: scored answers as lmms-eval writes them", LMMS_EVAL_SAMPLES)
        run.save_lines(f"samples_{file_name(task)}.jsonl", lines, artifact)
    content = {**results, **in_lmms_eval_shape(args, found, samples)}
    run.save_json("results.json", content, Artifact("metrics", f"{args.task}: accuracy", RESULTS))
    show(args.task, found)
    easy_vqa.show_baseline(examples)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
