"""Mixtures of tasks: how many examples each gives, and what is refused."""

import pytest

from train.mixture import MixtureOptions, divided
from vlm_jax import UserError
from vlm_jax.data.options import DataOptions


@pytest.mark.parametrize(
    "limit, weights, tasks, expected",
    [
        (600, (), 6, [100] * 6),
        (10, (), 3, [3, 4, 3]),
        (8, (3.0, 1.0), 2, [6, 2]),
        (7, (1.0, 1.0, 5.0), 3, [1, 1, 5]),
        (None, (), 2, [None, None]),
        (2, (), 2, [1, 1]),
    ],
)
def test_shares_are_balanced_and_sum_up(limit, weights, tasks, expected):
    found = divided(limit, weights, tasks)
    assert found == expected and (limit is None or sum(found) == limit)


@pytest.mark.parametrize(
    "limit, weights, tasks, says",
    [
        (10, (1.0,), 2, "--shares is 1.0: give one number above 0 for each of 2 tasks"),
        (10, (1.0, 0.0), 2, "give one number above 0"),
        (10, (1.0, float("nan")), 2, "give one number above 0"),
        (None, (1.0, 2.0), 2, "--shares needs a number of examples"),
        (1, (), 2, "--limit is 1: give at least one example for each of 2 tasks"),
        (3, (100.0, 1.0), 2, "leaves no example for 1 of the tasks"),
    ],
)
def test_refused_shares(limit, weights, tasks, says):
    with pytest.raises(UserError, match=says):
        divided(limit, weights, tasks)


def test_a_mixture_has_the_first_examples_of_each_task():
    found = MixtureOptions(("mini-docvqa", "mini-vsr"), limit=8, shares=(1.0, 3.0)).mixture(DataOptions())
    assert {task: [e.id for e in examples] for task, examples in found.items()} == {
        "mini-docvqa": [f"mini-docvqa/train/{i:06d}" for i in range(2)],
        "mini-vsr": [f"mini-vsr/train/{i:06d}" for i in range(6)],
    }


@pytest.mark.parametrize(
    "options, says",
    [
        (MixtureOptions(("mini-docvqa", "mini-docvqa"), 8), "names mini-docvqa twice"),
        (
            MixtureOptions(("digits", "mini-vsr"), 2002),
            "digits has 1000 training examples, but its share of --limit 2002 is",
        ),
        (MixtureOptions(("mini-docvq",), 8), "did you mean 'mini-docvqa'"),
        (MixtureOptions((), 8), "--train is empty"),
    ],
)
def test_refused_mixtures(options, says):
    with pytest.raises(UserError, match=says):
        options.mixture(DataOptions())
