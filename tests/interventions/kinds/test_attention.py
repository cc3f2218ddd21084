"""Attention knock-outs, their controls and uniform attention, against attention that is edited in transformers."""

import jax
import numpy as np
import pytest
from kind_cases import (
    CAUGHT,
    EXACT,
    HEADS,
    KNOCK_OUTS,
    LAYERS,
    TOLERANCE,
    between,
    error,
    knocked,
    nothing,
    only,
    post_softmax,
    slot,
    without_weights,
)

from interventions import (
    GROUPS,
    AttentionKnockout,
    Patch,
    UniformAttention,
)

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.mark.parametrize("layers", [[1], [LAYERS - 1], range(LAYERS)], ids=["one", "last", "all"])
@pytest.mark.parametrize("mode", KNOCK_OUTS)
def test_knockout_equals_edited_attention(case, mode, layers):
    def wanted(layers, mode=mode, **how):
        return case.wanted(attention={case.layers[layer].self_attn: KNOCK_OUTS[mode](case, **how) for layer in layers})

    knock = AttentionKnockout.between(LAYERS, "text", "image", layers, mode=mode)
    got = case.logits(**{mode: case.bound(knock)})
    assert error(got, wanted(layers)) < TOLERANCE
    neighbours = range(1, LAYERS) if len(layers) > 1 else [layers[0] - 1]
    assert error(got, wanted(neighbours)) > CAUGHT
    other = next(name for name in KNOCK_OUTS if name != mode)
    assert error(got, wanted(layers, other)) > CAUGHT
    if case.masks["left"]["image_end"].any():
        assert error(got, wanted(layers, keys=("image", "image_end"))) > CAUGHT


def test_partial_knockout_equals_edited_attention(case):
    knock = AttentionKnockout.between(LAYERS, "text", "image", [2], keep=0.25)
    got = case.logits(post_softmax=case.bound(knock))
    want = [case.wanted(attention={case.layers[2].self_attn: post_softmax(case, keep)}) for keep in (0.25, 0.75)]
    assert error(got, want[0]) < TOLERANCE and error(got, want[1]) > CAUGHT


def test_uniform_attention_equals_edited_attention(case):
    """Every visible key is read alike."""

    def uniform(scores, mask):
        return (0 * scores + mask).softmax(-1)

    got = case.logits(uniform=UniformAttention(only(1, 1, 0)))
    want = [case.wanted(attention={case.layers[layer].self_attn: uniform}) for layer in (1, 2)]
    assert error(got, want[0]) < TOLERANCE and error(got, want[1]) > CAUGHT


@pytest.mark.parametrize("layer", range(LAYERS))
def test_uniform_attention_has_no_queries(case, layer):
    got = case.logits(uniform=UniformAttention(only(layer, 1, 0)))
    assert error(got, case.logits(model=without_weights(case.model, layer, ["q_proj"]))) < EXACT
    assert error(got, case.logits()) > CAUGHT


@pytest.fixture(scope="module")
def clean(qwen):
    """The clean run's logits ``(tokens, V)`` and its values at attention's sites."""
    run = jax.jit(lambda m, x: m(x, taps=["text.attn_probs", "text.head_out"]))
    out = run(qwen.model, qwen.inputs["left"])
    return np.asarray(out.logits)[qwen.real["left"]], out.taps


@pytest.fixture(scope="module")
def attention(qwen, clean):
    """Runs one knock-out, or a patch of some heads, beside the other modes that do nothing; gives the probabilities
    ``(L, B, H, S, keys)``, what the heads read ``(L, B, S, H, d)`` and the logits."""
    run = jax.jit(lambda m, x, i: m(x, i, ["text.attn_probs", "text.head_out"]))
    sites = ("text.attn_probs", "text.head_out")
    neutral = {
        mode: qwen.bound(between(mode).replace(keep=np.ones((LAYERS, len(GROUPS), len(GROUPS)), np.float32)))
        for mode in ("pre_softmax", "post_softmax", "value_norm", "random_mass")
    }
    neutral["patch"] = Patch(clean[1], dict.fromkeys(sites, nothing()), heads=np.arange(HEADS) == 2)

    def tapped(intervention=None, **slots):
        interventions = dict(neutral)
        if intervention is not None:
            interventions[intervention.mode] = qwen.bound(intervention)
        interventions["patch"] = neutral["patch"].replace(slot=neutral["patch"].slot | slots)
        out = run(qwen.model, qwen.inputs["left"], tuple(interventions.values()))
        return *(np.asarray(out.taps[site]) for site in sites), np.asarray(out.logits)

    return tapped


@pytest.mark.parametrize("site", ["text.head_out", "text.attn_probs"])
def test_own_activations_of_one_head_change_nothing(qwen, clean, attention, site):
    """And another layer's, at that head, do."""
    same, other = (attention(**{site: slot(1, number)})[2][qwen.real["left"]] for number in (1, 3))
    assert error(same, clean[0]) < EXACT
    assert error(other, clean[0]) > CAUGHT


def test_pre_softmax_is_post_softmax_renormalised(qwen, attention):
    clean, _, _ = attention()
    kept = np.where(knocked(qwen).numpy(), 0, clean[1])
    want = kept / np.maximum(kept.sum(-1, keepdims=True), 1e-30)
    got = attention(between("pre_softmax"))[0][1]
    real = np.broadcast_to(qwen.real["left"][:, None, :, None], got.shape)
    assert error(got[real], want[real]) < EXACT
    assert error(got[real], kept[real]) > CAUGHT


def test_value_norm_keeps_the_direction_and_takes_the_norm(qwen, attention):
    real = qwen.real["left"]
    clean, post, control = (
        attention(knock)[1][1][real].astype(np.float64)
        for knock in (None, between("post_softmax"), between("value_norm"))
    )
    norms = [np.linalg.norm(x, axis=-1) for x in (clean, post, control)]
    np.testing.assert_allclose(norms[2], norms[1], rtol=1e-4)
    cosine = (clean * control).sum(-1) / (norms[0] * norms[2])
    np.testing.assert_allclose(cosine, 1, atol=1e-6)
    # Where something is knocked out, post_softmax itself keeps neither.
    behind = qwen.masks["left"]["behind"][real]
    turned = (clean * post).sum(-1) / (norms[0] * norms[1])
    assert turned[behind].min() < 0.9 and norms[1][behind].max() < norms[0][behind].max()
    np.testing.assert_allclose(turned[~behind], 1, atol=1e-6)


@pytest.fixture(scope="module", params=[("text", "image"), ("text", "before+image+image_end+after")], ids="->".join)
def random_mass(request, qwen, attention):
    """Clean probabilities, the control's, those of another seed, and which keys are knocked out, in layer 1; of the
    queries for which there are any."""
    query, key = request.param
    masks, real = qwen.masks["left"], qwen.real["left"]
    names = ("image",) if key == "image" else ("question", "answer")
    keys = np.logical_or.reduce([masks[name] for name in names])
    keys = keys if key == "image" else real & ~keys
    rows = masks["image"].any(1)  # the last row has no image: what is "before" there is for the labels to say
    away = masks["behind"][:, :, None] & keys[:, None, :]
    runs = [attention(), *(attention(between("random_mass", query=query, key=key, seed=seed)) for seed in (0, 1))]
    probs = [np.moveaxis(p[1], 1, -2)[rows][masks["behind"][rows]] for p, _, _ in runs]  # (queries, H, keys)
    away = np.broadcast_to(away[rows][masks["behind"][rows]][:, None], probs[0].shape)
    return *(p.astype(np.float64) for p in probs), away


def test_random_mass_takes_as_much(random_mass):
    clean, control, _, away = random_mass
    mass, others = (np.where(where, clean, 0).sum(-1) for where in (away, ~away))
    np.testing.assert_allclose((clean - control).sum(-1), np.minimum(mass, others), atol=1e-6)


def test_random_mass_takes_all_where_the_others_hold_less(random_mass):
    clean, control, _, away = random_mass
    mass, others = (np.where(where, clean, 0).sum(-1) for where in (away, ~away))
    short = others < mass
    assert short.any() and not short.all()
    assert np.where(away, 0, control)[short].max() < 1e-6


def test_random_mass_is_taken_from_other_keys_and_never_too_much(random_mass):
    clean, control, _, away = random_mass
    np.testing.assert_array_equal(control[away], clean[away])
    assert (control >= 0).all() and (control <= clean).all()


def test_random_mass_takes_whole_keys_but_for_one(random_mass):
    clean, control, _, away = random_mass
    partly = ~away & (control > 1e-6) & (clean - control > 1e-6)
    assert partly.sum(-1).max() == 1


def test_random_mass_is_drawn(random_mass):
    clean, first, second, away = random_mass
    mass, others = (np.where(where, clean, 0).sum(-1) for where in (away, ~away))
    choice = (others > 1.5 * mass) & (mass > 1e-3)
    taken = [(clean - p) > 1e-6 for p in (first, second)]
    assert (taken[0] != taken[1]).any(-1)[choice].mean() > 0.3


def test_knockout_changes_only_its_layer(attention, qwen):
    """The layers below are as they were, bit by bit."""
    clean, changed = attention()[0], attention(between("post_softmax", [2]))[0]
    real = qwen.real["left"][:, None, :, None]
    difference = np.abs(np.where(real, clean - changed, 0)).max((1, 2, 3, 4))
    assert not difference[:2].any() and (difference[2:] > CAUGHT).all()


def test_query_that_may_read_no_key_does_not_read_later_ones(qwen, attention):
    """Masked scores alone would leave such a query uniform over the whole row, padding and future included."""
    probs = attention(between("pre_softmax", query="all", key="all"))[0][1]
    future = np.triu(np.ones(probs.shape[-2:], bool), 1)
    real = qwen.real["left"]
    unseen = future | ~real[:, None, None, :]
    assert np.where(unseen & real[:, None, :, None], probs, 0).max() < 1e-6
