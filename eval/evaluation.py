"""Answers questions with a model, scores the answers and writes both to a run folder."""

import dataclasses
import time
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

import vlm_jax
from eval.artifacts import SAMPLES, SCORE
from eval.judging import Judged, MetricOptions, Summary, clusters_of, judge, metric_name, summarise_tasks
from eval.values import mean
from interventions.kinds.groups import bind
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.processor import Processor
from vlm_jax.prompts import batches, shape_of
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.log import Log
from vlm_jax.runs.processes import apart, fetch, gathered, progress
from vlm_jax.runs.ranges import BATCH, Range

#: Prompts are padded to a multiple of this many tokens. Padding costs less time than compiling generation for more
#: lengths.
_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated. Decoding is greedy: each token is the most probable one."""

    batch: Annotated[int, BATCH, tyro.conf.arg(name="answer-batch")] = 64
    """Questions that are answered together. Larger batches are faster and need more memory."""
    max_new_tokens: Annotated[int, Range(least=1)] = 12
    """Largest number of tokens in an answer. Longer answers are cut off."""


class Answers(NamedTuple):
    """A model's greedy answers in the order of the examples, and the number of shapes of their batches. Generation is
    compiled once for each shape."""

    texts: list[str]
    compiled_shapes: int


def answer(
    model: Model,
    processor: Processor,
    examples: list[Example],
    interventions=(),
    *,
    batch: int = 64,
    max_new_tokens: int = 12,
    steps: Literal["all", "prefill"] = "all",
    label: str = "",
    prompt: str | None = None,
    log: Log | None = None,
) -> Answers:
    """Generates the answer to each example, with or without interventions. Interventions that name token groups are
    bound to every batch (:func:`interventions.bind`).

    Args:
        batch, max_new_tokens: see :class:`AnswerOptions`.
        steps: "all" if interventions also act on generated tokens, "prefill" if they act on the prompt only.
        label: the title of the progress bar.
        prompt: the user's message, in which ``{QUESTION}`` stands for the question; None for the examples' own.
        log: the file to which each batch's answers are written. Answers that it already holds are not generated again.

    Raises:
        UserError: naming the example for which the model's scores are not finite.
    """
    log, ids = Log() if log is None else log, [example.id for example in examples]
    shapes: set = set()
    with apart(model, interventions) as (team, model, interventions):
        team_rows = team.rows(len(examples))

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
                names = [ids[row] for row in rows]
                tokens = vlm_jax.generate(model, encoded.inputs, max_new_tokens, bound, steps=steps, names=names)
                texts = processor.tokenizer.batch_decode(fetch(tokens)[: len(rows)], skip_special_tokens=True)
                part.append([{"id": ids[row], "answer": text.strip()} for row, text in zip(rows, texts, strict=True)])
                bar.update(len(rows))
    log.join(part, ids, team)
    by_id = log.texts("answer")
    compiled = set().union(*gathered(sorted(map(str, shapes))))
    return Answers([by_id[example.id] for example in examples], len(compiled))


class Scored(NamedTuple):
    """The scores of some answers."""

    results: dict
    """The mean score (``accuracy``) with its standard error and 95 % interval (``low``, ``high``), over all answers and
    of each task. A task's ``metrics`` are the values that its metrics report."""
    records: list[dict]
    """One for each answer, with its score. ``correct`` is true if the score is 1."""
    judged: list[Judged]
    """One for each answer."""
    summaries: dict[str, dict[str, Summary]]
    """Task -> metric -> what the metric reports."""


def score_answers(
    examples: list[Example],
    answers: list[str],
    options: MetricOptions = MetricOptions(),  # noqa: B008 (frozen)
) -> Scored:
    """Scores the answers to some examples with one metric (P0's exact match by default), or with each task's metric."""
    judged = judge(examples, answers, options)
    summaries = summarise_tasks(examples, judged, options)
    clusters = clusters_of(examples).tolist()
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
            "cluster": cluster,
        }
        for e, a, j, cluster in zip(examples, answers, judged, clusters, strict=True)
    ]

    def accuracy(rows: list[int]) -> dict:
        average = mean([judged[row].score for row in rows], clusters_of([examples[row] for row in rows]))
        ends = {"low": average.low, "high": average.high}
        return {"accuracy": average.value, "stderr": average.stderr, **ends, "samples": len(rows)}

    tasks = {
        task: {
            **accuracy([row for row, e in enumerate(examples) if e.task == task]),
            "metrics": {name: summary.asdict() for name, summary in parts.items()},
        }
        for task, parts in summaries.items()
    }
    return Scored({**accuracy(list(range(len(examples)))), "tasks": tasks}, records, judged, summaries)


class Evaluation(NamedTuple):
    """The answers to some examples, and the scores of these answers."""

    answers: Answers
    scored: Scored


def answer_and_score(
    run: Run,
    folder: str,
    model: Model,
    processor: Processor,
    examples: list[Example],
    metric: MetricOptions,
    answering: AnswerOptions,
    *,
    title: str,
    interventions=(),
    steps: Literal["all", "prefill"] = "all",
    label: str = "",
) -> Evaluation:
    """Answers the examples, with or without interventions, and scores the answers.

    Each batch's answers are appended to ``predictions.jsonl``, so a stopped run continues after the last batch. Then
    ``samples.jsonl`` is written, with a score for each sample.

    Args:
        folder: a folder inside the run folder: "" for the run folder itself, else a path that ends in "/".
        model: to evaluate an adapter, merge it into the model (:func:`interventions.placement.adapters.merge`).
        title: the title of the results in the run's list of artifacts.
        steps: "all" if interventions also act on generated tokens, "prefill" if they act on the prompt only.
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
    scores = score_answers(examples, answers.texts, metric)
    run.save_lines(f"{folder}samples.jsonl", scores.records, Artifact("samples", f"{title}: scored answers", SAMPLES))
    run.timed(f"evaluate {folder}".rstrip("/ "), begun)
    return Evaluation(answers, scores)


def evaluate(
    run: Run,
    folder: str,
    model: Model,
    processor: Processor,
    examples: list[Example],
    metric: MetricOptions,
    answering: AnswerOptions,
    *,
    title: str,
    interventions=(),
    label: str = "",
) -> dict:
    """:func:`answer_and_score`, done once: the result is written to ``score.json``, and later sessions read it there.

    Returns:
        ``results`` of :class:`Scored`, and two more lists with an entry for each sample: ``scores``, and ``clusters``,
        the numbers that samples of the same image share (:func:`eval.judging.clusters_of`).
    """

    def make() -> dict:
        evaluation = answer_and_score(
            run,
            folder,
            model,
            processor,
            examples,
            metric,
            answering,
            title=title,
            interventions=interventions,
            label=label,
        )
        scores = evaluation.scored
        per_sample = [record["score"] for record in scores.records]
        return {**scores.results, "scores": per_sample, "clusters": clusters_of(examples).tolist()}

    found = run.once(f"{folder}score.json", make, Artifact("metrics", f"{title}: accuracy", SCORE))
    if "low" not in found:  # an older version wrote it
        average = mean(found["scores"], np.array(found["clusters"]))
        found |= {"low": average.low, "high": average.high}
    return found
