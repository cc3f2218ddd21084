"""Attention against NumPy where no supported model of transformers exercises an option."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import layers
from vlm_jax.nn.layers import ACTIVATIONS, attend
from vlm_jax.sites import Context, Probe, Tap


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


def probe(tapped: bool) -> Probe:
    """Tapped probabilities are laid out as a site; without anyone to see them attention goes the faster way."""
    return Probe((), {"text.attn_probs": Tap()} if tapped else {}, Context())


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_scale_and_softcap(softcap, tapped):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, heads, 8)) for heads in (4, 2, 2))
    mask = np.broadcast_to(np.tril(np.ones((5, 5), bool)), (2, 5, 5))
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]

    def ours(softcap):
        return attend(*arrays, jnp.asarray(mask), probe(tapped), "text", scale=0.9, softcap=softcap)

    np.testing.assert_allclose(ours(softcap), by_hand(q, k, v, mask, 0.9, softcap), atol=1e-5)
    assert np.abs(np.asarray(ours(softcap)) - by_hand(q, k, v, mask, 0.9, 1.5)).max() > 1e-2  # the control


@pytest.mark.parametrize("tapped", [False, True])
def test_variants_that_share_a_past(monkeypatch, tapped):
    """Six rows, three variants of two prompts, in blocks of two queries: each row sees its own prompt's past."""
    monkeypatch.setattr(layers, "_QUERY_BLOCK", 2)
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((6, 5, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    past_k, past_v = rng.standard_normal((2, 2, 7, 2, 8)).astype(np.float32)
    own = np.broadcast_to(np.tril(np.ones((5, 5), bool)), (6, 5, 5))
    seen = rng.random((2, 5, 7)) < 0.7
    past = [tuple(map(jnp.asarray, (past_k, past_v, seen)))]
    got = attend(*map(jnp.asarray, (q, k, v, own)), probe(tapped), "text", past, causal=True)

    def want(rows):
        whole_k, whole_v = (np.concatenate([p[rows], x], 1) for p, x in ((past_k, k), (past_v, v)))
        return by_hand(q, whole_k, whole_v, np.concatenate([seen[rows], own], 2), 8**-0.5, None)

    np.testing.assert_allclose(got, want(np.arange(6) // 3), atol=1e-5)
    assert np.abs(np.asarray(got) - want(np.arange(6) % 2)).max() > 1e-1  # the control: another prompt's past


def test_activations_differ():
    x = jnp.linspace(-3, 3, 50)
    values = [np.asarray(f(x)) for f in ACTIVATIONS.values()]
    for i, one in enumerate(values):
        assert all(np.abs(one - other).max() > 1e-4 for other in values[i + 1 :])
