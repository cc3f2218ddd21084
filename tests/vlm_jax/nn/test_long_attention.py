"""Attention of many queries without a causal mask, as vision towers have it: block by block, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import layers
from vlm_jax.sites import Context, Probe


def attention(q, k, v, mask):
    return layers.attend(q, k, v, mask, Probe((), {}, Context()), "visual")


def arrays(length: int):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, length, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, length, 2, 8)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((2, length, length)) < 0.3)
    return q, k, v, mask.at[0, 3].set(False)  # one query sees nothing


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [24, 21])
def test_blocks_compute_what_the_whole_does(monkeypatch, length, masked):
    """Also where the last block is not full. Values, and gradients through the computation that is done again."""
    monkeypatch.setattr(layers, "_QUERY_BLOCK", 8)
    q, k, v, mask = arrays(length)
    mask = mask if masked else None

    def both(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    whole = both(q, k, v)
    monkeypatch.setattr(layers, "_LONG", 16)
    for one, other in zip(both(q, k, v), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert "scan" in str(jax.make_jaxpr(lambda q: attention(q, k, v, mask))(q))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_large_picture_needs_less_memory(monkeypatch, gradient):
    """4,096 patches: the compiled program's own account. Without blocks it is the control."""

    def temporary() -> int:
        shape = jax.ShapeDtypeStruct((1, 4096, 16, 64), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, 4096, 4096), jnp.bool_)

        def run(q, k, v, mask):
            if not gradient:
                return attention(q, k, v, mask)
            return jax.grad(lambda *qkv: attention(*qkv, mask).sum(), (0, 1, 2))(q, k, v)

        return jax.jit(run).lower(shape, shape, shape, mask).compile().memory_analysis().temp_size_in_bytes

    blocks = temporary()
    monkeypatch.setattr(layers, "_LONG", 8192)
    assert 5 * blocks < temporary()
