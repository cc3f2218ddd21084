"""The tests' import hook checks the shapes in signatures, for every kind of array that a program may be given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from vlm_jax.config import Rope
from vlm_jax.nn.layers import attend, rotate
from vlm_jax.nn.rope import rotary
from vlm_jax.sites import NO_TAPS, Context, Probe

Q, ANGLES = jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.float32), jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)


def attention(q, k, mask):
    return attend(q, k, k, mask, Probe((), NO_TAPS, Context()), "text")


@pytest.mark.parametrize("array", [np.ones, jnp.ones])
def test_arrays_of_jax_and_numpy_pass(array):
    q, k = array((2, 5, 4, 8), jnp.float32), array((2, 5, 2, 8), jnp.float32)
    out = attention(q, k, array((2, 5, 5), bool))
    assert out.shape == (2, 5, 32)
    assert jax.eval_shape(rotate, Q, ANGLES, ANGLES).shape == Q.shape  # tracers


def test_other_shapes_and_dtypes_are_refused():
    q, k, mask = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8)), jnp.ones((2, 5, 5), bool)
    for wrong in ((q, k[:1], mask), (q, k[..., :4], mask), (q, k, mask[0]), (q, k, mask.astype(int)), (q[0], k, mask)):
        with pytest.raises(TypeCheckError):
            attention(*wrong)
    with pytest.raises(TypeCheckError):
        jax.eval_shape(rotate, Q, ANGLES, jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))
    with pytest.raises(TypeCheckError, match="position_ids"):
        rotary(jnp.ones((2, 5), int), Rope(1e4), 8)
