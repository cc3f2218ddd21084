"""Metrics by hand-made cases from their published definitions, and against other implementations of them."""

import itertools
import math
import random

import numpy as np
import pytest
from anls.metrics import anls_score

from eval.judging import (
    METRICS,
    MME,
    MetricOptions,
    check_metric,
    clusters_of,
    judge,
    mean,
    ratio,
    summarise_task,
    summarise_tasks,
)
from vlm_jax.data import Example
from vlm_jax.data.metrics import (
    anls,
    contains,
    evalai,
    exact_match,
    extract_yes_no,
    prefix,
    relaxed_match,
    vqa_accuracy,
)
from vlm_jax.errors import UserError


def example(number=0, answers=("yes",), **fields) -> Example:
    return Example(str(number), (), "?", answers, **{"task": "t", **fields})


def summary(metric, examples, predictions, **options):
    options = MetricOptions(metric, **options)
    return summarise_task(metric, examples, judge(examples, predictions, options))


def values(*args, **options) -> dict[str, float]:
    return {name: value.value for name, value in summary(*args, **options).values.items()}


# Exact match.


@pytest.mark.parametrize(
    "prediction, answers, right",
    [
        ("harbor", ["harbor"], True),
        (" Harbor. ", ["harbor"], True),
        ("the  harbor", ["the harbor"], True),
        ("the harbor", ["harbor"], False),
        ("harbor", ["cave", "Harbor"], True),
        ("3.5", ["35"], False),
        ("MAP", ["map"], True),
        ("", ["map"], False),
        ("!", ["?"], False),  # though normalisation leaves nothing of either
    ],
)
def test_exact_match(prediction, answers, right):
    assert exact_match(prediction, answers) is right


@pytest.mark.parametrize(
    "prediction, answers, strip, lower, evalai_",
    [
        (" cat\n", ["cat"], True, True, True),
        ("Cat.", ["cat"], False, True, True),
        ("the cat", ["cat"], False, False, True),
        ("two", ["2"], False, False, True),
        ("the", ["A"], False, False, False),  # evalai drops both words
        ("a", ["A"], False, True, True),
        ("dog", ["cat"], False, False, False),
    ],
)
def test_exact_match_normalisations(prediction, answers, strip, lower, evalai_):
    found = [exact_match(prediction, answers, how) for how in ("strip", "lower", "evalai")]
    assert found == [strip, lower, evalai_]


def test_exact_match_of_the_first_gold_answer():
    assert exact_match("dog", ["cat", "dog"], multi_gold="any")
    assert not exact_match("dog", ["cat", "dog"], multi_gold="first")
    assert values("exact_match", [example(answers=("cat", "dog"))], ["dog"], multi_gold="first") == {"exact_match": 0}


# VQA accuracy.


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("The Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # two are missing
        ("im", "im"),  # in the official table as Im, which no lower-case text is
        ("lets", "lets"),
        ("man's hat", "man 's hat"),
        ("red-white", "red white"),
        ("red -white", "red white"),
        ("red- white, red-blue", "red white redblue"),  # a space beside one mark: all go
        ("yes, it is?", "yes it is"),
        ("a\nb\tc", "b c"),
        ("it's 5:30", "it 's 5:30"),
        ("", ""),
    ],
)
def test_evalai_normalisation(text, wanted):
    assert evalai(text) == wanted


@pytest.mark.parametrize("matches, wanted", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_answers(matches, wanted):
    answers = ["A cat"] * matches + [f"dog{i}" for i in range(10 - matches)]
    assert vqa_accuracy("the cat!", answers) == pytest.approx(wanted, abs=1e-12)


def test_vqa_accuracy_is_the_mean_over_all_nines():
    """Against the definition itself: every subset of nine annotators."""
    rng = random.Random(0)
    for _ in range(200):
        answers = [rng.choice("xyz") for _ in range(10)]
        nines = [min(nine.count("x") / 3, 1) for nine in itertools.combinations(answers, 9)]
        assert vqa_accuracy("x", answers) == pytest.approx(np.mean(nines), abs=1e-12)


@pytest.mark.parametrize(
    "prediction, answers, wanted",
    [
        ("x", ["x"], 1),
        ("x", ["y"], 0),
        ("x", ["x", "x"], 1),
        ("x", ["x", "y"], 0.5),
        ("x", ["x", "x", "y"], (0.5 + 0.5 + 1) / 3),
        ("x", ["x"] * 3 + ["y"], (3 * 2 / 3 + 1) / 4),
        ("", ["A"] * 10, 0),  # an article, but no silence
        ("A.", ["a"] * 10, 1),
    ],
)
def test_vqa_accuracy_of_fewer_answers(prediction, answers, wanted):
    assert vqa_accuracy(prediction, answers) == pytest.approx(wanted, abs=1e-12)


# ANLS.


@pytest.mark.parametrize(
    "prediction, answers, wanted",
    [
        ("Coca  Cola", ["coca cola"], 1),
        ("coca col", ["coca cola", "pepsi"], 1 - 1 / 9),
        ("abcd", ["abxy"], 0),  # NL = 0.5 exactly, which is not below tau
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("", ["x"], 0),
    ],
)
def test_anls(prediction, answers, wanted):
    assert anls(prediction, answers) == pytest.approx(wanted, abs=1e-12)


def test_anls_equals_the_package():
    rng, ties = random.Random(0), 0
    for _ in range(3000):
        prediction, *answers = ("".join(rng.choices("ab cA", k=rng.randrange(8))) for _ in range(3))
        assert anls(prediction, answers) == anls_score(prediction, answers)
        ties += anls(prediction, answers, tau=0.5 + 1e-9) != anls_score(prediction, answers)
    assert ties > 50, "no tie at 0.5 was met, so the two rules were not told apart"


# Multiple choice.

ANIMALS = ("cat", "black cat", "dog", "3")


def test_multiple_choice():
    """Extracted, strict and unread answers, in the three ways in which a question can show its choices."""
    lettered = [example(i, ("C",), choices=ANIMALS, gold=2) for i in range(4)]
    found = summary("multiple_choice", lettered, ["C", "(C)", "cat", "who knows"])
    assert {name: value.value for name, value in found.values.items()} == {
        "multiple_choice": 0.5,
        "multiple_choice_strict": 0.25,
    }
    assert (found.samples, found.unparsed) == (4, 1)
    listed = [example(i, ("dog",), choices=ANIMALS) for i in range(4)]
    assert values("multiple_choice", listed, ["dog", "Dog.", "C", "cat"]) == {
        "multiple_choice": 0.5,
        "multiple_choice_strict": 0.25,
    }
    in_the_question = [example(i, ("C",)) for i in range(2)]
    assert values("multiple_choice", in_the_question, ["the answer is C", "a cat"])["multiple_choice"] == 0.5
    for broken in (example(answers=("dog",)), example(answers=("bird",), choices=ANIMALS)):
        with pytest.raises(UserError, match="'0'"):
            values("multiple_choice", [broken], [""])


def test_circular():
    """Right in all rotations, in the first one, and row by row; a group that lacks a rotation is left out."""
    examples, predictions = [], []
    for group, right in (("g", (1, 1)), ("h", (1, 0)), ("i", (0, 0))):
        for turn, correct in enumerate(right):
            gold = turn % 2
            examples.append(
                example(f"{group}{turn}", ("AB"[gold],), choices=("x", "y")[:: 1 - 2 * gold], gold=gold, group=group)
            )
            predictions.append(f"({'AB'[gold if correct else 1 - gold]})")
    examples.append(example("j0", ("A",), choices=("x", "y"), gold=0, group="j"))
    found = summary("circular", examples, [*predictions, "A"])
    got = {name: value.value for name, value in found.values.items()}
    assert got["circular"] == pytest.approx(1 / 3) and got["circular_vanilla"] == pytest.approx(2 / 3)
    assert got["circular_per_row"] == pytest.approx(4 / 7) and got["circular_per_row_strict"] == pytest.approx(1 / 7)
    assert got["circular_strict"] == 0
    assert found.incomplete == 1 and found.values["circular"].clusters == 3
    with pytest.raises(UserError, match="no complete one"):
        check_metric(examples[-1:], MetricOptions("circular"))
    with pytest.raises(UserError, match="no complete one"):
        summary("circular", [example(answers=("A",), choices=("x", "y"))], ["A"])


# Yes or no.


@pytest.mark.parametrize(
    "reply, wanted",
    [
        ("Yes.", "yes"),
        ("no", "no"),
        ("N", "no"),
        ("Yes, there is no dog", "yes"),
        ("There is no dog", "no"),
        ("I would say yes", "yes"),
        ("yes and no", "yes"),
        ("either yes or no", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_yes_or_no(reply, wanted):
    assert extract_yes_no(reply) == wanted


def test_mme():
    """Two categories of perception and one of cognition, worked out by hand."""
    plan = {  # category -> the answers to the pair of each image, all of whose gold answers are yes and no
        "existence": [("yes", "no"), ("yes", "yes"), ("no", "yes")],
        "OCR": [("Yes.", "No."), ("Yes", "maybe")],
        "code_reasoning": [("yes", "no")],
    }
    examples, predictions = [], []
    for category, pairs in plan.items():
        for image, pair in enumerate(pairs):
            examples += [
                example(f"{category}{image}{gold}", (gold,), subtask=category, group=str(image), image_id=str(image))
                for gold in ("yes", "no")
            ]
            predictions += pair
    found = summary("mme", examples, predictions)
    existence, ocr, code = 50 + 100 / 3, 75 + 50, 200
    got = {name: value.value for name, value in found.values.items()}
    assert got["mme_perception_score"] == pytest.approx(existence + ocr)
    assert got["mme_cognition_score"] == pytest.approx(code)
    assert got["mme_total_score"] == pytest.approx(existence + ocr + code)
    assert got["mme_accuracy"] == pytest.approx(8 / 12) and got["mme_accuracy_plus"] == pytest.approx(3 / 6)
    assert found.unparsed == 1
    part = found.subtasks["existence"].values
    assert part["mme_accuracy"].value == pytest.approx(1 / 2)
    assert part["mme_accuracy_plus"].value == pytest.approx(1 / 3)
    # The error of a sum of categories, each a mean over its images.
    errors = [np.std([200, 50, 0]) / math.sqrt(3), np.std([200, 50]) / math.sqrt(2)]
    assert found.values["mme_perception_score"].stderr == pytest.approx(math.hypot(*errors))
    # Half a pair adds to the accuracy alone.
    assert values("mme", examples[:-1], predictions[:-1])["mme_total_score"] == pytest.approx(existence + ocr)
    assert summary("mme", examples[:-1], predictions[:-1]).incomplete == 1
    with pytest.raises(UserError, match="did you mean 'existence'"):
        check_metric([example(subtask="existense", group="1")], MetricOptions("mme"))
    assert sum(map(len, MME.values())) == 14


def test_yes_no_takes_any_category_and_any_group():
    examples = [example(i, ("yes", "no")[i % 2 : i % 2 + 1], group="aabb"[i]) for i in range(4)]
    assert values("yes_no", examples, ["yes", "no", "yes", "yes"]) == {"yes_no": 0.75, "yes_no_plus": 0.5}
    assert values("yes_no", [example(1), example(2)], ["yes", "no"]) == {"yes_no": 0.5}
    with pytest.raises(UserError, match="neither yes nor no"):
        check_metric([example(answers=("cat",))], MetricOptions("yes_no"))


def test_pope():
    """The rates of a confusion matrix written by hand; the yes-ratio is of what was predicted."""
    cells = [("yes", "yes")] * 30 + [("yes", "no")] * 10 + [("no", "yes")] * 5 + [("no", "no")] * 35
    cells += [("yes", "hm")] * 2 + [("no", "hm")] * 3
    examples = [example(i, (gold,)) for i, (gold, _) in enumerate(cells)]
    found = summary("pope", examples, [said for _, said in cells])
    got = {name: value.value for name, value in found.values.items()}
    precision, recall = 30 / 35, 30 / 42
    assert got["pope_accuracy"] == pytest.approx(65 / 85)
    assert got["pope_precision"] == pytest.approx(precision) and got["pope_recall"] == pytest.approx(recall)
    assert got["pope_f1_score"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert got["pope_yes_ratio"] == pytest.approx(35 / 85) and got["pope_yes_ratio"] != 42 / 85
    assert found.unparsed == 5
    assert values("pope", [example(1), example(2)], ["no", "no"]) == {
        "pope_accuracy": 0,
        "pope_precision": 0,
        "pope_recall": 0,
        "pope_f1_score": 0,
        "pope_yes_ratio": 0,
    }


# Relaxed accuracy.


@pytest.mark.parametrize(
    "prediction, answers, right",
    [
        ("105", ["100"], True),
        ("95", ["100"], True),
        ("106", ["100"], False),
        ("-96", ["-100"], True),
        ("96", ["-100"], False),
        ("25%", ["0.25"], True),
        ("25", ["25%"], False),
        ("0.01", ["0"], False),
        ("0", ["0"], True),
        ("1,000", ["1000"], False),
        ("Canada ", ["canada"], True),
        ("Canad", ["canada"], False),
        ("nan", ["nan"], True),
        ("inf", ["5"], False),
        ("3", ["100", "3.1"], True),
    ],
)
def test_relaxed_match(prediction, answers, right):
    assert relaxed_match(prediction, answers) is right


# Standard errors.


def test_standard_error_of_independent_samples():
    found = mean([1, 1, 1, 0, 0])
    assert found.value == pytest.approx(0.6)
    assert found.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


def test_standard_error_of_clusters():
    """Equation 4 of Miller 2024, term by term; and copies of a sample are worth no more than the sample."""
    rng = np.random.default_rng(0)
    scores, clusters = rng.random(40), rng.integers(0, 12, 40)
    d = scores - scores.mean()
    cross = sum(d[i] * d[j] for i in range(40) for j in range(40) if i != j and clusters[i] == clusters[j])
    found = mean(scores, clusters)
    assert found.stderr == pytest.approx(math.sqrt(scores.var() / 40 + cross / 40**2), rel=1e-12)
    assert abs(found.stderr - mean(scores).stderr) > 1e-3
    once = rng.random(20)
    assert mean(np.repeat(once, 3), np.repeat(np.arange(20), 3)).stderr == pytest.approx(mean(once).stderr)


def test_what_hangs_together():
    """Samples with a common image or group, through others too; names of other tasks do not count."""
    fields = [{}, {"group": "g"}, {"image_id": "g"}, {"image_id": "g", "group": "h"}, {"group": "h"}, {"group": "g"}]
    examples = [example(i, **f) for i, f in enumerate(fields)] + [example(9, image_id="g", task="other")]
    labels = clusters_of(examples).tolist()
    together = {(i, j) for i, j in itertools.combinations(range(7), 2) if labels[i] == labels[j]}
    assert together == {(1, 5), (2, 3), (2, 4), (3, 4)}


def test_standard_error_of_a_ratio():
    """The bootstrap's, near the one of the ratio's linearisation; of copies, that of the originals; the same again."""
    rng = np.random.default_rng(0)
    below = rng.random(400) < 0.5
    above = below & (rng.random(400) < 0.8)
    alone = np.arange(400)
    found = ratio(above, below, alone, resamples=4000)
    linear = np.sqrt(np.sum((above - found.value * below) ** 2)) / below.sum()
    assert found.value == above.sum() / below.sum()
    assert found.stderr == pytest.approx(linear, rel=0.05)
    assert found == ratio(above, below, alone, resamples=4000)
    copies = ratio(np.repeat(above, 4), np.repeat(below, 4), np.repeat(alone, 4), resamples=4000)
    assert copies.stderr == pytest.approx(found.stderr, rel=1e-9)
    assert ratio(np.repeat(above, 4), np.repeat(below, 4), np.arange(1600)).stderr < 0.6 * found.stderr


def test_images_cluster_the_samples_of_a_task():
    scores = [1, 1, 1, 0, 0, 0]
    alone = [example(i, ("x",)) for i in range(6)]
    shared = [example(i, ("x",), image_id=str(i // 3)) for i in range(6)]
    said = ["x" if score else "y" for score in scores]
    assert summary("exact_match", alone, said).values["exact_match"].stderr == pytest.approx(0.5 / math.sqrt(6))
    assert summary("exact_match", shared, said).values["exact_match"].stderr == pytest.approx(0.5 / math.sqrt(2))


# The registry.


def test_registry():
    names = "exact_match prefix contains vqa_accuracy anls multiple_choice circular yes_no mme pope relaxed_accuracy"
    assert list(METRICS) == names.split()
    for name in METRICS:
        fields = {"choices": ("yes", "no"), "gold": 0, "subtask": "count", "group": "g"}
        two = [example(i, **fields) for i in range(2)]
        found = summary(name, two, ["yes", "nothing"])
        assert METRICS[name].headline in found.values and found.samples == 2
        assert all(0 <= one.score <= 1 for one in judge(two, ["yes", "nothing"], MetricOptions(name)))
        check_metric(two, MetricOptions(name))


def test_each_task_by_its_own_metric():
    examples = [
        example(0, ("cola",), task="doc", metric="anls"),
        example(1, ("B",), task="mmmu", metric="multiple_choice", choices=("x", "y")),
        example(2, ("seven",), task="mmmu", metric="exact_match"),
    ]
    options = MetricOptions("task")
    found = summarise_tasks(examples, judge(examples, ["colt", "B.", "7"], options), options)
    assert {task: sorted(parts) for task, parts in found.items()} == {
        "doc": ["anls"],
        "mmmu": ["exact_match", "multiple_choice"],
    }
    assert found["doc"]["anls"].values["anls"].value == 0.75
    assert found["mmmu"]["multiple_choice"].values["multiple_choice"].value == 1
    with pytest.raises(UserError, match="example '3' names the unknown metric 'anl'; did you mean 'anls'"):
        check_metric([example(3, metric="anl")], options)
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        check_metric(examples, MetricOptions("exact"))


def test_subtasks():
    examples = [example(i, ("x",), subtask=part) for i, part in enumerate("aab")]
    found = summary("exact_match", examples, ["x", "y", "x"])
    assert {name: part.values["exact_match"].value for name, part in found.subtasks.items()} == {"a": 0.5, "b": 1}
    assert summary("exact_match", examples[:2], ["x", "y"]).subtasks == {}


# A gold answer within an answer.


@pytest.mark.parametrize(
    "prediction, answers, at_the_beginning, anywhere",
    [
        ("Paris.", ["Paris"], True, True),
        ("Paris, which is large", ["paris"], True, True),
        ("Parisian food", ["Paris"], False, False),
        ("The city of Paris is", ["Paris"], False, True),
        ("comparison", ["paris"], False, False),
        ("35", ["3"], False, False),
        ("New York City", ["London", "New York"], True, True),
        ("", ["Paris"], False, False),
        ("C++ is", ["C"], True, True),
        ("it is C++", ["C++"], False, True),
        ("東京です", ["東京"], True, True),
        ("a.b", ["axb"], False, False),
    ],
)
def test_prefix_and_contains(prediction, answers, at_the_beginning, anywhere):
    assert (prefix(prediction, answers), contains(prediction, answers)) == (at_the_beginning, anywhere)
    for name, right in (("prefix", at_the_beginning), ("contains", anywhere)):
        assert values(name, [example(answers=tuple(answers))], [prediction]) == {name: float(right)}


def test_normalisation_and_golds_of_prefix_and_contains():
    assert prefix("The Paris", ["paris"], "evalai") and not prefix("The Paris", ["paris"])
    assert not contains("Paris", ["paris"], "strip")
    assert contains("in Rome", ["Paris", "Rome"]) and not contains("in Rome", ["Paris", "Rome"], "lower", "first")
