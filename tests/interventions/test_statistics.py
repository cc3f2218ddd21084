"""Statistics against scipy, loops over resamples written out, closed forms, and simulations of what they promise."""

import dataclasses
import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
from run_folders import check_run_folder

import interventions.figures.__main__ as figures_command
from interventions.figures import base, tracing
from interventions.figures.redraw import redraw
from interventions.statistics import (
    STATISTICS,
    Interval,
    bootstrap,
    bootstrap_rows,
    correlations,
    holm,
    mcnemar,
    mean_interval,
    normalised,
    paired,
    percentiles,
    permutation_test,
    rank_stability,
    rr,
    rr_interval,
    rr_resamples,
    rr_summary,
    write_effects,
    write_rows,
)
from interventions.statistics.restoration import estimate_with_variance
from vlm_jax.errors import UserError
from vlm_jax.runs.charts import Chart
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import DeviceOptions

PROFILE = np.array([0.9, 0.5, 0.3, 0.1])


def trace(count, replicates=3, profile=PROFILE, spread=0.3, seed=0, noise=0.2):
    """A traced task whose RR is ``profile``, with samples that differ and replicates that do."""
    rng = np.random.default_rng(seed)
    te = rng.gamma(4, 0.1, (count, 1)) * np.exp(noise * rng.standard_normal((count, replicates)))
    slopes = profile + spread * rng.standard_normal((count, 1, len(profile)))
    return te, te[..., None] * (slopes + noise * rng.standard_normal((count, replicates, len(profile))))


def by_hand(te, ie, min_te, eps, statistic):
    """Sample by sample, of ``te, ie`` as lists of each sample's replicates."""
    te = [np.mean(t) for t in te]
    ie = [np.mean(i, 0) for i in ie]
    if statistic == "ratio_of_means":
        return np.mean(ie, 0) / (np.mean(te) + eps)
    ratios = [i / (t + eps) for t, i in zip(te, ie, strict=True) if t >= min_te]
    return np.mean(ratios, 0) if statistic == "mean_of_ratios" else np.median(ratios, 0)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_rr_is_its_definition(statistic):
    te, ie = trace(41)
    te[3], te[5] = -0.2, 0.001
    for min_te, eps in ((0.01, 1e-8), (0.3, 1e-8), (0.01, 0.1)):
        expected = by_hand(te, ie, min_te, eps, statistic)
        np.testing.assert_allclose(rr(te, ie, min_te, eps, statistic), expected, rtol=1e-12)
    everyone = by_hand(te, ie, -np.inf, 1e-8, statistic)
    assert (np.allclose(rr(te, ie, statistic=statistic), everyone)) == (statistic == "ratio_of_means")


def test_rr_of_exact_restoration_is_the_profile():
    te, _ = trace(20)
    ie = te[..., None] * PROFILE
    for statistic in STATISTICS:
        np.testing.assert_allclose(rr(te, ie, statistic=statistic), PROFILE, atol=1e-6)
    np.testing.assert_allclose(normalised(PROFILE), PROFILE / 0.9, rtol=1e-7)
    both = np.stack([PROFILE, 2 * PROFILE])
    np.testing.assert_allclose(normalised(both, -1), [PROFILE / 0.9] * 2, rtol=1e-7)
    # Of layers and modules (L, 2), the largest of all.
    np.testing.assert_allclose(normalised(both), both / 1.8, rtol=1e-7)
    np.testing.assert_array_equal(normalised(both.T), normalised(both.ravel()).reshape(both.shape).T)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda te, ie: (te - 9, ie), "no sample has TE >= 0.01"),
        (lambda te, ie: (te, np.where(np.arange(len(te)) == 4, np.inf, ie.T).T), "sample 4 is not a finite number"),
        # An IE that is NaN in one of three replicates is no missing cell.
        (
            lambda te, ie: (te, np.where(np.indices(ie.shape)[0] * 3 + np.indices(ie.shape)[1] == 13, np.nan, ie)),
            "sample 4 is not a finite number",
        ),
    ],
)
def test_what_has_no_rr_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        rr(*change(*trace(6)))


def with_missing(count=24, replicates=2):
    """A traced task in which odd samples lack cell 1 and all samples cell 3."""
    te, ie = trace(count, replicates)
    te[4] = 0.001
    ie[1::2, :, 1] = ie[:, :, 3] = np.nan
    return te, ie


@pytest.mark.parametrize("statistic", STATISTICS)
def test_samples_that_lack_a_cell_do_not_count_in_it(statistic):
    te, ie = with_missing()
    found = rr(te, ie, statistic=statistic)
    np.testing.assert_allclose(found[[0, 2]], rr(te, ie[..., [0, 2]], statistic=statistic), rtol=1e-12)
    np.testing.assert_allclose(found[1], rr(te[::2], ie[::2, :, 1:2], statistic=statistic)[0], rtol=1e-12)
    assert np.isnan(found[3])
    draws = {over: rr_resamples(te, ie, over, resamples=50, statistic=statistic) for over in ("samples", "both")}
    for over, drawn in draws.items():
        np.testing.assert_allclose(
            drawn[:, [0, 2]], rr_resamples(te, ie[..., [0, 2]], over, resamples=50, statistic=statistic), rtol=1e-12
        )
    # Sample draw by sample draw, of the mean over replicates.
    for rows, drawn in zip(np.concatenate(list(bootstrap_rows(24, 50, 0, 2))), draws["samples"], strict=True):
        rows = rows[rows % 2 == 0]
        np.testing.assert_allclose(drawn[1], rr(te[rows], ie[rows, :, 1:2], statistic=statistic)[0], rtol=1e-12)


def test_summary_of_missing_cells():
    rows = rr_summary(*with_missing(), ["a", "b", "c", "d"], resamples=50)
    chosen = {row["cell"]: row for row in rows if row["statistic"] == "median"}
    assert sorted(chosen[cell]["rank"] for cell in "abc") == [1, 2, 3]
    assert chosen["b"]["low"] <= chosen["b"]["rr"] <= chosen["b"]["high"]
    assert {name for name, value in chosen["d"].items() if value is None} == {
        "rr", "rank", "low", "high", "replicates_low", "replicates_high", "both_low", "both_high"
    }  # fmt: skip
    stability = rank_stability(*with_missing(), sizes=[8], top=[1, 2], halves=20)
    assert 0.5 < stability[0]["tau"]["mean"] <= 1
    with pytest.raises(UserError, match="needs all cells of all samples"):
        permutation_test(with_missing(), trace(24, 2))


def test_other_refusals():
    te, ie = trace(6)
    with pytest.raises(UserError, match="the mean TE is -"):
        rr(te - 9, ie, statistic="ratio_of_means")
    with pytest.raises(UserError, match="--replicates 2"):
        rr_interval(te[:, :1], ie[:, :1], "replicates")
    with pytest.raises(UserError, match="no RR of a group is positive"):
        permutation_test((te, ie), (te, -ie), normalise=True)
    with pytest.raises(UserError, match="two sets of 0"):
        rank_stability(te[:1], ie[:1])
    with pytest.raises(UserError, match="4 and 5 samples"):
        paired(np.ones(4), np.ones(5))
    with pytest.raises(ValueError, match="must be"):
        rr(te[:, 0], ie)


# The bootstrap.


@pytest.mark.parametrize("shape", [(30,), (30, 4), (30, 3, 2), (1, 4)])
def test_interval_is_that_of_scipy(shape):
    values = np.random.default_rng(1).random(shape)
    if values.ndim > 1:
        values[:: 4 if len(values) > 1 else 9, 0] = values[:, 0] if len(values) == 1 else np.nan
    found = mean_interval(values, seed=5)
    if len(values) == 1:
        assert found == {"mean": values[0].tolist(), "low": [None] * 4, "high": [None] * 4}
        return
    expected = scipy.stats.bootstrap((values,), np.nanmean, n_resamples=2000, method="percentile", rng=5)
    np.testing.assert_allclose(found["mean"], np.nanmean(values, 0), rtol=1e-12)
    np.testing.assert_allclose([found["low"], found["high"]], expected.confidence_interval, rtol=1e-12)


def test_intervals_over_samples_are_those_of_scipy():
    te, ie = trace(40)
    ratios = ie.mean(1) / (te.mean(1)[:, None] + 1e-8)
    cases = {"mean_of_ratios": np.mean, "median": np.median}
    for name, function in cases.items():
        expected = scipy.stats.bootstrap((ratios,), function, n_resamples=300, method="percentile", rng=2)
        found = rr_interval(te, ie, resamples=300, seed=2, statistic=name, min_te=-1)
        np.testing.assert_allclose(found[1:], expected.confidence_interval, rtol=1e-10)
    narrower = rr_interval(te, ie, resamples=300, seed=2, level=0.5, min_te=-1)
    assert (narrower.low > found.low).all() and (narrower.high < found.high).all()


@pytest.mark.parametrize("over", ["samples", "replicates", "both"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_resamples_are_those_of_a_loop(over, statistic, monkeypatch):
    te, ie = trace(12)
    te[0] -= 0.6  # out, or in again
    how = {"min_te": 0.2, "eps": 1e-8, "statistic": statistic}
    found = rr_resamples(te, ie, over, resamples=7, seed=3, **how)
    rows = np.concatenate([*bootstrap_rows(12, 7, 3, 3)])
    within = np.random.default_rng([3, 1]).integers(0, 3, (7, 12, 3))
    for draw in range(7):
        chosen = rows[draw] if over != "replicates" else range(12)
        which = within[draw] if over != "samples" else [[0, 1, 2]] * 12
        some_te = [te[n][r] for n, r in zip(chosen, which, strict=True)]
        some_ie = [ie[n][r] for n, r in zip(chosen, which, strict=True)]
        np.testing.assert_allclose(found[draw], by_hand(some_te, some_ie, **how), rtol=1e-9)
    monkeypatch.setattr(bootstrap, "CHUNK_NUMBERS", 80)  # two draws at a time
    np.testing.assert_allclose(rr_resamples(te, ie, over, resamples=7, seed=3, **how), found, rtol=1e-12)


def test_one_replicate_leaves_the_samples_alone():
    te, ie = trace(20, replicates=1)
    np.testing.assert_array_equal(rr_resamples(te, ie, "both", resamples=9), rr_resamples(te, ie, resamples=9))


def test_resamples_without_a_sample_are_left_out():
    te, ie = np.full((4, 1), -1.0), np.ones((4, 1, 2))
    te[0] = 1
    draws = rr_resamples(te, ie, resamples=200)
    assert 30 < np.isnan(draws[:, 0]).sum() < 100  # (3 / 4)^4 of 200
    found = rr_interval(te, ie, resamples=200)  # of a single sample that counts
    assert np.isfinite(found.value).all() and np.isnan(found[1:]).all()
    medians = rr_resamples(te, ie, resamples=200, statistic="median")
    np.testing.assert_array_equal(np.isnan(medians), np.isnan(draws))


def covered(found, truth):
    return (found.low <= truth) & (truth <= found.high)


@pytest.mark.parametrize("statistic", ["mean_of_ratios", "ratio_of_means"])
def test_intervals_cover_what_they_say(statistic):
    """Over samples: the RR of all samples and corruptions, in about 95 % of studies; over both, more often. Over
    replicates: that of these samples, but not that of all."""
    how = {"resamples": 300, "statistic": statistic}
    held = {"samples": [], "both": [], "replicates": []}
    for study in range(150):
        data = trace(60, seed=study, noise=0.4)
        for over, found in held.items():
            found.append(covered(rr_interval(*data, over, seed=study, **how), PROFILE))
    samples, both, replicates = (np.mean(held[over]) for over in held)
    assert 0.9 < samples < 0.98 and samples < both
    assert replicates < 0.9

    te, slopes = trace(60, replicates=1, noise=0)
    slopes = slopes / te[..., None]

    def retraced(study, count):
        rng = np.random.default_rng([study, count])
        shaken = te * np.exp(0.4 * rng.standard_normal((60, count)))
        return shaken, shaken[..., None] * (slopes + 0.4 * rng.standard_normal((60, count, 4)))

    truth = np.mean([rr(*retraced(study, 3), statistic=statistic) for study in range(1000, 3000)], 0)
    held = [covered(rr_interval(*retraced(n, 3), "replicates", seed=n, **how), truth) for n in range(150)]
    assert 0.9 < np.mean(held) < 0.99


def test_summary_has_a_row_per_cell_and_statistic():
    te, ie = trace(30)
    cells = ["L0-attn", "L0-mlp", "L1-attn", "L1-mlp"]
    rows = rr_summary(te, ie, cells, resamples=100, seed=4, min_te=0.1)
    assert [(r["statistic"], r["cell"]) for r in rows] == [(s, c) for s in STATISTICS for c in cells]
    for row in rows:
        cell = cells.index(row["cell"])
        how = {"resamples": 100, "seed": 4, "min_te": 0.1, "statistic": row["statistic"]}
        for over, prefix in (("samples", ""), ("replicates", "replicates_"), ("both", "both_")):
            found = rr_interval(te, ie, over, **how)
            expected = found.value[cell], found.low[cell], found.high[cell]
            assert (row["rr"], row[prefix + "low"], row[prefix + "high"]) == expected
    assert [r["rank"] for r in rows[:4]] == [1, 2, 3, 4]
    assert "both_low" not in rr_summary(te[:, :1], ie[:, :1], cells, resamples=20)[0]


# Two groups.


def all_labellings(first, second, statistic):
    """The exact p by every way to choose the first group, differences compared as they are."""
    te, ie = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    count, size = len(te), len(first[0])

    def difference(chosen):
        rest = [n for n in range(count) if n not in chosen]
        return statistic(te[list(chosen)], ie[list(chosen)]) - statistic(te[rest], ie[rest])

    null = np.array([difference(chosen) for chosen in combinations(range(count), size)])
    return (np.abs(null) >= np.abs(difference(range(size))) - 1e-9).mean(0)


def test_p_of_a_median_is_that_of_every_labelling_and_of_scipy():
    first, second = trace(5, seed=1), trace(5, PROFILE.size, PROFILE + np.array([0.4, 0, 0.2, 0]), seed=2)
    second = second[0][:, :3], second[1][:, :3]
    found = permutation_test(first, second, statistic="median", min_te=-1, permutations=4000)
    exact = all_labellings(first, second, lambda te, ie: rr(te, ie, -1, statistic="median"))
    np.testing.assert_allclose(found.p, exact, atol=0.04)
    ratios = [ie.mean(1) / (te.mean(1)[:, None] + 1e-8) for te, ie in (first, second)]
    library = scipy.stats.permutation_test(
        ratios, lambda a, b, axis: np.median(a, axis) - np.median(b, axis), n_resamples=np.inf
    )
    np.testing.assert_allclose(exact, library.pvalue, atol=1e-12)
    np.testing.assert_allclose(found.value, library.statistic, atol=1e-12)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("statistic", ["mean_of_ratios", "ratio_of_means"])
def test_standard_errors_are_those_of_the_jackknife(statistic, normalise):
    """To first order, what a difference is divided by; and of a plain mean the textbook's."""
    te, ie = trace(400, replicates=1)
    how = {"min_te": 0.1, "eps": 1e-8, "statistic": statistic}
    rows = np.arange(400)
    value, variance = estimate_with_variance(te, ie, rows[None], normalise, **how)
    without = np.stack([rr(te[rows != n], ie[rows != n], **how) for n in rows])
    without = normalised(without, -1) if normalise else without
    expected = 399 / 400 * ((without - without.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(variance[0], expected, rtol=0.03, atol=1e-12)
    whole = rr(te, ie, **how)
    np.testing.assert_allclose(value[0], normalised(whole) if normalise else whole, rtol=1e-9)
    if statistic == "mean_of_ratios" and not normalise:
        ratios = (ie / te[..., None])[te[:, 0] >= 0.1, 0]
        np.testing.assert_allclose(variance[0], ratios.var(0) / len(ratios), rtol=1e-6)


def test_p_is_that_of_every_labelling_in_units_of_its_error():
    first, second = trace(5, 1, seed=1), trace(5, 1, PROFILE + np.array([0.4, 0, 0.2, 0]), seed=2)
    found = permutation_test(first, second, min_te=-1, permutations=4000)
    ratios = np.concatenate([ie[:, 0] / (te + 1e-8) for te, ie in (first, second)])

    def welch(chosen):
        a, b = ratios[list(chosen)], ratios[[n for n in range(10) if n not in chosen]]
        return (a.mean(0) - b.mean(0)) / np.sqrt(a.var(0) / 5 + b.var(0) / 5)

    null = np.array([welch(chosen) for chosen in combinations(range(10), 5)])
    exact = (np.abs(null) >= np.abs(welch(range(5))) - 1e-9).mean(0)
    np.testing.assert_allclose(found.p, exact, atol=0.04)
    np.testing.assert_allclose(found.q, scipy.stats.false_discovery_control(found.p))


@pytest.mark.parametrize("normalise", [False, True])
def test_p_is_uniform_where_nothing_differs(normalise):
    """Although groups differ in size and spread, and for normalised RR in height."""
    p, held = [], []
    for study in range(150):
        height = 0.6 if normalise else 1
        first = trace(120, 1, seed=[study, 0])
        second = trace(40, 1, height * PROFILE, spread=height * 0.9, seed=[study, 1])
        found = permutation_test(first, second, normalise=normalise, permutations=200, resamples=200, seed=study)
        p.append(found.p)
        held.append(covered(found, 0))
    p, held = np.array(p)[:, 1:], np.array(held)[:, 1:]  # the largest is 1 in both when normalised
    assert 0.02 < (p <= 0.05).mean() < 0.085 and 0.43 < np.median(p) < 0.57
    assert 0.9 < held.mean() < 0.98


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_planted_difference_is_found_and_shuffled_labels_are_none(statistic):
    profile = np.linspace(1, 0.1, 20)
    profile[0] = 2  # the largest in both, or normalising would move all others
    planted = profile.copy()
    planted[[4, 11]] += 0.5
    how = {"permutations": 1000, "resamples": 100, "statistic": statistic}
    first, second = trace(100, 1, planted, seed=1), trace(90, 2, profile, seed=2)
    for normalise in (False, True):
        found = permutation_test(first, second, normalise=normalise, **how)
        assert set(np.flatnonzero(found.q < 0.05)) == {4, 11}, (found.q, normalise)
        assert (found.value[[4, 11]] > 0.15).all() and (found.low[[4, 11]] > 0).all()
    te = np.concatenate([first[0].mean(1), second[0].mean(1)])[:, None]
    ie = np.concatenate([first[1].mean(1), second[1].mean(1)])[:, None]
    order = np.random.default_rng(0).permutation(len(te))
    halves = [(te[part], ie[part]) for part in (order[:100], order[100:])]
    assert not (permutation_test(*halves, **how).q < 0.05).any()
    swapped = permutation_test(second, first, **how)
    np.testing.assert_allclose(swapped.value, -permutation_test(first, second, **how).value)


def test_normalised_rr_does_not_see_the_height():
    first, second = trace(100, 1, seed=1), trace(100, 1, PROFILE, seed=2)
    lower = second[0], 0.5 * second[1]
    how = {"permutations": 300, "resamples": 50}
    assert (permutation_test(first, lower, **how).q[:2] < 0.05).all()
    same, other = (permutation_test(first, s, normalise=True, **how) for s in (second, lower))
    np.testing.assert_allclose(same.p, other.p)
    assert (other.q > 0.05).all()


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    p = np.random.default_rng(0).random((400, 5))
    assert (np.array([holm(row) for row in p]) < 0.05).any(1).mean() < 0.09
    assert (p < 0.05).any(1).mean() > 0.15


# Rankings.


def test_rankings_of_a_clear_profile_agree_and_of_noise_do_not():
    clear = rank_stability(*trace(64, profile=np.arange(1.0, 13), spread=0.01), top=(3, 99), halves=20)
    assert [row["samples"] for row in clear] == [8, 16, 32]
    for row in clear:
        assert row["tau"] == pytest.approx({"mean": 1, "low": 1, "high": 1}) and list(row["overlap"]) == [3]
        assert row["overlap"][3] == {"mean": 1, "low": 1, "high": 1, "chance": 0.25}
    how = {"sizes": [32], "top": (3,), "halves": 20}
    noise = [rank_stability(*trace(64, profile=np.zeros(12), seed=n), **how)[0] for n in range(40)]
    assert abs(np.mean([row["tau"]["mean"] for row in noise])) < 0.06
    assert abs(np.mean([row["overlap"][3]["mean"] for row in noise]) - 0.25) < 0.04
    between = rank_stability(*trace(400, profile=np.linspace(0, 0.2, 12)), halves=60)
    assert np.all(np.diff([row["tau"]["mean"] for row in between]) > 0)


def test_rank_stability_by_a_loop():
    te, ie = trace(20)
    (found,) = rank_stability(te, ie, sizes=[7], top=(2,), halves=30, seed=6)
    order = np.random.default_rng(6).permuted(np.tile(np.arange(20), (30, 1)), axis=1)
    tau, overlap = [], []
    for row in order:
        one, other = (rr(te[part], ie[part]) for part in (row[:7], row[7:14]))
        tau.append(scipy.stats.kendalltau(one, other).statistic)
        overlap.append(len(set(np.argsort(-one)[:2]) & set(np.argsort(-other)[:2])) / 2)
    assert found["tau"] == pytest.approx(percentiles(np.array(tau)))
    assert found["overlap"][2] == pytest.approx({**percentiles(np.array(overlap)), "chance": 0.5})


def test_correlations_in_closed_form():
    x = np.arange(5.0)
    rows = correlations({"a": x, "b": 2 * x + 1, "c": -(x**3), "d": np.ones(5)})
    by = {(r["first"], r["second"]): r for r in rows}
    assert len(by) == 6 and {r["cells"] for r in rows} == {5}
    assert [by["a", "b"][m] for m in ("pearson", "spearman", "kendall")] == pytest.approx([1, 1, 1])
    assert [by["a", "c"][m] for m in ("spearman", "kendall")] == pytest.approx([-1, -1])
    assert by["a", "c"]["pearson"] == pytest.approx(np.corrcoef(x, -(x**3))[0, 1])
    assert by["b", "d"]["kendall"] is None


# Paired evaluations.


def test_paired_against_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.random(200) < 0.7, rng.random(200) < 0.6
    found = paired(first, second, resamples=500, seed=3)
    assert found["difference"] == pytest.approx(first.mean() - second.mean())
    each = first.astype(float) - second
    expected = scipy.stats.bootstrap((each,), np.mean, n_resamples=500, method="percentile", rng=3)
    np.testing.assert_allclose([found["low"], found["high"]], expected.confidence_interval, atol=1e-12)
    gained, lost = (first & ~second).sum(), (second & ~first).sum()
    assert (found["gained"], found["lost"]) == (gained, lost)
    assert found["mcnemar_p"] == pytest.approx(scipy.stats.binomtest(gained, gained + lost).pvalue)
    assert found["excluded"] == max(abs(found["low"]), abs(found["high"]))
    assert (found["p"] <= 0.05) == (not found["low"] <= 0 <= found["high"])
    alike = paired(first, first)
    assert (alike["difference"], alike["p"], alike["mcnemar_p"]) == (0, 1, 1)
    graded = paired(first * 0.3, second)
    assert graded["mcnemar_p"] is None and graded["gained"] is None


def test_what_never_differs_has_an_interval():
    """The largest share of samples that 20 samples without one, or 5 images, may miss with a chance of 5 %."""
    bound = 1 - 0.05 ** (1 / 20)
    alike = paired(np.ones(20), np.ones(20))
    assert (alike["low"], alike["high"], alike["excluded"]) == pytest.approx((-bound, bound, bound))
    assert (1 - bound) ** 20 == pytest.approx(0.05)
    assert (alike["units"], alike["differing"], alike["p"]) == (20, 0, 1)
    logits = paired(np.full(20, 3.0), np.full(20, 3.0))
    assert (logits["low"], logits["high"]) == (0, 0)  # of numbers without a range nothing can be said


def test_mcnemar_by_hand():
    found = paired([1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0])
    assert (found["gained"], found["lost"]) == (5, 1)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 6) / 2**6)
    alone = mcnemar([1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0])
    assert alone == {name: found[name] for name in ("gained", "lost", "mcnemar_p")}
    assert mcnemar([1, 0.5], [0, 0]) == {"gained": None, "lost": None, "mcnemar_p": None}
    with pytest.raises(UserError, match="2 and 3 samples"):
        mcnemar([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        mcnemar([[1, 0], [1, 1]], [1, 0])


def studies(seeds, of_seeds, count=200, difference=0.0, number=150):
    """Intervals of placements that score right with a chance of their sample's, shifted by each training seed."""
    for study in range(number):
        rng = np.random.default_rng([study, seeds])
        item = 0.1 + 0.7 * rng.beta(0.5, 0.5, count)
        scores = [
            rng.random((seeds, count)) < np.clip(item + shift + of_seeds * rng.standard_normal((seeds, 1)), 0, 1)
            for shift in (difference, 0)
        ]
        yield paired(*scores, resamples=300, seed=study)


def holds(found, truth=0.0):
    return found["low"] <= truth <= found["high"]


def test_paired_intervals_hold_the_chance_of_samples_and_of_seeds():
    assert 0.9 < np.mean([holds(f) for f in studies(1, 0)]) < 0.98
    # One seed knows nothing of the chance of training.
    assert np.mean([holds(f) for f in studies(1, 0.06)]) < 0.75
    for seeds in (2, 3, 5):
        for of_seeds in (0, 0.06):
            assert np.mean([holds(f) for f in studies(seeds, of_seeds)]) > 0.9
    # Nor do more seeds hide a difference for nothing.
    found = [*studies(5, 0.0, difference=0.1, number=60)]
    assert np.mean([not holds(f) for f in found]) > 0.9 and np.mean([f["p"] <= 0.05 for f in found]) > 0.9
    assert all(f["mcnemar_p"] is None for f in found)


def test_seeds_spread_as_a_t_test_where_only_they_vary():
    """All samples of a seed score alike: Welch's t-test on the seeds' means, with normal instead of true quantiles of
    the bootstrap."""
    rng = np.random.default_rng(4)
    means = [rng.random((8, 1)), rng.random((8, 1)) + 0.2]
    found = paired(*(np.tile(m, (1, 50)) for m in means), resamples=20_000)
    t = scipy.stats.ttest_ind(*(m[:, 0] for m in means), equal_var=False).confidence_interval()
    np.testing.assert_allclose([found["low"], found["high"]], t, atol=0.03)


@pytest.mark.parametrize("seeds", [1, 3])
def test_samples_of_one_image_are_resampled_together(seeds):
    """Every sample twice says no more than once, which who takes them for different ones does not know."""
    rng = np.random.default_rng(2)
    scores = [rng.random((seeds, 80)) < chance for chance in (0.7, 0.6)]
    twice = [np.repeat(x, 2, axis=1) for x in scores]
    images = np.repeat(np.arange(80), 2)
    names = ("difference", "low", "high", "p")
    once = [paired(*scores, resamples=500)[name] for name in names]
    together = paired(*twice, clusters=images, resamples=500)
    np.testing.assert_allclose([together[name] for name in names], once, rtol=1e-9, atol=1e-12)
    apart = paired(*twice, resamples=500)
    assert apart["high"] - apart["low"] < 0.9 * (once[2] - once[1])
    # McNemar's test is of samples, whatever hangs together.
    assert together["gained"] == apart["gained"]


def test_clusters_of_unequal_sizes_by_a_loop():
    rng = np.random.default_rng(3)
    first, second, labels = rng.random(30), rng.random(30), rng.integers(0, 8, 30)
    found = paired(first, second, clusters=labels, resamples=200, seed=4)
    members = [np.flatnonzero(labels == label) for label in sorted({*labels})]
    (rows,) = bootstrap_rows(len(members), 200, 4)
    means = [(first - second)[np.concatenate([members[m] for m in row])].mean() for row in rows]
    np.testing.assert_allclose([found["low"], found["high"]], np.percentile(means, [2.5, 97.5]), rtol=1e-9)
    alone = paired(first, second, clusters=np.arange(30), resamples=200, seed=4)
    assert alone == paired(first, second, resamples=200, seed=4)
    with pytest.raises(ValueError, match="a label for every sample"):
        paired(first, second, clusters=labels[:5])


def test_p_is_a_students_as_the_interval_is():
    """Means of seeds alone vary: the draws' share beyond 0, by hand, in Student's t with Welch's degrees of freedom."""
    rng = np.random.default_rng(4)
    means = [rng.random((8, 1)), rng.random((8, 1)) + 0.2]
    found = paired(*(np.tile(m, (1, 50)) for m in means), resamples=20_000)
    assert found["p"] == pytest.approx(
        scipy.stats.ttest_ind(*(m[:, 0] for m in means), equal_var=False).pvalue, abs=0.03
    )
    # No draw is beyond 0 here: the floor, at Welch's degrees of freedom.
    means[1] += 9
    apart = paired(*(np.tile(m, (1, 50)) for m in means), resamples=999)
    freedom = scipy.stats.ttest_ind(*(m[:, 0] for m in means), equal_var=False).df
    assert apart["p"] == pytest.approx(2 * scipy.stats.t.sf(scipy.stats.norm.isf(1 / 1000), freedom), rel=1e-6)
    # One seed each: twice the share, which is above the floor of 12 samples.
    one = paired(np.ones(12), np.zeros(12), resamples=999)
    assert one["p"] == pytest.approx(2 / 1000, rel=1e-9)


@pytest.mark.parametrize("of_seeds", [0.015, 0.03])
def test_small_p_of_few_seeds_are_rare_by_chance(of_seeds):
    """Two seeds against five, which is where p that ignores the tails of Student's t is small too often."""

    def drawn(number, difference):
        for study in range(number):
            rng = np.random.default_rng([study, 11])
            scores = [
                level + of_seeds * rng.standard_normal((seeds, 1)) + 0.05 * rng.standard_normal((seeds, 25))
                for seeds, level in ((2, 0.5 + difference), (5, 0.5))
            ]
            yield paired(*scores, resamples=2000, seed=study)["p"]

    chance = np.array([*drawn(600, 0)])
    # Two standard errors of so many studies above .02 and .008. Spread draws alone give .035 and .028 at .03.
    assert np.mean(chance <= 0.01) <= 0.03 and np.mean(chance <= 0.004) <= 0.015
    assert np.mean(chance <= 0.5) > 0.25
    assert np.mean(np.array([*drawn(40, 0.15)]) <= 0.05) > 0.4


# Tables and figures.


@dataclasses.dataclass
class Traced:
    ids: list
    cells: list
    p_clean: np.ndarray
    p_corrupt: np.ndarray
    te: np.ndarray
    ie: np.ndarray


def traced(seed):
    te, ie = trace(3, 2, seed=seed)
    clean = te.max(1) + 0.1
    te = te.astype(np.float32)
    return Traced(
        [f"{seed}/{n}" for n in range(3)],
        ["L0-attn", "L0-mlp", "L1-attn", "L1-mlp"],
        clean,
        clean[:, None] - te,
        te,
        ie,
    )


def test_tidy_rows_are_the_arrays(tmp_path):
    tasks = {"one": traced(0), "two": traced(1)}
    for name in ("a", "b"):
        write_effects(tmp_path / name, tasks, eps=0.01)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = pq.read_table(tmp_path / "a").to_pylist()
    assert len(rows) == 2 * 3 * 2 * 4
    keys = [(r["task"], r["id"], r["replicate"], r["cell"]) for r in rows]
    assert len(set(keys)) == len(keys)
    for row, (task, sample, replicate, cell) in zip(rows, keys, strict=True):
        t = tasks[task]
        n, c = t.ids.index(sample), t.cells.index(cell)
        assert row["p_clean"] == t.p_clean[n] and row["p_corrupt"] == t.p_corrupt[n, replicate]
        assert row["te"] == t.te[n, replicate] and row["ie"] == t.ie[n, replicate, c]
        assert row["rr"] == pytest.approx(row["ie"] / (row["te"] + 0.01), rel=1e-12)
    assert [r["id"] for r in rows] == [r["id"] for r in sorted(rows, key=lambda r: (r["task"], r["id"]))]


def test_a_summary_can_be_read_back(tmp_path):
    rows = [{"task": "one", **row} for row in rr_summary(*trace(12), [f"L{n}-attn" for n in range(4)], resamples=20)]
    write_rows(tmp_path / "a", rows)
    write_rows(tmp_path / "b", rows)
    assert pq.read_table(tmp_path / "a").to_pylist() == rows
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def drawings():
    cells = [f"L{layer}-{kind}" for kind in ("attn", "mlp") for layer in range(3)]
    value = np.linspace(-0.1, 1, 6)
    groups = {name: Interval(value + shift, value - 0.1, value + 0.3) for name, shift in (("knowledge", 0), ("p", 0.1))}
    different = np.arange(6) == 4
    stable = {"knowledge": rank_stability(*trace(40), top=(2,), halves=5)}
    alike = correlations({"noise": value, "swap": value**2, "flat": np.ones(6)})
    estimates = {name: interval._asdict() for name, interval in groups.items()}
    return {
        "intervals": (tracing.interval_plot, {"cells": cells, "groups": estimates, "different": different}),
        "stability": (tracing.stability, {"groups": stable}),
        "correlation": (tracing.correlation, {"rows": alike}),
        "heatmap": (tracing.heatmap, {"panels": {"a": value.reshape(3, 2)}}),
    }


@dataclasses.dataclass(frozen=True)
class Formats(DeviceOptions):
    """Of a command that draws."""

    out: Path = Path("runs/none")


@pytest.mark.parametrize("name", ["intervals", "stability", "correlation", "heatmap"])
def test_figures_have_the_same_bytes_again(name, tmp_path):
    options = Formats(figures=("svg",))
    for folder in ("a", "b"):
        draw, data = drawings()[name]
        base.save_figure(Run.open(tmp_path / folder, options), name, draw, "A figure", pdf=True, **data)
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        first, second = ((tmp_path / folder / name).with_suffix(suffix).read_bytes() for folder in ("a", "b"))
        assert first == second and first.startswith(magic)
        assert b"CreationDate" not in first and b"<dc:date>" not in first and len(first) > 4000
    check_run_folder(tmp_path / "a", tmp_path)
    Run.open(tmp_path / "b", Formats())  # the same run, whatever formats it writes


@pytest.mark.parametrize("name", ["intervals", "stability", "correlation", "heatmap"])
def test_a_figure_is_drawn_again_from_its_data(name, tmp_path):
    """Byte for byte; and other data are drawn differently."""
    draw, data = drawings()[name]
    run = Run.open(tmp_path / "run", {})
    base.save_figure(run, "deep/figure", draw, "A figure", pdf=True, **data)
    for suffix in (".png", ".pdf"):
        redraw(run.folder / "deep/figure.json", tmp_path / f"again{suffix}")
        assert (tmp_path / f"again{suffix}").read_bytes() == (run.folder / f"deep/figure{suffix}").read_bytes()
    content = (run.folder / "deep/figure.json").read_text()
    assert "NaN" not in content
    (tmp_path / "changed.json").write_text(re.sub(r"\d\.\d+", "0.25", content))
    redraw(tmp_path / "changed.json", tmp_path / "changed.png")
    assert (tmp_path / "changed.png").read_bytes() != (run.folder / "deep/figure.png").read_bytes()


def test_the_command_draws_a_folder_again(tmp_path, capsys):
    run = Run.open(tmp_path / "run", {})
    for name in ("heatmap", "correlation"):
        draw, data = drawings()[name]
        base.save_figure(run, name, draw, "A figure", **data)
    kept = {path.name: path.read_bytes() for path in run.folder.glob("*.png")}
    for path in run.folder.glob("*.png"):
        path.unlink()
    figures_command.main(figures_command.Args(run.folder))
    assert {path.name: path.read_bytes() for path in run.folder.glob("*.png")} == kept
    figures_command.main(figures_command.Args(run.folder, "heatmap.json", tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["heatmap.png"]
    figures_command.main(figures_command.Args(run.folder, out=tmp_path / "paper", figures=("svg", "pdf")))
    names = {f"{name}.{suffix}" for name in ("heatmap", "correlation") for suffix in ("svg", "pdf")}
    assert {path.name for path in (tmp_path / "paper").iterdir()} == names
    with pytest.raises(SystemExit):
        figures_command.main(figures_command.Args(run.folder, figures=("svg",)))
    assert "--figures needs --out" in capsys.readouterr().err
    for args, says in (
        ((run.folder, "heatmap.png"), "no figure that is drawn from heatmap.png: name a file such as heatmap.json"),
        ((tmp_path / "none",), "has no readable artifacts.json"),
    ):
        with pytest.raises(SystemExit):
            figures_command.main(figures_command.Args(*args))
        assert says in capsys.readouterr().err


def test_files_that_are_no_figures_data(tmp_path):
    for content, says in (
        ({"a": 1}, "holds no figure's data"),
        ({"drawer": "tracing.heat", "data": {}}, "unknown drawer 'tracing.heat' .*; did you mean 'tracing.heatmap'"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=says):
            redraw(tmp_path / "a.json", tmp_path / "a.png")


def test_a_drawer_describes_its_arguments():
    with pytest.raises(TypeError, match="describe each of its arguments"):
        base.drawer("curves", Chart, lines="the lines")(lambda lines, label: None)


def test_figure_of_intervals_shows_the_numbers():
    draw, data = drawings()["intervals"]
    attn, mlp = draw(**base.plain_data(data)).axes
    assert (attn.get_title(), mlp.get_title()) == ("attn", "mlp")
    value = np.linspace(-0.1, 1, 6)
    np.testing.assert_allclose(attn.containers[0][0].get_ydata(), value[:3])
    ends = np.array([segment[:, 1] for segment in mlp.containers[1][2][0].get_segments()])
    np.testing.assert_allclose(ends, np.stack([value - 0.1, value + 0.3], 1)[3:])
    stars = [[text.xy[0] for text in axis.texts] for axis in (attn, mlp)]
    assert stars == [[], [1]]  # cell 4 is the MLP of layer 1
