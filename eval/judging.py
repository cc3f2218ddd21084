"""Scores the answers of a task, and computes the values that its benchmark reports."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy
from jaxtyping import Int

from eval.values import Value, mean, ratio, total
from vlm_jax.data import Example
from vlm_jax.data.choices import extract_choice
from vlm_jax.data.metrics import (
    LETTERS,
    NORMALISATIONS,
    anls,
    contains,
    evalai,
    exact_match,
    extract_yes_no,
    normalise,
    prefix,
    relaxed_match,
    vqa_accuracy,
)
from vlm_jax.errors import UserError, nearest

VERSION = 2
"""The version of the metrics' definitions. Raise it when a change gives the same answers different scores."""


@dataclasses.dataclass(frozen=True)
class MetricOptions:
    """How answers are scored."""

    metric: str = "exact_match"
    """How an answer is scored: exact_match (as in P0), prefix or contains (a gold answer at the beginning of the
    answer, or anywhere in it), vqa_accuracy, anls, multiple_choice, circular, yes_no, mme, pope or relaxed_accuracy
    (docs/metrics.md explains them). task: by the metric of each task's benchmark."""
    normalisation: Literal["strip", "lower", "evalai"] = "lower"
    """Differences that exact_match, prefix and contains ignore. strip: white space around the texts; lower: also case,
    and punctuation around the texts; evalai: the same as vqa_accuracy, such as articles and most punctuation. P0 does
    not specify this."""
    multi_gold: Literal["any", "first"] = "any"
    """Which gold answers exact_match, prefix and contains accept, if there are several. any: each of them; first: only
    the first, which most annotators gave. P0 does not specify this."""


class Judged(NamedTuple):
    """The score of one answer."""

    score: float
    """From 0 to 1."""
    read: str | None
    """The answer that was recognised in the text; None if no answer was recognised."""
    others: Mapping[str, float] = {}
    """Scores by other rules."""


class Summary(NamedTuple):
    """The result of a metric on a task."""

    values: dict[str, Value]
    """The reported numbers by name."""
    samples: int
    unparsed: int
    """Samples in which no answer was recognised. They are scored as wrong."""
    incomplete: int
    """Groups that lack rows. They are left out of the values about groups."""
    subtasks: dict[str, "Summary"]
    """The result on each subtask."""

    def asdict(self) -> dict:
        """The summary as nested dicts, for JSON."""
        values = {name: value._asdict() for name, value in self.values.items()}
        subtasks = {name: summary.asdict() for name, summary in self.subtasks.items()}
        return {**self._asdict(), "values": values, "subtasks": subtasks}


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a benchmark scores answers, and which values it reports for a task."""

    headline: str
    """The name of the main value, which is printed."""
    judge: Callable[[Example, str, MetricOptions], Judged]
    """Scores one answer."""
    aggregate: Callable[[Sequence[Example], Sequence[Judged]], dict[str, Value]]
    """Computes the reported values of a task."""
    group_size: Callable[[Example], int] | None = None
    """The number of rows of a complete group, for metrics that score groups."""


# Samples that belong together.


def clusters_of(examples: Sequence[Example]) -> Int[np.ndarray, " examples"]:
    """The cluster number of each example. Examples of a task with the same image or group form one cluster."""
    keys: dict[Hashable, int] = {}
    edges = [
        (row, keys.setdefault((example.task, kind, name), len(examples) + len(keys)))
        for row, example in enumerate(examples)
        for kind, name in (("image", example.image_id), ("group", example.group))
        if name is not None
    ]
    rows, shared = np.array(edges, int).reshape(-1, 2).T
    size = len(examples) + len(keys)
    links = scipy.sparse.coo_array((np.ones(len(rows)), (rows, shared)), shape=(size, size))
    return scipy.sparse.csgraph.connected_components(links, directed=False)[1][: len(examples)]


def groups_of(examples: Sequence[Example]) -> list[list[int]]:
    """The row numbers of each group, in the order of the examples."""
    groups = defaultdict(list)
    for row, example in enumerate(examples):
        if example.group is not None:
            groups[example.subtask, example.group].append(row)
    return list(groups.values())


# The scores of single answers.


def _judge_exact_match(example: Example, prediction: str, options: MetricOptions) -> Judged:
    right = exact_match(prediction, example.answers, options.normalisation, options.multi_gold)
    return Judged(float(right), _text(NORMALISATIONS[options.normalisation](prediction), prediction))


def _judge_part(within: Callable[..., bool]) -> Callable[[Example, str, MetricOptions], Judged]:
    """A judge of answers that hold a gold answer in the way that ``within`` tells."""

    def judge_part(example: Example, prediction: str, options: MetricOptions) -> Judged:
        right = within(prediction, example.answers, options.normalisation, options.multi_gold)
        return Judged(float(right), _text(NORMALISATIONS[options.normalisation](prediction), prediction))

    return judge_part


def _judge_vqa_accuracy(example: Example, prediction: str, _: MetricOptions) -> Judged:
    return Judged(vqa_accuracy(prediction, example.answers), _text(evalai(prediction), prediction))


def _judge_anls(example: Example, prediction: str, _: MetricOptions) -> Judged:
    return Judged(anls(prediction, example.answers), _text(prediction))


def _judge_relaxed(example: Example, prediction: str, _: MetricOptions) -> Judged:
    return Judged(float(relaxed_match(prediction, example.answers)), _text(prediction))


def _text(*forms: str) -> str | None:
    """The first of the forms that is not blank; None if all are."""
    return next(filter(None, map(str.strip, forms)), None)


def _judge_choice(example: Example, prediction: str, _: MetricOptions) -> Judged:
    choices, gold, lettered = _question(example)
    choice = extract_choice(prediction, choices, lettered=lettered)
    right = exact_match(prediction, [LETTERS[gold] if lettered else choices[gold]], "strip")
    read = None if choice is None else LETTERS[choice] if choice < len(LETTERS) else choices[choice]
    return Judged(float(choice == gold), read, {"strict": float(right)})


#: A question of whose choices only the letters are known is taken to have this many, or more if the right letter is a
#: later one.
_UNKNOWN_CHOICES = 8


def _question(example: Example) -> tuple[Sequence[str], int, bool]:
    """The choices, the index of the right one, and whether the question showed letters (a letter is then a gold
    answer)."""
    gold, choices = example.gold, example.choices
    letters = [a.strip() for a in example.answers if len(a.strip()) == 1 and a.strip() in LETTERS]
    if choices is None and letters:  # only the question's text contains the choices
        gold = LETTERS.index(letters[0])
        return ("",) * max(_UNKNOWN_CHOICES, gold + 1), gold, True
    if choices is None:
        raise UserError(f"example {example.id!r} has no choices: choose another --metric, or give its line choices")
    if gold is None:
        forms = [normalise(choice) for choice in choices]
        indices = [forms.index(form) for form in map(normalise, example.answers) if form in forms]
        indices += [LETTERS.index(letter) for letter in letters if LETTERS.index(letter) < len(choices)]
        if not indices:
            raise UserError(f"example {example.id!r}: no gold answer is one of its choices: correct one of them")
        if len(set(indices)) > 1:
            raise UserError(f"example {example.id!r} has several right choices: choose the metric exact_match")
        gold = indices[0]
    return choices, gold, gold < len(LETTERS) and LETTERS[gold] in letters


def _judge_yes_no(example: Example, prediction: str, _: MetricOptions) -> Judged:
    reply = extract_yes_no(prediction)
    return Judged(float(reply == _gold_yes_no(example)), reply)


def _gold_yes_no(example: Example) -> str:
    gold = extract_yes_no(example.answers[0])
    if gold is None:
        raise UserError(
            f"example {example.id!r}: its answer {example.answers[0]!r} is neither yes nor no: choose another --metric"
        )
    return gold


# The reported values of a task.


def _mean_of(name: str) -> Callable[[Sequence[Example], Sequence[Judged]], dict[str, Value]]:
    """A metric's ``aggregate`` that reports the mean score as ``name``, and the means of scores by other rules."""

    def aggregate(examples: Sequence[Example], judged: Sequence[Judged]) -> dict[str, Value]:
        clusters = clusters_of(examples)
        values = {name: mean([j.score for j in judged], clusters)}
        return values | {
            f"{name}_{other}": mean([j.others[other] for j in judged], clusters) for other in judged[0].others
        }

    return aggregate


def _complete(examples: Sequence[Example], size: Callable[[Example], int]) -> list[list[int]]:
    return [rows for rows in groups_of(examples) if len(rows) >= size(examples[rows[0]])]


def _rotations(example: Example) -> int:
    """The number of rotations of a question: one for each choice."""
    return len(_question(example)[0])


def _circular(examples: Sequence[Example], judged: Sequence[Judged]) -> dict[str, Value]:
    """MMBench's CircularEval: a question is right if all its rotations are answered correctly."""
    rows = _mean_of("circular_per_row")(examples, judged)
    groups = _complete(examples, _rotations)
    if not groups:
        return rows
    clusters = clusters_of([examples[rows[0]] for rows in groups])
    return {
        "circular": mean([min(judged[row].score for row in rows) for rows in groups], clusters),
        "circular_strict": mean([min(judged[row].others["strict"] for row in rows) for rows in groups], clusters),
        "circular_vanilla": mean([judged[rows[0]].score for rows in groups], clusters),
        **rows,
    }


def _yes_no(examples: Sequence[Example], judged: Sequence[Judged]) -> dict[str, Value]:
    """Accuracy and, where questions come in groups, the share of groups with all answers right."""
    values = _mean_of("yes_no")(examples, judged)
    if groups := groups_of(examples):
        clusters = clusters_of([examples[rows[0]] for rows in groups])
        values["yes_no_plus"] = mean([min(judged[row].score for row in rows) for rows in groups], clusters)
    return values


# fmt: off
MME = {
    "mme_perception_score": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
                             "artwork", "OCR"),
    "mme_cognition_score": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
# fmt: on
"""Total score -> the categories of MME (Fu et al. 2023) that it sums."""


def _judge_mme(example: Example, prediction: str, options: MetricOptions) -> Judged:
    known = [category for categories in MME.values() for category in categories]
    if example.subtask not in known:
        raise UserError(
            f"example {example.id!r}: {example.subtask!r} is no category of MME{nearest(str(example.subtask), known)} "
            "(the metric yes_no takes any)"
        )
    return _judge_yes_no(example, prediction, options)


def _mme(examples: Sequence[Example], judged: Sequence[Judged]) -> dict[str, Value]:
    """MME's total scores: sums over categories of 100 (accuracy + accuracy+). accuracy+ is the share of images whose
    two questions are both answered correctly."""
    pairs = _complete(examples, _pair)
    categories = defaultdict(list)
    for rows in pairs:
        right = [judged[row].score for row in rows]
        categories[examples[rows[0]].subtask].append(100 * (np.mean(right) + min(right)))
    scores = {category: mean(of_pairs, top=200) for category, of_pairs in categories.items()}
    totals = {name: [scores[c] for c in parts if c in scores] for name, parts in MME.items()}
    totals = {"mme_total_score": list(scores.values()), **totals}
    values = {name: total(parts) for name, parts in totals.items() if parts}
    if pairs:
        values["mme_accuracy"] = mean([j.score for j in judged], clusters_of(examples))
        values["mme_accuracy_plus"] = mean([min(judged[row].score for row in rows) for rows in pairs])
    return values


def _pair(_: Example) -> int:
    return 2


def _pope(examples: Sequence[Example], judged: Sequence[Judged]) -> dict[str, Value]:
    """POPE's rates (Li et al. 2023), where "yes" is positive. An answer that is neither counts as not "yes"."""
    clusters = clusters_of(examples)
    gold = np.array([_gold_yes_no(example) == "yes" for example in examples])
    predicted = np.array([j.read == "yes" for j in judged])
    return {
        "pope_accuracy": mean([j.score for j in judged], clusters),
        "pope_precision": ratio(gold & predicted, predicted, clusters),
        "pope_recall": ratio(gold & predicted, gold, clusters),
        "pope_f1_score": ratio(2 * (gold & predicted), gold.astype(int) + predicted, clusters),
        "pope_yes_ratio": mean(predicted, clusters),
    }


METRICS: dict[str, Metric] = {
    "exact_match": Metric("exact_match", _judge_exact_match, _mean_of("exact_match")),
    "prefix": Metric("prefix", _judge_part(prefix), _mean_of("prefix")),
    "contains": Metric("contains", _judge_part(contains), _mean_of("contains")),
    "vqa_accuracy": Metric("vqa_accuracy", _judge_vqa_accuracy, _mean_of("vqa_accuracy")),
    "anls": Metric("anls", _judge_anls, _mean_of("anls")),
    "multiple_choice": Metric("multiple_choice", _judge_choice, _mean_of("multiple_choice")),
    "circular": Metric("circular", _judge_choice, _circular, _rotations),
    "yes_no": Metric("yes_no", _judge_yes_no, _yes_no),
    "mme": Metric("mme_total_score", _judge_mme, _mme, _pair),
    "pope": Metric("pope_f1_score", _judge_yes_no, _pope),
    "relaxed_accuracy": Metric("relaxed_accuracy", _judge_relaxed, _mean_of("relaxed_accuracy")),
}
"""Name -> metric; the names are those of :attr:`vlm_jax.data.Example.metric`."""

NEITHER_BETTER = ("pope_yes_ratio",)
"""Values for which neither higher nor lower is better."""


def metric_name(example: Example, options: MetricOptions) -> str:
    """The name of the metric that scores an example.

    Raises:
        UserError: for an unknown metric.
    """
    name = example.metric if options.metric == "task" else options.metric
    if name not in METRICS:
        where = f"example {example.id!r} names the" if options.metric == "task" else "the"
        raise UserError(f"{where} unknown metric {name!r}{nearest(name, [*METRICS, 'task'])}")
    return name


def judge(examples: Sequence[Example], predictions: Sequence[str], options: MetricOptions) -> list[Judged]:
    """The score of each answer."""
    return [
        METRICS[metric_name(example, options)].judge(example, prediction, options)
        for example, prediction in zip(examples, predictions, strict=True)
    ]


def check_metric(examples: Sequence[Example], options: MetricOptions) -> None:
    """Raises a UserError if the metric cannot score the examples. Call it before any answer is generated."""
    judge(examples, [""] * len(examples), options)
    for (_, name), rows in _parts(examples, options).items():
        _check_groups(name, [examples[row] for row in rows])


def summarise_task(name: str, examples: Sequence[Example], judged: Sequence[Judged]) -> Summary:
    """The values of the metric ``name`` on the examples of one task, and on each subtask if there are several.

    Raises:
        UserError: if the metric scores groups and no group is complete.
    """
    incomplete, size = _check_groups(name, examples), METRICS[name].group_size
    values = METRICS[name].aggregate(examples, judged)
    subtasks = sorted({e.subtask for e in examples if e.subtask is not None})
    parts = {}
    for subtask in subtasks if len(subtasks) > 1 else ():
        rows = [row for row, e in enumerate(examples) if e.subtask == subtask]
        part = [examples[row] for row in rows]
        if size is None or _complete(part, size):
            parts[subtask] = summarise_task(name, part, [judged[row] for row in rows])
    unparsed = sum(j.read is None for j in judged)
    return Summary(values, len(examples), unparsed, incomplete, parts)


def _check_groups(name: str, examples: Sequence[Example]) -> int:
    """The number of groups that lack rows, for a metric that scores groups. If all lack rows, a UserError is raised."""
    size = METRICS[name].group_size
    if size is None:
        return 0
    complete = len(_complete(examples, size))
    if complete == 0:
        raise UserError(
            f"{name} scores groups of questions, and task {examples[0].task!r} has no complete one among these "
            f"{len(examples)} examples: raise --limit or choose another --metric"
        )
    return len(groups_of(examples)) - complete


def summarise_tasks(
    examples: Sequence[Example], judged: Sequence[Judged], options: MetricOptions
) -> dict[str, dict[str, Summary]]:
    """Task -> metric -> summary. A task with two kinds of questions can have two metrics."""
    summaries: dict[str, dict[str, Summary]] = defaultdict(dict)
    for (task, name), rows in _parts(examples, options).items():
        summaries[task][name] = summarise_task(name, [examples[row] for row in rows], [judged[row] for row in rows])
    return dict(summaries)


def _parts(examples: Sequence[Example], options: MetricOptions) -> dict[tuple[str, str], list[int]]:
    """(Task, metric) -> row numbers."""
    rows = defaultdict(list)
    for row, example in enumerate(examples):
        rows[example.task, metric_name(example, options)].append(row)
    return dict(sorted(rows.items()))
