"""What a few samples tell: intervals by hand, from other formulas of scipy, and simulations of what they promise."""

import numpy as np
import pytest
import scipy.stats

from interventions.statistics import accuracy, change_text, interval_text, paired, wilson


def wilson_by_hand(right, count):
    """The two shares at which the score test's z is 1.96: the roots of (p - right / n)^2 = z^2 p (1 - p) / n."""
    z2, share = scipy.stats.norm.ppf(0.975) ** 2, right / count
    return sorted(np.roots([1 + z2 / count, -(2 * share + z2 / count), share**2]))


@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_six_independent_answers_have_wilsons_interval(right):
    scores = np.arange(6) < right
    low, high = wilson_by_hand(right, 6)
    expected = {"mean": right / 6, "low": low, "high": high, "samples": 6, "units": 6}
    assert accuracy(scores) == pytest.approx(expected, abs=1e-9)
    assert accuracy(scores, clusters=["a", "b", "c", "d", "e", "f"]) == accuracy(scores)
    assert high - low > 0.38


def test_clustered_answers_keep_the_bootstrap_but_never_without_a_width():
    """Twelve answers about six images: as many as the images, if all are right. Half right, they are resampled."""
    images = np.arange(12) // 2
    low, high = wilson_by_hand(6, 6)
    expected = {"mean": 1, "low": low, "high": high, "samples": 12, "units": 6}
    assert accuracy(np.ones(12), clusters=images) == pytest.approx(expected, abs=1e-9)
    of_images = accuracy(images < 3, clusters=images)
    alone = accuracy(images < 3)
    assert of_images["low"] < alone["low"] < 0.5 < alone["high"] < of_images["high"]
    # Three images: the bootstrap's widest is [1/3, 1], if one of them is half right.
    few = accuracy(np.arange(6) > 0, clusters=images[:6])
    assert few["units"] == 3 and few["low"] == pytest.approx(wilson_by_hand(2, 3)[0])
    # Graded scores of fewer than six samples lie within the interval of as many right and wrong ones.
    graded = accuracy([0.9, 0.9, 0.9])
    assert (graded["low"], graded["high"]) == pytest.approx((wilson_by_hand(2, 3)[0], 1))
    seeds = accuracy(np.zeros((2, 20)))
    assert (seeds["mean"], seeds["low"], seeds["high"]) == pytest.approx((0, *wilson_by_hand(0, 20)), abs=1e-9)


@pytest.mark.parametrize(("share", "count"), [(0.02, 40), (0.3, 12), (0.9, 30), (0.98, 60)])
def test_wilson_covers_where_the_bootstrap_does_not(share, count):
    """The chance, over all counts of right answers, that the interval has the true share."""
    chances = scipy.stats.binom.pmf(np.arange(count + 1), count, share)
    ends = np.array([wilson(right, count) for right in range(count + 1)])
    held = chances[(ends[:, 0] <= share) & (share <= ends[:, 1])].sum()
    drawn = scipy.stats.binom.ppf([0.025, 0.975], count, np.arange(count + 1)[:, None] / count) / count
    resampled = chances[(drawn[:, 0] <= share) & (share <= drawn[:, 1])].sum()
    assert held > 0.92 and held >= resampled - 0.02
    assert resampled < 0.9 or share in (0.3, 0.9)


def test_few_changed_pairs_have_exact_bounds():
    """One of 40 pairs differs: Clopper and Pearson's bounds of the shares that gain and lose, by the beta function."""
    first, second = np.ones(40), np.ones(40)
    second[0] = 0
    found = paired(first, second)
    gains, losses = scipy.stats.beta.ppf(0.975, 2, 39), scipy.stats.beta.ppf(0.975, 1, 40)
    assert (found["low"], found["high"]) == pytest.approx((-losses, gains))
    assert (found["differing"], found["units"], found["p"]) == (1, 40, 1)
    swapped = paired(second, first)
    assert (swapped["low"], swapped["high"]) == pytest.approx((-gains, losses))
    # Clusters are counted, not samples: here one cluster changes in both directions.
    images = np.arange(40) // 4
    second[:2], first[1] = (0, 1), 0
    of_images = paired(first, second, clusters=images)
    assert (of_images["differing"], of_images["units"]) == (1, 10)
    each = scipy.stats.beta.ppf(0.975, 2, 9)
    assert (of_images["low"], of_images["high"]) == pytest.approx((-each, each))


def test_five_changes_are_no_evidence():
    """Of 300 pairs five differ, all in one direction: p is the sign test's, and the interval has 0. Seven are."""
    for changed, least in ((5, 2**-4), (7, 2**-6)):
        first = np.arange(300) < changed
        found = paired(first, np.zeros(300))
        assert found["p"] >= least == pytest.approx(found["mcnemar_p"])
        assert (found["low"] < 0) == (changed < 6)
    three = paired(np.ones(3), np.zeros(3))
    assert three["low"] < 0 < three["p"] - 0.2
    logits = paired([3.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    assert logits["low"] is logits["high"] is logits["excluded"] is None and logits["p"] >= 0.25


@pytest.mark.parametrize("rate", [0.003, 0.01, 0.02])
def test_few_changes_hold_the_truth(rate):
    """Of 200 pairs a share ``rate`` gains, and none loses: the interval has the true difference in 95 % of studies."""
    rng, held = np.random.default_rng(0), []
    for _ in range(100):
        found = paired(rng.random(200) < rate, np.zeros(200), resamples=300)
        held.append(found["low"] <= rate <= found["high"])
    assert np.mean(held) >= 0.93


def test_text_of_estimates_and_changes():
    assert interval_text(accuracy(np.ones(6))) == "1.000 [0.610, 1.000]"
    assert interval_text({"rr": -0.5, "low": None, "high": None}, "rr", "+") == "-0.500 (not enough samples)"
    assert change_text(paired(np.ones(6), np.ones(6))) == (
        "+0.000 [-0.393, +0.393]: no pair differs, less than 0.393 cannot be excluded"
    )
    assert change_text(paired(np.ones(60), np.zeros(60))).startswith("+1.000 [+0.951, +1.000]")
    assert change_text(paired([2.0], [1.0])) == "+1.000 (not enough samples)"
