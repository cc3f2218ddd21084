"""Products of 16-bit arrays: added up in float32 in both directions, and what they keep for gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn.products import product

SPECS = {
    "linear": ("ri,io->ro", (6, 300), (300, 5)),
    "unembedding": ("rd,vd->rv", (6, 300), (9, 300)),
    "scores": ("bgnd,bgtd->bgnt", (2, 3, 4, 64), (2, 3, 7, 64)),
    "values": ("bgnt,bgtd->bgnd", (2, 3, 4, 300), (2, 3, 300, 8)),
}


def pair(name: str, dtype=jnp.bfloat16):
    spec, *shapes = SPECS[name]
    rng = np.random.default_rng(0)
    return spec, *(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def dots(jaxpr) -> list:
    """The dot products of a program, at all depths: the types of what is multiplied, and of the sum."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append((*(str(var.aval.dtype) for var in equation.invars), str(equation.outvars[0].aval.dtype)))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += dots(inner)
    return found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SPECS)
def test_the_sum_is_rounded_once(name, dtype):
    """Within half a unit of the last place of the exact sum."""
    spec, x, y = pair(name, dtype)
    exact = np.einsum(spec, np.asarray(x, np.float64), np.asarray(y, np.float64))
    unit = jnp.finfo(dtype).eps
    assert product(spec, x, y).dtype == dtype
    np.testing.assert_allclose(np.asarray(product(spec, x, y), np.float64), exact, rtol=0.51 * unit, atol=1e-5)
    wide = product(spec, x, y, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(wide, np.float64), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("out", [None, jnp.float32])
@pytest.mark.parametrize("name", SPECS)
def test_gradients(name, out):
    """Those of float32, within the arrays' precision; of 16-bit products that add up in float32."""
    spec, x, y = pair(name)

    weights = jnp.asarray(np.random.default_rng(1).standard_normal(product(spec, x, y).shape), jnp.bfloat16)

    def loss(x, y):
        return (product(spec, x, y, out).astype(jnp.float32) * weights).sum()

    ours = jax.grad(loss, (0, 1))(x, y)
    exact = jax.grad(loss, (0, 1))(x.astype(jnp.float32), y.astype(jnp.float32))
    for mine, wanted, array in zip(ours, exact, (x, y), strict=True):
        assert mine.dtype == array.dtype
        error = 0.51 * float(jnp.finfo(jnp.bfloat16).eps)
        np.testing.assert_allclose(np.asarray(mine, np.float32), wanted, rtol=error, atol=1e-4)
    narrow = ("bfloat16", "bfloat16", "float32")
    assert dots(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, y).jaxpr) == [narrow] * 3
    assert narrow not in dots(jax.make_jaxpr(lambda x, y: jnp.einsum(spec, x, y))(x, y).jaxpr)  # the control


def test_frozen_weights_keep_no_inputs():
    """For the gradient of x only y is needed, and the reverse; also in a loop over layers."""
    spec, x, y = pair("linear")
    _, pull = jax.vjp(lambda x: product(spec, x, y), x)
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [y.shape]
    _, pull = jax.vjp(lambda y: product(spec, x, y), y)
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [x.shape]
    square = jnp.stack([y @ y.T] * 3)  # three layers of (300, 300)

    def layers(x, square, checkpoint=lambda body: body):
        body = checkpoint(lambda x, w: (product(spec, x, w), None))
        return jax.lax.scan(body, x, square)[0]

    _, pull = jax.vjp(lambda x: layers(x, square), x)
    assert (3, *x.shape) not in [leaf.shape for leaf in jax.tree.leaves(pull)]
    _, pull = jax.vjp(lambda square: layers(x, square), square)
    assert (3, *x.shape) in [leaf.shape for leaf in jax.tree.leaves(pull)]  # the control
    plain, again = (
        jax.grad(lambda x, how=how: layers(x, square, how).sum())(x) for how in (lambda b: b, jax.checkpoint)
    )
    np.testing.assert_array_equal(plain, again)


def test_other_precisions():
    """float32 is an einsum; float16 keeps incoming gradients that it could not hold."""
    spec, x, y = pair("linear", jnp.float32)
    np.testing.assert_array_equal(product(spec, x, y), jnp.einsum(spec, x, y))
    x, y = x.astype(jnp.float16), y.astype(jnp.float16)
    slope = jax.grad(lambda x: 1e-8 * product(spec, x, y, jnp.float32).sum())(x)
    assert slope.dtype == jnp.float16 and np.abs(slope).max() > 0


def test_the_products_have_no_forward_mode():
    spec, x, y = pair("linear")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: product(spec, x, y), (x,), (x,))


def test_under_vmap_and_scan():
    spec, x, y = pair("linear")
    batched = jax.vmap(lambda x: product(spec, x, y))(jnp.stack([x, 2 * x]))
    np.testing.assert_array_equal(batched, jnp.stack([product(spec, x, y), product(spec, 2 * x, y)]))

    def scanned(scale):
        return jax.lax.scan(lambda total, w: (total + product(spec, x * scale, w).sum(), None), 0.0, jnp.stack([y, y]))

    value = jax.grad(lambda scale: scanned(scale)[0].astype(jnp.float32))(jnp.bfloat16(1))
    assert value.dtype == jnp.bfloat16 and jnp.isfinite(value)
