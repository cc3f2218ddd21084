"""Splash attention, interpreted here, computes what XLA's attention does, and is used only where it may be."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import value_and_grad
from jax.sharding import NamedSharding, PartitionSpec

import vlm_jax
from interventions.placement.adapters import init_lora, lowest_layer
from train import trunk
from train.adapter import adapter_label
from train.plan import topology
from train.subsets import split
from vlm_jax import UserError
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.config import with_attention
from vlm_jax.data import load_task
from vlm_jax.info import config_of
from vlm_jax.mesh.sharding import make_mesh
from vlm_jax.nn.kernels import causal_attention
from vlm_jax.nn.layers import attend
from vlm_jax.prompts import encode
from vlm_jax.sites import NO_TAPS, Context, Probe

ROWS, HEADS, GROUPS, DIM = 2, 8, 2, 64


@pytest.mark.parametrize(("length", "softcap"), [(128, None), (200, None), (96, 20.0)])
def test_values_and_gradients_are_those_of_plain_attention(length, softcap):
    """Padding on the left and on the right; what padding reads is nobody's business."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(ROWS, length, n, DIM)).astype(np.float32) for n in (HEADS, GROUPS, GROUPS))
    real = np.ones((ROWS, length), bool)
    real[0, :37], real[1, -20:] = False, False
    weight = rng.normal(size=q.shape).astype(np.float32) * real[..., None, None]
    mask = np.tril(np.ones((length, length), bool))[None] & real[:, None]

    def plain(q, k, v):
        probe = Probe((), NO_TAPS, Context())
        out = attend(q, k, v, mask, probe, "text", softcap=softcap, causal=True)
        return total(out.reshape(q.shape))

    def kernel(q, k, v, real=real):
        return total(causal_attention(q, k, v, real, DIM**-0.5, softcap))

    def total(out):
        return jnp.sum(out * weight), out * real[..., None, None]

    (expected, out), grads = jax.jit(jax.value_and_grad(plain, (0, 1, 2), has_aux=True))(q, k, v)
    (_, found), ours = jax.jit(jax.value_and_grad(kernel, (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(found, out, atol=1e-5)
    for ours_, theirs in zip(ours, grads, strict=True):
        np.testing.assert_allclose(*(np.where(real[..., None, None], g, 0) for g in (ours_, theirs)), atol=1e-5)
    blind, _ = jax.jit(kernel)(q, k, v, np.ones_like(real))  # the control: padding is seen
    assert abs(blind - expected) > 1e-3


@pytest.fixture(scope="module")
def models():
    (plain, processor), (kernel, _) = (vlm_jax.load("mini-qwen3-vl", attention=name) for name in ("xla", "splash"))
    examples = load_task("mini-docvqa", split="train", limit=3)
    return plain, kernel, encode(examples, processor, plain.config)


def test_a_model_gives_the_same_logits_and_is_the_same_model(models):
    plain, kernel, batch = models
    real = np.asarray(batch.inputs.attention_mask)
    logits = [np.asarray(jax.jit(lambda m: m(batch.inputs).logits)(m))[real] for m in (plain, kernel)]
    np.testing.assert_allclose(*logits, atol=2e-5 * np.abs(logits[0]).max())
    assert fingerprint(plain) == fingerprint(kernel)


def uses(function, *args) -> bool:
    """Whether a program calls the kernel."""
    return "splash" in str(jax.make_jaxpr(function)(*args))


def test_lora_has_the_same_loss_and_gradients(models):
    plain, kernel, batch = models
    adapter = init_lora(plain, ["L1-attn", "L3-mlp"], r=4, alpha=16.0, dropout=0.0, key=jax.random.key(0))
    adapter = adapter.replace(weights={site: (a, 0.1 + b) for site, (a, b) in adapter.weights.items()})
    found = []
    for model in (plain, kernel):
        trained, rest = split(trunk.Adapted(model, adapter, lowest_layer(adapter)), adapter_label)
        data = trunk.trunk(plain, batch, lowest_layer(adapter))
        run = value_and_grad(trunk.adapter_loss)
        found.append(jax.jit(run)(trained, rest, data, jax.random.key(0)))
        assert uses(run, trained, rest, data, jax.random.key(0)) == (model is kernel)
    (loss, grads), (ours, our_grads) = found
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(our_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_where_scores_are_asked_for_xla_lays_them_out(models):
    plain, kernel, batch = models
    taps = [jax.jit(lambda m: m(batch.inputs, taps=("text.attn_probs",)).taps)(m) for m in (plain, kernel)]
    np.testing.assert_array_equal(*(t["text.attn_probs"] for t in taps))
    assert uses(lambda m: m(batch.inputs).logits, kernel)
    assert not uses(lambda m: m(batch.inputs, taps=("text.attn_probs",)).logits, kernel)


def test_models_that_are_not_only_causal_are_refused():
    for name in ("Gemma-3-12B", "Gemma-3-4B"):
        with pytest.raises(UserError, match=r"'splash' is causal and nothing else, but a gemma3 has"):
            with_attention(config_of(name), "splash")
    with pytest.raises(UserError, match="unknown attention 'flash'"):
        with_attention(config_of("Qwen3-VL-4B"), "flash")
    assert with_attention(config_of("Qwen3-VL-4B"), "splash").text.attention == "splash"


def test_it_compiles_for_tpus_forwards_and_backwards():
    """In bfloat16, where all else is asked to be as precise as can be, on a mesh of data and heads."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the extra tpu-aot")
    mesh = make_mesh("data=2,tensor=2", topology("v5e:2x2"))
    places = [NamedSharding(mesh, PartitionSpec("data", None, "tensor")), NamedSharding(mesh, PartitionSpec("data"))]
    q, k, v = (
        jax.ShapeDtypeStruct((4, 256, heads, 128), jnp.bfloat16, sharding=places[0])
        for heads in (HEADS, GROUPS, GROUPS)
    )
    real = jax.ShapeDtypeStruct((4, 256), bool, sharding=places[1])

    def total(q, k, v, real):
        return jnp.sum(causal_attention(q, k, v, real, 128**-0.5, None).astype(jnp.float32))

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        text = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v, real).compile().as_text()
    assert text.count("splash") and "all-gather" not in text
