"""Claims: true of one picture, false of its twin; balanced, and not to be answered from text or from one thing."""

import collections
import re

import numpy as np
import pytest

from vlm_jax.data import load_task
from vlm_jax.data.arrangements import CONVERSE, SPATIAL, holds, random_twins
from vlm_jax.data.claims import DENIES, NUMBERS, Claim, random_deduction
from vlm_jax.data.miniworld import make_scene
from vlm_jax.data.world import COLOUR_RGB, SHAPES

TWINS = ("mini-vsr", "mini-vqa")
NAME = rf"(?:(?:{'|'.join(COLOUR_RGB)}) )?(?:{'|'.join(SHAPES)})"
RELATION = re.compile(rf"[Tt]he ({NAME}) (?:is )?({'|'.join(SPATIAL)}) the ({NAME})")


def test_a_claim_as_statement_question_and_clause():
    claim = Claim("the red star", "is", "left of the cross")
    assert claim.statement == "The red star is left of the cross."
    assert claim.question == "Is the red star left of the cross?"
    assert claim.clause == "the red star is left of the cross"
    assert Claim("there", "are", "three objects").question == "Are there three objects?"


def named(scene, name):
    (found,) = (t for t in scene.things if name in (t.shape, f"{t.colour} {t.shape}"))
    return found


@pytest.mark.parametrize("split", ["train", "test"])
def test_statements_of_mini_vsr_are_true_where_the_answer_is_yes(split):
    relations = collections.Counter()
    for index, example in enumerate(load_task("mini-vsr", split=split, limit=400)):
        a, relation, b = RELATION.search(example.question).groups()
        scene = make_scene("mini-vsr", split, index)
        assert holds(relation, named(scene, a), named(scene, b)) is (example.answers == ("yes",))
        assert example.subtask == relation and example.metric == "yes_no" and example.family is None
        relations[relation] += 1
    assert relations.keys() == set(SPATIAL) and min(relations.values()) > 30


def test_claims_of_mini_vqa_are_true_where_the_answer_is_yes():
    kinds = collections.Counter()
    for index, example in enumerate(load_task("mini-vqa", split="eval", limit=400)):
        scene = make_scene("mini-vqa", "eval", index)
        text = example.question.replace("Is the statement correct?", "")
        assert not re.search("|".join(SPATIAL), text)
        if count := re.search("|".join(NUMBERS.values()), text):
            true = NUMBERS[len(scene.things)] == count[0]
        elif colour := re.search(rf"[Tt]he (\w+) (?:is )?({'|'.join(COLOUR_RGB)})\b", text):
            true = named(scene, colour[1]).colour == colour[2]
        else:
            (shape,) = re.findall("|".join(SHAPES), text)
            true = shape in {t.shape for t in scene.things}
        assert true is (example.answers == ("yes",))
        kinds[example.subtask] += 1
    assert kinds.keys() == {"colour", "shape", "count"} and min(kinds.values()) > 80


@pytest.mark.parametrize("task", TWINS)
@pytest.mark.parametrize("split", ["trace", "train", "eval", "test"])
def test_every_statement_has_both_answers_equally_often(task, split):
    """In every even number of examples from the start, so a model that reads only the text is right in exactly half."""
    answers = collections.defaultdict(collections.Counter)
    examples = load_task(task, split=split, limit=600)
    for one, other in zip(examples[::2], examples[1::2], strict=True):
        assert one.question == other.question and {one.answers, other.answers} == {("yes",), ("no",)}
        assert one.images[0].tobytes() != other.images[0].tobytes()
    for example in examples:
        answers[example.question][example.answers[0]] += 1
    assert all(count["yes"] == count["no"] for count in answers.values())
    assert 0.4 < np.mean([example.answers == ("yes",) for example in examples[::2]]) < 0.6  # the order is random


def words(example):
    return set(re.findall(r"\w+", example.question.lower()))


@pytest.mark.parametrize("task", TWINS)
def test_text_alone_tells_nothing(task):
    """A naive Bayes classifier on words and pairs of words, trained on one split and tested on another."""
    counts = {answer: collections.Counter() for answer in ("yes", "no")}

    def features(example):
        found = sorted(words(example))
        return found + [f"{a} {b}" for i, a in enumerate(found) for b in found[i + 1 :]]

    for example in load_task(task, split="train", limit=1000):
        counts[example.answers[0]].update(features(example))

    def guess(example):
        odds = sum(np.log((counts["yes"][f] + 1) / (counts["no"][f] + 1)) for f in features(example))
        return "yes" if odds > 0 else "no"

    tests = load_task(task, split="test", limit=1000)
    assert abs(np.mean([guess(e) == e.answers[0] for e in tests]) - 0.5) <= 0.02


@pytest.mark.parametrize("which", range(2))
def test_text_and_the_look_of_one_thing_tell_nothing(which):
    """Twins have the same things, so for each statement and look of one thing both answers occur equally often."""
    answers = collections.defaultdict(collections.Counter)
    for index, example in enumerate(load_task("mini-vsr", split="test", limit=1000)):
        seen = make_scene("mini-vsr", "test", index).things[which]
        key = example.question, seen.shape, seen.colour, seen.radius
        answers[key][example.answers[0]] += 1
    assert all(count["yes"] == count["no"] for count in answers.values())


def test_the_two_things_together_tell_everything():
    """The control for the tests above: the same statements with both places are answered without a mistake."""
    for index, example in enumerate(load_task("mini-vsr", split="test", limit=200)):
        a, relation, b = RELATION.search(example.question).groups()
        scene = make_scene("mini-vsr", "test", index)
        assert holds(relation, named(scene, a), named(scene, b)) is (example.answers[0] == "yes")


def test_what_a_relation_denies_is_never_true_in_a_picture():
    rng = np.random.default_rng(0)
    for relation in SPATIAL:
        for _ in range(300):
            twin = random_twins(rng, relation, 2)
            a, b = (twin.pictures[0].things[i] for i in (twin.a, twin.b))
            found = {other: holds(other, a, b) for other in SPATIAL if other != relation}
            assert all(found[other] is False for other in DENIES[relation])
    assert all(relation in DENIES[other] for relation in SPATIAL for other in DENIES[relation])


def possible_worlds(rng, count):
    """Random places of four things on a grid of 4 x 4 cells. Sometimes one is inside another, in the same cell."""
    for _ in range(count):
        cells = rng.permutation(16)[:4]
        x, y, host = cells % 4, cells // 4, {}
        if rng.random() < 0.6:
            i, j = rng.permutation(4)[:2].tolist()
            host[i], x[i], y[i] = j, x[j], y[j]
        yield x, y, host


def true_in(world, i, relation, j):
    """The relation of thing ``i`` to ``j`` by another definition than the pictures'."""
    x, y, host = world
    nested = host.get(i) == j or host.get(j) == i
    return {
        "inside": host.get(i) == j,
        "beside": not nested and y[i] == y[j] and abs(x[i] - x[j]) == 1,
        "left of": not nested and x[i] < x[j],
        "right of": not nested and x[i] > x[j],
        "above": not nested and y[i] < y[j],
        "below": not nested and y[i] > y[j],
    }[relation]


def test_deductions_follow_in_every_world_in_which_the_statements_are_true():
    """A world model that shares nothing with the rules: of thousands of random worlds, those that fit the statements
    must agree with the answer."""
    rng = np.random.default_rng(0)
    worlds = list(possible_worlds(rng, 6000))
    checked, answers, lengths = 0, collections.Counter(), collections.Counter()
    for _ in range(150):
        text, claim, true = random_deduction(rng)
        said, asked = RELATION.findall(text), RELATION.search(claim.clause).groups()
        things = sorted({name.split()[-1] for a, _, b in [*said, asked] for name in (a, b)})
        place = {name: things.index(name.split()[-1]) for a, _, b in [*said, asked] for name in (a, b)}
        fitting = [w for w in worlds if all(true_in(w, place[a], r, place[b]) for a, r, b in said)]
        assert all(true_in(w, place[asked[0]], asked[1], place[asked[2]]) == true for w in fitting)
        checked += bool(fitting)
        answers[true] += 1
        lengths[len(said)] += 1
    assert checked > 140 and min(answers.values()) > 50 and lengths.keys() == {1, 2, 3}
    assert CONVERSE["left of"] == "right of"
