"""What holds for all kinds: token groups, kinds together, padding, one program for all values, taps, refusals."""

import jax
import numpy as np
import pytest
import torch
from hf_oracle import (
    reader,
    writer,
)
from kind_cases import (
    CAUGHT,
    EXACT,
    HEADS,
    KNOCK_OUTS,
    LAYERS,
    TOLERANCE,
    between,
    error,
    head_edit,
    mixed,
    nothing,
    one_sentence,
    only,
    pre_softmax,
    slot,
    spans_of,
)

from interventions import (
    GROUPS,
    Add,
    AttentionKnockout,
    Gate,
    HeadGate,
    Noise,
    Patch,
    UniformAttention,
    bind,
    label,
)
from vlm_jax import Tap
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch

pytestmark = pytest.mark.usefixtures("quick_programs")


def test_neutral_kinds_do_nothing(case):
    assert error(case.logits(), case.wanted()) < TOLERANCE


def test_labels_are_the_prompts_parts(case):
    """The groups that knock-outs go by, against how the prompts were made."""
    masks = case.masks["left"]
    labels = label(Batch(case.inputs["left"], spans_of(masks), 2))
    writes = np.pad(masks["answer"], ((0, 0), (0, 1)))[:, 1:] & ~masks["answer"]  # here the end of the question
    for name, tokens in (masks | {"question": masks["question"] & ~writes, "last": writes}).items():
        if name != "behind":
            np.testing.assert_array_equal(labels == GROUPS.index(name), tokens)
    np.testing.assert_array_equal(labels == GROUPS.index("padding"), ~case.real["left"])
    text = np.isin(labels, [GROUPS.index(name) for name in ("after", "question", "last", "answer")])
    with_image = masks["image"].any(1)
    np.testing.assert_array_equal(text[with_image], masks["behind"][with_image])


def test_kinds_together_equal_hooks(case):
    """Several kinds at once, in layers of their own, and more than one at a site."""
    scale = np.ones((LAYERS, HEADS), np.float32)
    scale[0, 2] = 0
    got = case.logits(
        head_gate=HeadGate(scale),
        gate=Gate({"text.attn_out": only(2, 0.5, 1), "text.mlp_out": only(2, 0, 1)}, where=case.some),
        pre_softmax=case.bound(AttentionKnockout.between(LAYERS, "text", "image", [1, 2], mode="pre_softmax")),
        add=case.neutral["add"].replace(slot=slot(2, 1), where=case.some),
        replace=case.neutral["replace"].replace(slot=slot(3, 0), where=~case.some),
    )
    gates, vectors = torch.from_numpy(scale[0]), torch.from_numpy(case.vectors)
    want = case.wanted(
        head_edit(case, lambda x: x * gates[:, None])(0),
        (writer(case.layers[2], "attn"), "output", lambda x: mixed(case.some, 0.5 * x, x)),
        (writer(case.layers[2], "mlp"), "output", lambda x: mixed(case.some, 0 * x, x)),
        (reader(case.oracle, 2), "input", lambda x: mixed(case.some, x + vectors[1], x)),
        (reader(case.oracle, 3), "input", lambda x: mixed(~case.some, vectors[0].expand_as(x), x)),
        attention={case.layers[layer].self_attn: pre_softmax(case) for layer in (1, 2)},
    )
    assert error(got, want) < TOLERANCE


def test_padding_side_does_not_matter(case):
    scale = np.ones((LAYERS, HEADS), np.float32)
    scale[1, 2] = 0
    everything = {
        "patch": case.neutral["patch"].replace(
            slot={"text.attn_out": slot(0, 2), "text.mlp_out": slot(3, 1)}, where=case.some
        ),
        "head_gate": HeadGate(scale),
        "gate": Gate({site: only(2, 0.5, 1) for site in case.donor}, where=case.some),
        "uniform": UniformAttention(only(3, 0.5, 0)),
        "add": case.neutral["add"].replace(slot=slot(1), where=case.some),
        **{mode: case.bound(AttentionKnockout.between(LAYERS, "text", "image", [2], mode=mode)) for mode in KNOCK_OUTS},
    }
    left = case.logits(**everything)
    assert error(left, case.logits()) > CAUGHT
    assert error(case.logits(side="right", **everything), left) < TOLERANCE / 2


def test_one_program_served_a_family(case):
    """Other layers, heads, tokens, slots, strengths, weights and padding: all of them are values."""
    case.logits()
    before = case.traced
    scale = np.ones((LAYERS, HEADS), np.float32)
    scale[2, 0] = 0.3
    for side in ("left", "right"):
        case.logits(
            side,
            head_gate=HeadGate(scale),
            gate=Gate({site: only(1, 0, 1) for site in case.donor}, where=~case.some),
            post_softmax=case.bound(AttentionKnockout.between(LAYERS, "question", "image", [0, 1], keep=0.5)),
        )
    assert case.traced == before


# Taps


@pytest.fixture(scope="module")
def taps(qwen):
    """All layers of some sites, and chosen layers or reductions of them."""
    chosen = {
        "text.resid_post": [3, 1],
        "text.attn_probs": [0],
        "visual.attn_out": [2, 0],
        "text.attn_out": Tap((1, 2), lambda x: (x * x).sum(-1)),
        "text.mlp_out": Tap(None, lambda x: {"mean": x.mean(), "top": x.max(-1)}),
        "text.norm": None,
    }
    run = jax.jit(lambda m, x: (m(x, taps=list(chosen)).taps, m(x, taps=chosen).taps))
    whole, some = run(qwen.model, qwen.inputs["left"])
    assert whole.keys() == some.keys() == chosen.keys()
    return whole, some


@pytest.mark.parametrize(
    "site, layers", [("text.resid_post", [3, 1]), ("text.attn_probs", [0]), ("visual.attn_out", [2, 0])]
)
def test_taps_of_chosen_layers_are_rows_of_all(taps, site, layers):
    whole, some = taps
    np.testing.assert_allclose(some[site], whole[site][np.array(layers)], atol=EXACT)


def test_taps_outside_of_the_layers_have_no_layers_to_choose(taps):
    whole, some = taps
    np.testing.assert_allclose(some["text.norm"], whole["text.norm"], atol=EXACT)


def test_reduced_taps_of_chosen_layers(taps):
    whole, some = taps
    np.testing.assert_allclose(some["text.attn_out"], (whole["text.attn_out"][1:3] ** 2).sum(-1), rtol=1e-5)


def test_reduced_taps_may_be_any_tree(taps):
    whole, some = (t["text.mlp_out"] for t in taps)
    np.testing.assert_allclose(some["mean"], whole.mean((1, 2, 3)), atol=EXACT)
    np.testing.assert_allclose(some["top"], whole.max(-1), atol=EXACT)


@pytest.mark.parametrize(
    "taps",
    [
        {"text.attn_out": [LAYERS]},
        {"text.attn_out": [-1]},
        {"text.attn_out": []},
        {"text.attn_out": [1, 1]},
        {"text.norm": [0]},
    ],
)
def test_taps_of_layers_that_are_not_there(qwen, taps):
    with pytest.raises(UserError, match="layers"):
        jax.eval_shape(lambda m, x: m(x, taps=taps), qwen.model, qwen.inputs["left"])


# Refusals


def cut(**change):
    return Gate.cut(LAYERS, [1]).replace(**change)


REFUSED = {
    "unknown site": (lambda case: Gate({"text.atn_out": np.zeros(LAYERS)}), "text.attn_out"),
    "table of another depth": (lambda case: Gate.cut(LAYERS + 1, [0]), f"{LAYERS} layers"),
    "table outside of the layers": (lambda case: Gate({"text.norm": np.zeros(LAYERS)}), "no layers"),
    "slots of another depth": (lambda case: Add(case.vectors, "text.resid_post", slot(0, layers=2)), "4 layers"),
    "layers without a table": (lambda case: Add(case.vectors[0], "text.resid_post"), "text.resid_post"),
    "heads of another count": (lambda case: HeadGate(np.zeros((LAYERS, 3), np.float32)), "3 heads"),
    "gate that is open": (lambda case: cut(scale={"text.attn_out": np.ones(LAYERS)}), "touches nothing"),
    "head gate that is open": (lambda case: HeadGate.cut(LAYERS, HEADS, []), "touches nothing"),
    "knock-out of nothing": (
        lambda case: case.bound(AttentionKnockout(np.ones((LAYERS, len(GROUPS), len(GROUPS))))),
        "touches nothing",
    ),
    "slots that are not there": (
        lambda case: Patch(case.donor, dict.fromkeys(case.donor, nothing())),
        "touches nothing",
    ),
    "no head": (
        lambda case: Patch({"text.head_out": case.head_donor}, {"text.head_out": slot(0)}, heads=np.zeros(HEADS, bool)),
        "touches nothing",
    ),
    "no token": (lambda case: cut(where=np.zeros_like(case.some)), "no token"),
    "unbound group": (lambda case: cut(group="image"), "bind"),
    "unbound knock-out": (lambda case: between("post_softmax"), "bind"),
    "random mass without a key": (lambda case: case.bound(between("random_mass").replace(key=None)), "has no key"),
    "noise without tokens": (lambda case: Noise(np.zeros((3, 2), np.uint32), np.ones(3, np.float32)), "tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_act_is_refused(qwen, name):
    make, says = REFUSED[name]
    intervention = make(qwen)
    with pytest.raises(UserError, match=says) as raised:
        jax.eval_shape(lambda m, x: m(x, (intervention,)), qwen.model, qwen.inputs["left"])
    assert one_sentence(raised.value)


MISMADE = {
    "no layer": lambda case: Gate.cut(LAYERS, []),
    "layer out of range": lambda case: Gate.cut(LAYERS, [LAYERS]),
    "negative layer": lambda case: Gate.cut(LAYERS, [-1]),
    "no layer to knock out": lambda case: between("post_softmax", []),
    "head out of range": lambda case: HeadGate.cut(LAYERS, HEADS, [(0, HEADS)]),
    "layer of a head out of range": lambda case: HeadGate.cut(LAYERS, HEADS, [(LAYERS, 0)]),
    "unknown mode": lambda case: between("softmax"),
    "unknown group": lambda case: between("post_softmax", query="texts"),
    "unknown group of tokens": lambda case: case.bound(cut(group="imges")),
    "group that the batch lacks": lambda case: bind(
        (cut(group="image"),),
        Batch(
            case.inputs["left"].take([2]), {n: np.asarray(m)[[2]] for n, m in spans_of(case.masks["left"]).items()}, 0
        ),
    ),
}


@pytest.mark.parametrize("name", MISMADE)
def test_what_cannot_be_made_is_refused(qwen, name):
    with pytest.raises(UserError) as raised:
        MISMADE[name](qwen)
    assert one_sentence(raised.value)
