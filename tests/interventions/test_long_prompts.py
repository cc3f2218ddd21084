"""Knock-outs in long prompts: the scores of one block of queries after the other, with the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_oracle import make_batch
from kind_cases import LAYERS, error, only, spans_of

from interventions import AttentionKnockout, Gate, Logits, UniformAttention, bind, stack, sweep
from interventions.engine.program import sweep_program
from interventions.flow.maps import _attention
from interventions.flow.shares import _summed
from interventions.kinds.attention import MODES
from vlm_jax import Inputs, Intervention, Tap
from vlm_jax.errors import UserError
from vlm_jax.nn import layers
from vlm_jax.prompts import Batch
from vlm_jax.sites import Context, Probe, splits_queries

EXACT, CAUGHT = 2e-5, 1e-3  # logits reach 10, and blocks sum in another order


@pytest.fixture
def in_blocks(monkeypatch):
    """From now on, attention runs in blocks of 5 queries, the last of which is not full."""

    def begin():
        monkeypatch.setattr(layers, "_LONG", 8)
        monkeypatch.setattr(layers, "_QUERY_BLOCK", 5)
        sweep_program.clear_cache()

    yield begin
    sweep_program.clear_cache()


def knock_outs(case, mode):
    batch = Batch(case.inputs["left"], spans_of(case.masks["left"]), 2)
    made = [
        AttentionKnockout.between(LAYERS, query, key, layers, mode=mode, keep=0.1)
        for query, key, layers in (("text", "image", None), ("question", "before+question", [1, 2]))
    ]
    return bind(made, batch)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])  # the second has both kinds of layers
def test_blocks_change_nothing(cases, in_blocks, family):
    """Every mode, in prompts with images and padding."""
    case = cases(family)
    inputs, real = case.inputs["left"], case.real["left"]

    def logits():
        runs = [case.model(inputs, (knock,)).logits for mode in MODES for knock in knock_outs(case, mode)]
        runs.append(case.model(inputs, (UniformAttention(only(1, 0.7, 0)),)).logits)
        return [np.asarray(one)[real] for one in runs]

    whole, plain = logits(), np.asarray(case.model(inputs).logits)[real]
    in_blocks()
    for number, (one, other) in enumerate(zip(logits(), whole, strict=True)):
        assert np.abs(other - plain).max() > CAUGHT, number
        assert error(one, other) < EXACT, number


@pytest.mark.parametrize("mode", ["post_softmax", "random_mass"])
@pytest.mark.parametrize("start", [0, 8])
def test_sweeps_in_blocks(cases, in_blocks, monkeypatch, mode, start):
    """With a shared prefix and without, and with an intervention at another site in every run."""
    case = cases("qwen3_vl")
    inputs, read = case.inputs["left"], Logits.of(case.inputs["left"])
    batch = Batch(inputs, spans_of(case.masks["left"]), 2)
    made = [AttentionKnockout.between(LAYERS, "question", "image", [i], mode=mode) for i in range(LAYERS)]
    variants = stack([(knock,) for knock in bind(made, batch)])
    base = (Gate({"text.mlp_out": only(1, 0.5, 1)}),)

    def logits():
        return np.asarray(sweep(case.model, inputs, variants, read, base=base, start=start))

    whole, calls, in_turn = logits(), [], layers._in_turn
    monkeypatch.setattr(layers, "_in_turn", lambda *args: calls.append(1) or in_turn(*args))
    in_blocks()
    assert error(logits(), whole) < EXACT and calls


class Centred(Intervention):
    """Takes the mean over the queries from every score, so it needs all of them at once."""

    sites = frozenset({"text.attn_scores"})

    def __call__(self, site, value, ctx):
        return value - value.mean(2, keepdims=True)


jax.tree_util.register_static(Centred)


class Inherited(UniformAttention):
    """A kind of its own that inherits what it says of queries from another one."""

    def __call__(self, site, value, ctx):
        return value - value.mean(2, keepdims=True)


def test_what_needs_all_queries_gets_them(cases, in_blocks, monkeypatch):
    """A kind that does not say that it works query by query. The control says so falsely."""
    case = cases("qwen3_vl")
    inputs, real = case.inputs["left"], case.real["left"]
    whole = np.asarray(case.model(inputs, (Centred(),)).logits)[real]
    in_blocks()
    assert error(np.asarray(case.model(inputs, (Centred(),)).logits)[real], whole) < EXACT
    monkeypatch.setattr(Centred, "by_query", True)
    assert not splits_queries([Inherited(np.ones(LAYERS, np.float32))], "text.attn_scores")  # it states nothing itself
    assert error(np.asarray(case.model(inputs, (Centred(),)).logits)[real], whole) > CAUGHT


def test_taps_get_all_queries(cases, in_blocks):
    case = cases("gemma3")
    inputs, knock = case.inputs["left"], knock_outs(case, "post_softmax")[0]

    def probabilities():
        return np.asarray(case.model(inputs, (knock,), taps=["text.attn_probs"]).taps["text.attn_probs"])

    whole = probabilities()
    in_blocks()
    np.testing.assert_allclose(probabilities(), whole, atol=EXACT)


def test_sums_over_queries_come_from_blocks(cases, in_blocks):
    """P1's sums and the result page's maps, with padding and a knock-out. The control ignores where a block begins."""
    case = cases("gemma3")
    inputs, knock = case.inputs["left"], knock_outs(case, "post_softmax")[0]
    text = case.real["left"] & ~np.asarray(case.masks["left"]["image"])
    prompt = Inputs.from_hf(case.model.config, **make_batch(case.rows[2:], "left", 0, case.config))
    queries = np.arange(2, len(case.rows[2]) + 9)

    def read():
        jax.clear_caches()
        return (
            np.asarray(_summed(case.model, inputs, text, (knock,))),
            np.asarray(_attention(case.model, prompt, queries, (), with_heads=True)),
        )

    whole = read()
    in_blocks()
    for one, other in zip(read(), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=EXACT)
    tap = Tap(add=lambda probs, ctx: jnp.einsum("bhst,bs->bht", probs, text[:, : probs.shape[2]]))
    wrong = case.model(inputs, (knock,), taps={"text.attn_probs": tap}).taps["text.attn_probs"]
    assert error(np.asarray(wrong), whole[0]) > CAUGHT


def test_a_sum_over_queries_is_one_of_attention(cases):
    case = cases("gemma3")
    for site, tap in {"text.resid_post": Tap(add=print), "text.attn_probs": Tap(add=print, reduce=print)}.items():
        with pytest.raises(UserError, match="attention scores and probabilities, without reduce"):
            case.model(case.inputs["left"], taps={site: tap})


@pytest.mark.parametrize("mode", ["pre_softmax", "post_softmax"])
def test_a_long_prompt_needs_less_memory(monkeypatch, mode):
    """4,096 tokens of one layer: the compiled program's own account. Without blocks it is the control."""
    knock = AttentionKnockout.between(1, "text", "image", mode=mode)

    def temporary() -> int:
        def run(q, k, mask, groups):
            probe = Probe((knock.replace(groups=groups),), {}, Context(0))
            return layers.attend(q, k, k, mask, probe, "text", causal=True)

        shapes = [(1, 4096, 16, 64), (1, 4096, 4, 64)]
        heads = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        mask = jax.ShapeDtypeStruct((1, 4096, 4096), jnp.bool_)
        groups = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
        return jax.jit(run).lower(*heads, mask, groups).compile().memory_analysis().temp_size_in_bytes

    blocks = temporary()
    monkeypatch.setattr(layers, "_LONG", 8192)
    assert 5 * blocks < temporary()
