"""Adapted and enriched features, from numbers alone, against SciPy and hand-made cases."""

import numpy as np
import pytest
from kind_cases import dictionary, one_sentence
from scipy.stats import fisher_exact

from interventions.diff.features import adapted_latents, cosine_limits, rotation, visual_energy
from interventions.diff.place import Place
from interventions.diff.quality import Sums
from interventions.diff.spatial import enrichment
from vlm_jax import UserError


def test_rotation():
    """A latent that turned, one that changed its length, and two that changed places."""
    rng = np.random.default_rng(0)
    base = dictionary(rng, members=1).member(0)
    after = np.array(base.W_dec)
    after[3] = rng.standard_normal(64)
    after[7] *= 5
    after[[10, 11]] = after[[11, 10]]
    found = rotation(base, base.replace(W_dec=after))
    same = np.setdiff1d(np.arange(96), [3, 10, 11])
    np.testing.assert_allclose(found.cosine[same], 1, atol=1e-6)
    assert found.cosine[3] < 0.5 and abs(found.cosine[10]) < 0.6
    assert found.nearest[[10, 11]].tolist() == [11, 10] and found.nearest_cosine[10] == pytest.approx(1)
    assert found.relocated == pytest.approx((2 + (found.nearest[3] != 3)) / 96)
    with pytest.raises(UserError, match="adapted from it") as caught:
        rotation(base, dictionary(rng, members=1, latents=95).member(0))
    assert one_sentence(caught.value)


def test_energy():
    image, text = np.array([4.0, 0.0, 2.0]), np.array([1.0, 0.0, 0.0])
    np.testing.assert_array_equal(visual_energy(image, None, "raw"), image)
    np.testing.assert_allclose(visual_energy(image, text, "ratio"), [4, 0, 2e6])
    np.testing.assert_array_equal(visual_energy(image, text, "share"), [0.8, 0, 1])
    with pytest.raises(UserError, match="--text-model"):
        visual_energy(image, None, "share")


def test_adapted_latents_by_layer_or_pooled():
    places = Place("text.resid_post", 1), Place("text.resid_post", 2)
    cosines = dict(zip(places, (np.linspace(0, 0.4, 8), np.linspace(0.5, 1, 8)), strict=True))
    energies = {place: np.full(8, 0.5) for place in places}
    energies[places[0]][0] = 0.001
    limits = cosine_limits(cosines, 25)
    by_layer = adapted_latents(cosines, energies, limits)
    assert [np.flatnonzero(by_layer[place]).tolist() for place in places] == [[1], [0, 1]]
    pooled = adapted_latents(cosines, energies, cosine_limits(cosines, 25, pooled=True))
    assert [np.flatnonzero(pooled[place]).tolist() for place in places] == [[1, 2, 3], []]
    hardly_turned = {place: np.full(8, 0.99) for place in places}
    assert not adapted_latents(hardly_turned, energies, limits)[places[0]].any()


def sums(active, count):
    active = np.asarray(active, float)
    return Sums(np.float64(count), np.zeros(4), np.float64(1), np.float64(0), active, active)


def test_enrichment_is_fishers_test():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 60, 30), rng.integers(0, 60, 30)
    found = enrichment(sums(a, 200), sums(b, 300))
    for latent in range(30):
        table = [[a[latent], 200 - a[latent]], [b[latent], 300 - b[latent]]]
        assert found.p[latent] == pytest.approx(fisher_exact(table, alternative="greater").pvalue, rel=1e-6)
        other = fisher_exact(table, alternative="less").pvalue
        assert found.p[latent] != pytest.approx(other, rel=1e-3)
    np.testing.assert_allclose(found.rate - found.neutral, a / 200 - b / 300)
    # Benjamini and Hochberg, spelt out.
    order = np.argsort(found.p)
    adjusted = np.minimum.accumulate((found.p[order] * 30 / np.arange(1, 31))[::-1])[::-1]
    np.testing.assert_allclose(found.q[order], np.minimum(adjusted, 1), rtol=1e-9)


def test_filters():
    found = enrichment(sums([50, 50, 3, 0], 1000), sums([5, 45, 0, 0], 1000))
    passed = found.selected(3.0, 0.005, 0.05)
    assert passed["odds_ratio"].tolist() == [True, False, True, False]
    assert passed["difference"].tolist() == [True, True, False, False]  # 0.045, 0.005, 0.003, 0
    assert passed["q"].tolist() == [True, False, False, False]


def test_a_latent_that_is_always_or_never_active():
    found = enrichment(sums([0, 100, 100], 100), sums([0, 100, 0], 100))
    assert np.isfinite(found.odds_ratio).all() and np.isfinite(found.q).all()
    assert found.odds_ratio[0] == pytest.approx(1) and found.odds_ratio[1] == pytest.approx(1)
    assert found.odds_ratio[2] > 1000
