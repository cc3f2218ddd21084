"""The measures of a dictionary, and its change of scale."""

import numpy as np
import pytest
from kind_cases import dictionary

from interventions.dictionary import fvu, published_fvu


def test_fvu_is_one_minus_r_squared():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 6)) + 3
    guess = x + 0.5 * rng.standard_normal((50, 6))
    want = ((x - guess) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert fvu(x, guess) == pytest.approx(want, rel=1e-5)
    assert fvu(x, np.broadcast_to(x.mean(0), x.shape)) == pytest.approx(1)
    valid = np.arange(50) < 20
    part = x[:20]
    want = ((part - guess[:20]) ** 2).sum() / ((part - part.mean(0)) ** 2).sum()
    assert fvu(x, guess, valid) == pytest.approx(want, rel=1e-5)
    assert fvu(x, guess) != pytest.approx(want, rel=1e-2)


def test_the_published_fvu_is_too_small():
    """40 valid tokens and 576 that are not, as text beside an image in P2: the variance is 12.7 times too large, where
    the squared mean is 0.8125 of the variance."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((616, 8))
    x[:40] -= x[:40].mean(0)
    spread = (x[:40] ** 2).sum(1).mean()
    mean = np.full(8, np.sqrt(0.8125 * spread / 8))
    x += mean
    valid = np.arange(616) < 40
    guess = x + 0.1 * rng.standard_normal(x.shape)
    assert fvu(x, guess, valid) / published_fvu(x, guess, valid) == pytest.approx(12.7, abs=0.01)
    everything = np.ones(616, bool)
    assert fvu(x, guess, everything) == pytest.approx(float(published_fvu(x, guess, everything)), rel=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_scaled(architecture):
    """For activations that are three times as large, codes and reconstructions are."""
    rng = np.random.default_rng(2)
    one = dictionary(rng, members=1).member(0)
    if architecture == "jumprelu":
        one = one.replace(architecture="jumprelu", threshold=np.full(96, 0.7, np.float32))
    x = rng.standard_normal((9, 64), np.float32)
    larger = one.scaled(3.0)
    np.testing.assert_allclose(larger.codes(3 * x), 3 * np.asarray(one.codes(x)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(larger(3 * x), 3 * np.asarray(one(x)), rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(one.codes(3 * x)) - 3 * np.asarray(one.codes(x))).max() > 0.01
