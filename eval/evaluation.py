"""Answers of a model and their scores: answer, score, keep."""

import dataclasses
import time
from typing import Annotated, Literal, NamedTuple

import tyro

import vlm_jax
from eval.artifacts import KEPT_SCORE, SAMPLES
from eval.judging import Judged, MetricOptions, Summary, clusters_of, judge, mean, metric_name, summarise_tasks
from interventions.kinds.groups import bind
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.prompts import P0_PROMPT, batches, shape_of
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.log import Log
from vlm_jax.runs.processes import apart, fetch, gathered, progress
from vlm_jax.runs.ranges import Range

#: Generation takes longer to compile than padding costs, so prompts of nearly any length share a shape.
_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated: greedily."""

    batch: Annotated[int, Range(least=1), tyro.conf.arg(name="answer-batch")] = 64
    """Samples that are answered at once. Larger batches are faster and need more memory."""
    max_new_tokens: Annotated[int, Range(least=1)] = 12
    """Longest answer, in tokens."""


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
    """Greedy answers to a prompt, under interventions or without. Interventions that name token groups are bound to
    every batch.

    Args:
        batch, max_new_tokens: see :class:`AnswerOptions`.
        steps: whether interventions also act on generated tokens, or on the prompt only.
        label: the title of the progress bar.
        log: where answers go as they come, and where those of an earlier session are.
    """
    log, ids = Log() if log is None else log, [example.id for example in examples]
    shapes: set = set()
    with apart(model, interventions) as (team, model, interventions):
        team_rows = team.own(len(examples))

        def groups():
            selected = [examples[row] for row in team_rows]
            options = {"prompt": prompt, "step": _LENGTH_STEP, "with_answer": False}
            for rows, encoded in batches(selected, processor, model.config, batch, **options):
                shapes.add(shape_of(encoded))
                yield [team_rows[row] for row in rows], encoded

        part = log.part(team, ids)
        with progress(total=len(team_rows), desc=f"answer {label}".strip(), unit="sample", leave=False) as bar:
            for rows, encoded in part.missing(groups(), ids):
                bar.update(len(part.records) - bar.n)
                bound = bind(interventions, encoded)
                tokens = fetch(vlm_jax.generate(model, encoded.inputs, max_new_tokens, bound, steps=steps))
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


def scored(examples: list[Example], answers: list[str], options: MetricOptions = MetricOptions()) -> Scored:  # noqa: B008
    """Scores answers by a metric (P0's exact match by default), or each by its task's own.

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
        average = mean([judged[row].score for row in rows], clusters_of([examples[row] for row in rows]))
        return {"accuracy": average.value, "stderr": average.stderr, "samples": len(rows)}

    tasks = {
        task: {
            **accuracy([row for row, e in enumerate(examples) if e.task == task]),
            "metrics": {name: summary.asdict() for name, summary in parts.items()},
        }
        for task, parts in summaries.items()
    }
    return Scored({**accuracy(list(range(len(examples)))), "tasks": tasks}, records, judged, summaries)


class Evaluation(NamedTuple):
    """The answers to some examples and their scores."""

    answers: Answers
    scored: Scored


def answer_and_score(
    run: Run,
    folder: str,
    model: Model,
    processor,
    examples: list[Example],
    metric: MetricOptions,
    answering: AnswerOptions,
    *,
    title: str,
    interventions=(),
    steps: Literal["all", "prefill"] = "all",
    label: str = "",
) -> Evaluation:
    """Answers the examples, under interventions or without, and scores the answers.

    Writes ``predictions.jsonl`` as answers come, from which a stopped run goes on, and ``samples.jsonl`` with a score
    for each sample.

    Args:
        folder: where in the run folder, "" or ending in "/".
        model: an adapter that is to be evaluated is merged into it (:func:`interventions.placement.adapters.merge`).
        title: what the results are called in the run's list of artifacts.
        steps: whether interventions also act on generated tokens, or on the prompt only.
        label: the title of the progress bar.
    """
    begun = time.perf_counter()
    answers = answer(
        model,
        processor,
        examples,
        interventions,
        batch=answering.batch,
        max_new_tokens=answering.max_new_tokens,
        steps=steps,
        label=label,
        log=run.log(f"{folder}predictions.jsonl", None),
    )
    scores = scored(examples, answers.texts, metric)
    run.save_lines(f"{folder}samples.jsonl", scores.records, Artifact("samples", f"{title}: scored answers", SAMPLES))
    run.timed(f"evaluate {folder}".rstrip("/ "), begun)
    return Evaluation(answers, scores)


def evaluate(
    run: Run,
    folder: str,
    model: Model,
    processor,
    examples: list[Example],
    metric: MetricOptions,
    answering: AnswerOptions,
    *,
    title: str,
    label: str = "",
) -> dict:
    """:func:`answer_and_score`, once: the result is kept in ``score.json`` and read from there by a later session.

    Returns:
        ``results`` of :class:`Scored`; with ``scores``, one for each sample, and ``clusters``, which samples show the
        same image (:func:`eval.judging.clusters_of`).
    """

    def make() -> dict:
        options = {"title": title, "label": label}
        scores = answer_and_score(run, folder, model, processor, examples, metric, answering, **options).scored
        per_sample = [record["score"] for record in scores.records]
        return {**scores.results, "scores": per_sample, "clusters": clusters_of(examples).tolist()}

    return run.once(f"{folder}score.json", make, Artifact("metrics", f"{title}: accuracy", KEPT_SCORE))
