"""Attention against NumPy where no supported model of transformers exercises an option."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers import ACTIVATIONS, attend


def by_hand(q, k, v, mask, scale, softcap):
    """Softmax attention one query at a time; each group of query heads reads one key-value head."""
    batch, length, heads, dim = q.shape
    out = np.zeros((batch, length, heads, dim))
    for b, t, h in np.ndindex(batch, length, heads):
        group = h // (heads // k.shape[2])
        scores = k[b, :, group] @ q[b, t, h] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max()) * mask[b, t]
        out[b, t, h] = weights / weights.sum() @ v[b, :, group]
    return out.reshape(batch, length, -1)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_scale_and_softcap(softcap):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, heads, 8)) for heads in (4, 2, 2))
    mask = np.broadcast_to(np.tril(np.ones((5, 5), bool)), (2, 5, 5))
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]

    def ours(softcap):
        return attend(*arrays, jnp.asarray(mask), lambda site, value: value, "text", scale=0.9, softcap=softcap)

    np.testing.assert_allclose(ours(softcap), by_hand(q, k, v, mask, 0.9, softcap), atol=1e-5)
    assert np.abs(np.asarray(ours(softcap)) - by_hand(q, k, v, mask, 0.9, 1.5)).max() > 1e-2  # the control


def test_activations_differ():
    x = jnp.linspace(-3, 3, 50)
    values = [np.asarray(f(x)) for f in ACTIVATIONS.values()]
    for i, one in enumerate(values):
        assert all(np.abs(one - other).max() > 1e-4 for other in values[i + 1 :])
