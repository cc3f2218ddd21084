"""Answers of a model and their scores: generate, judge, keep."""

import dataclasses
from typing import Literal, NamedTuple

import vlm_jax
from eval.judging import Judged, MetricOptions, Summary, clusters_of, judge, mean, metric_name, summarise_tasks
from interventions.kinds.groups import bind
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.prompts import P0_PROMPT, batches, shape_of
from vlm_jax.runs.log import Log
from vlm_jax.runs.processes import apart, fetch, gathered, progress

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
