"""Accuracy of a model on a task: as it is, with a LoRA adapter, or under a saved intervention.

python -m eval.accuracy --task mini-docvqa --limit 300 --out runs/docvqa
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

import vlm_jax
from interventions.adapters import load_peft, merge
from interventions.groups import bind
from interventions.store import describe, digest, load_interventions
from vlm_jax import Model
from vlm_jax.data import Example, load_task
from vlm_jax.data.metrics import exact_match
from vlm_jax.errors import UserError, command
from vlm_jax.options import ModelOptions
from vlm_jax.prompts import batches, compiled_shapes
from vlm_jax.runs import Run

#: Generation takes longer to compile than padding costs, so prompts of nearly any length share a shape.
_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class Args(ModelOptions):
    """Score a model's greedy answers to P0's prompt by exact match (case, outer punctuation and spacing ignored)."""

    task: str = "mini-okvqa"
    """Task name, family (knowledge, perception) or JSONL file."""
    adapter: Path | None = None
    """PEFT folder of a LoRA adapter to evaluate with."""
    intervention: Path | None = None
    """File of saved interventions (interventions.store) to evaluate under, such as a cut that TaLo selected."""
    steps: Literal["all", "prefill"] = "all"
    """Whether interventions also act on generated tokens, or on the prompt only."""
    split: str = "test"
    """Split of a named task: trace, train, eval or test."""
    limit: int | None = 300
    """Samples to evaluate."""
    batch: int = 64
    """Samples per compiled call."""
    max_new_tokens: int = 12
    """Longest answer, in tokens."""
    out: Path = Path("runs/accuracy")
    """Run folder: results.json, samples.jsonl."""


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
) -> Answers:
    """Greedy answers to P0's prompt, under interventions or without; token groups are looked up in every batch."""
    texts: list[str] = [""] * len(examples)
    groups = list(batches(examples, processor, model.config, batch, step=_LENGTH_STEP, with_answer=False))
    with tqdm(total=len(examples), desc=f"answer {label}".strip(), unit="sample", leave=False) as bar:
        for rows, encoded in groups:
            acting = bind(interventions, encoded)
            tokens = np.asarray(vlm_jax.generate(model, encoded.inputs, max_new_tokens, acting, steps=steps))[
                : len(rows)
            ]
            for row, text in zip(rows, processor.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                texts[row] = text.strip()
            bar.update(len(rows))
    return Answers(texts, compiled_shapes(groups))


def score(examples: list[Example], answers: list[str]) -> tuple[dict, list[dict]]:
    """Accuracy with its standard error, per task and in all; and a record per sample."""
    records = [
        {
            "id": e.id,
            "task": e.task,
            "family": e.family,
            "question": e.question,
            "answers": list(e.answers),
            "prediction": a,
            "correct": exact_match(a, e.answers),
        }
        for e, a in zip(examples, answers, strict=True)
    ]

    def accuracy(part: list[dict]) -> dict:
        mean = sum(r["correct"] for r in part) / len(part)
        return {"accuracy": mean, "stderr": math.sqrt(mean * (1 - mean) / len(part)), "samples": len(part)}

    tasks = sorted({r["task"] for r in records})
    return {**accuracy(records), "tasks": {t: accuracy([r for r in records if r["task"] == t]) for t in tasks}}, records


@command
def main(args: Args) -> None:
    examples = load_task(args.task, split=args.split, limit=args.limit)
    for name in ("batch", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1")
    model, processor = args.load()
    if args.adapter is not None:  # part of the model: it acts on every token whatever --steps says
        model = merge(model, load_peft(model, args.adapter))
    interventions = () if args.intervention is None else load_interventions(args.intervention)
    for intervention in interventions:
        print(describe(intervention))
    run = Run.open(args.out, args, model.config, processor)
    answers = answer(
        model,
        processor,
        examples,
        interventions,
        batch=args.batch,
        max_new_tokens=args.max_new_tokens,
        steps=args.steps,
        label=args.task,
    )
    results, records = score(examples, answers.texts)
    run.save_lines("samples.jsonl", records)
    run.save_json(
        "results.json",
        {
            "task": args.task,
            "metric": "exact_match",
            "compiled_shapes": answers.compiled_shapes,
            "interventions": digest(interventions),
            **results,
        },
    )
    for name, part in [*results["tasks"].items(), ("all", results)]:
        print(f"{name or args.task:20s} {part['accuracy']:.3f} ± {part['stderr']:.3f}  ({part['samples']} samples)")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
