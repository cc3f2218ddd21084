"""The moves that users of other tools make: steering, functions as interventions, layers by number, clear refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import reader
from kind_cases import FAMILIES, LAYERS, TOLERANCE, WIDTH, error, one_sentence, spans_of

from interventions import (
    Add,
    Gate,
    Latents,
    Logits,
    ProjectOut,
    Replace,
    at,
    bind,
    difference_of_means,
    hook,
    load_interventions,
    save_interventions,
    stack,
    sweep,
)
from interventions.kinds.base import kind
from interventions.kinds.layers import slots
from interventions.lens.lens import logit_lens
from vlm_jax import Intervention, UserError, generate
from vlm_jax.prompts import Batch

CAUGHT = 1e-3


@pytest.fixture(scope="module")
def case(cases):
    return cases("qwen3_vl")


def logits(case, *interventions):
    return np.asarray(case.model(case.inputs["left"], interventions).logits)[case.real["left"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_steering(cases, family):
    """A vector added behind one layer, against a hook in transformers; the control is another layer."""
    case = cases(family)
    vector = case.vectors[0]
    want = case.wanted((reader(case.oracle, 2), "input", lambda h: h + torch.from_numpy(vector)))
    for steer in (Add.steer(vector, layer=2), Add.steer(vector / 2, layers=[-2], strength=2.0)):
        assert error(logits(case, steer), want) < TOLERANCE
    assert error(logits(case, Add.steer(vector, layer=1)), want) > CAUGHT


def test_layers_are_slot_tables(case):
    """Kinds that name layers are those with a table made by hand, alone and in a sweep."""
    pairs = {
        "add": (Add.steer(case.vectors, layers=[1, 3]), Add(case.vectors, "text.resid_post", slots(LAYERS, [1, 3]))),
        "everywhere": (Add.steer(case.vectors[0]), Add(case.vectors[:1], "text.resid_post", slots(LAYERS, None) * 0)),
        "replace": (
            Replace.by(case.vectors[0], -1, site="text.mlp_out"),
            Replace(case.vectors[:1], "text.mlp_out", slots(LAYERS, [3])),
        ),
        "project": (
            ProjectOut.of(case.directions, at("text.resid_post", [3, 0], 2)),
            ProjectOut.of(case.directions[::-1], {"text.resid_post": slots(LAYERS, [0, 3])}),
        ),
    }
    dictionary = jax.tree.map(lambda a: a[0], case.dictionary)
    pairs["latents"] = (
        Latents.ablate(dictionary, at("text.resid_post", 2), range(40)),
        Latents.ablate(dictionary, {"text.resid_post": slots(LAYERS, [2])}, range(40)),
    )
    plain = logits(case)
    for name, (named, by_hand) in pairs.items():
        want = logits(case, by_hand)
        assert error(logits(case, named), want) < 1e-6, name
        assert error(want, plain) > CAUGHT, name
    inputs, read = case.inputs["left"], Logits.of(case.inputs["left"])
    variants = [Add.steer(case.vectors[0], layer=layer) for layer in range(LAYERS)]
    tables = [Add(case.vectors[:1], "text.resid_post", slots(LAYERS, [layer])) for layer in range(LAYERS)]
    want = sweep(case.model, inputs, tables, read, engine="naive")
    for named in (variants, stack(variants)):
        np.testing.assert_allclose(sweep(case.model, inputs, named, read), want, atol=1e-4)


def test_one_program_for_all_layers(case):
    """The number of a layer is a value."""
    traces = []

    @jax.jit
    def run(steer):
        traces.append(1)
        return case.model(case.inputs["left"], steer).logits

    found = [run(Add.steer(case.vectors[0], layer=layer)) for layer in (0, 2)]
    assert len(traces) == 1 and np.abs(np.asarray(found[0] - found[1])).max() > CAUGHT


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda v: Add.steer(v, layer=LAYERS), "the model has no layer 4: name some of 0 to 3"),
        (lambda v: Add.steer(v, layer=1, layers=[2]), "layer and layers are both given"),
        (lambda v: Add.steer(np.stack([v, v]), layers=[0, 1, 2]), "2 slots are given for 3 layers"),
        (lambda v: Add.steer(np.stack([v, v])), "not for which layers"),
        (lambda v: Add.steer(v, layers=[]), "name at least one"),
        (lambda v: Add.steer(v[None, None], layer=0), "give (D,) or (K, D)"),
        (lambda v: Add.steer(np.stack([v, v, v]), layers=[1, 3, -1]), "name a layer twice"),
        (lambda v: ProjectOut.of(v[None, None], at("text.norm", 1)), "outside of the layers: drop the layers [1]"),
        (lambda v: hook("text.norm", np.sin, layers=[1]), "outside of the layers"),
        (lambda v: hook("text.resid_pots", np.sin), "did you mean"),
        (lambda v: hook("text.resid_post", v), "in place of a function"),
        (lambda v: hook("text.resid_post", lambda value, ctx: value[:, :1]), "return a new value of that shape"),
    ],
)
def test_refused(case, make, says):
    with pytest.raises(UserError) as refusal:
        logits(case, make(case.vectors[0]))
    assert says in str(refusal.value) and one_sentence(refusal.value)


def doubled(value, ctx):
    return 2 * value


@pytest.mark.parametrize("layers", [None, 1, [0, -1]])
def test_hooks_are_functions(case, layers):
    """A function that doubles what MLPs write is a gate of 2, in the same layers and on the same tokens."""
    chosen = range(LAYERS) if layers is None else np.atleast_1d(layers) % LAYERS
    batch = Batch(case.inputs["left"], spans_of(case.masks["left"]), 2)
    gate = Gate.cut(LAYERS, chosen, ["mlp"], scale=2.0)
    assert error(logits(case, hook("text.mlp_out", doubled, layers)), want := logits(case, gate)) < 1e-5
    assert error(want, logits(case)) > CAUGHT
    some = bind((gate.replace(group="question"), hook("text.mlp_out", doubled, layers, "question")), batch)
    masked = hook("text.mlp_out", doubled, layers, some[0].where)
    want = logits(case, some[0])
    for one in (some[1], masked):
        assert error(logits(case, one), want) < 1e-5
    assert error(want, logits(case, gate)) > CAUGHT


def test_hooks_elsewhere(case):
    """In generation, in a sweep, and outside of the layers."""
    inputs = case.inputs["left"]
    swept = [hook("text.mlp_out", doubled, layer) for layer in range(LAYERS)]
    gates = [Gate.cut(LAYERS, [layer], ["mlp"], scale=2.0) for layer in range(LAYERS)]
    read = Logits.of(inputs)
    found, want = (sweep(case.model, inputs, variants, read) for variants in (swept, gates))
    np.testing.assert_allclose(found, want, atol=1e-4)
    tokens = [generate(case.model, inputs, 3, one) for one in (swept[1], gates[1])]
    np.testing.assert_array_equal(*tokens)
    zero = hook("text.norm", lambda value, ctx: 0 * value)
    assert np.abs(logits(case, zero)).max() < 1e-6
    entry = [hook("text.embeddings", doubled), hook("text.norm", doubled)]
    for one in entry:
        want = np.asarray(case.model(inputs, one).logits)[np.arange(len(read.index)), read.index]
        np.testing.assert_allclose(sweep(case.model, inputs, [one], read)[0], want, atol=1e-4)


def test_one_intervention_needs_no_tuple(case, tmp_path):
    """In a pass, a sweep's base, a generation, bind and a file."""
    inputs, cut = case.inputs["left"], Gate.cut(LAYERS, [1])
    np.testing.assert_array_equal(case.model(inputs, cut).logits, case.model(inputs, (cut,)).logits)
    np.testing.assert_array_equal(generate(case.model, inputs, 2, cut), generate(case.model, inputs, 2, [cut]))
    read = Logits.of(inputs)
    one, other = (sweep(case.model, inputs, [Gate.cut(LAYERS, [2])], read, base=base) for base in (cut, (cut,)))
    np.testing.assert_array_equal(one, other)
    save_interventions(tmp_path / "cut", cut)
    assert len(load_interventions(tmp_path / "cut")) == len(bind(cut, Batch(inputs, spans_of(case.masks["left"]), 2)))


def test_named_layers_are_saved(case, tmp_path):
    steer = Add.steer(case.vectors[0], layers=[1, -1], group="question")
    everywhere = ProjectOut.of(case.directions[:1], at("text.resid_post"))
    save_interventions(tmp_path / "steer", (steer, everywhere))
    loaded = load_interventions(tmp_path / "steer")
    batch = Batch(case.inputs["left"], spans_of(case.masks["left"]), 2)
    want, found = (logits(case, *bind(some, batch)) for some in ((steer, everywhere), loaded))
    np.testing.assert_array_equal(found, want)
    assert [repr(one) for one in loaded] == [repr(steer), repr(everywhere)]


def test_what_interventions_look_like(case):
    """One line; a description does not fail where arrays have no values."""
    texts = [
        (Add.steer(case.vectors[0], layers=[1, -1]), "Add(text.resid_post L1,-1; site=text.resid_post)"),
        (Gate.cut(LAYERS, [2]), "Gate(text.attn_out L2)"),
        (hook("text.mlp_out", doubled, 3), "Hook(text.mlp_out L3; fn=doubled"),
        (case.neutral["patch"], "Patch("),
    ]
    for one, begins in texts:
        assert repr(one).startswith(begins) and len(repr(one)) < 200 and "\n" not in repr(one)
    seen = []
    jax.jit(lambda gate: seen.append(repr(gate)) or gate.scale["text.attn_out"])(Gate.cut(LAYERS, [2]))
    assert seen[0].startswith("Gate(") and "scale={text.attn_out: float32[4]}" in seen[0]


class Forgot(Intervention):
    scale = 2.0
    sites = frozenset({"text.mlp_out"})

    def __call__(self, site, value, ctx):
        return value


def test_what_is_no_intervention(case):
    """Each gets a sentence that says what to add."""

    @kind
    class Nowhere(Intervention):
        scale: jax.Array

        def __call__(self, site, value, ctx):
            return value

    @dataclasses.dataclass
    class Other:
        scale: float

    for wrong, says in [
        (Forgot(), "decorate its class with @interventions.kinds.base.kind"),
        (Nowhere(jnp.ones(1)), "give its class sites"),
        (Other(1.0), "derive its class from vlm_jax.Intervention"),
        (doubled, "wrap it with interventions.hook(site, doubled)"),
        (Gate, "Gate is a class"),
    ]:
        for call in (
            lambda wrong=wrong: case.model(case.inputs["left"], wrong),
            lambda wrong=wrong: case.model(case.inputs["left"], [wrong]),
            lambda wrong=wrong: generate(case.model, case.inputs["left"], 1, [wrong]),
            lambda wrong=wrong: sweep(case.model, case.inputs["left"], [wrong], Logits.of(case.inputs["left"])),
        ):
            with pytest.raises(UserError) as refusal:
                call()
            assert says in str(refusal.value) and one_sentence(refusal.value)


def test_difference_of_means(case):
    """By hand from taps; steering by it moves the first batch's mean to the second's."""
    sides = [Batch(case.inputs[side], spans_of(case.masks[side]), 2) for side in ("left", "right")]
    cut = Gate.cut(LAYERS, [0])
    found = difference_of_means(case.model, *sides, layers=(1, 3), tokens="question", interventions=cut)
    means = []
    for side in ("left", "right"):
        value = np.asarray(case.model(case.inputs[side], cut, ["text.resid_post"]).taps["text.resid_post"])[[1, 3]]
        marked = case.masks[side]["question"]
        means.append(np.stack([value[:, row, marked[row]].mean(1) for row in range(len(marked))]).mean(0))
    np.testing.assert_allclose(found, means[0] - means[1], atol=1e-4)
    images = Batch(case.inputs["left"], spans_of(case.masks["left"]), 2)
    text = difference_of_means(case.model, images, images, tokens="question")
    assert text.shape == (LAYERS, WIDTH) and not text.any()
    last = difference_of_means(case.model, *sides, layers=-1, tokens="question", interventions=cut)
    np.testing.assert_allclose(last[0], found[1], atol=1e-5)
    with pytest.raises(UserError, match="no token of the group 'image'"):
        difference_of_means(case.model, images, images, tokens="image")
    with pytest.raises(UserError, match="no vector for each token"):
        difference_of_means(case.model, images, images, "text.attn_probs")


def test_the_lens_checks_layers(case):
    """Its programs are compiled, so layers are looked up before. One intervention needs no tuple."""
    at, gold = np.zeros((len(case.rows), 1), np.int32), np.zeros(len(case.rows), np.int32)
    steer = Add.steer(case.vectors[0], layer=1)
    found, plain = (logit_lens(case.model, case.inputs["right"], at, gold, k=2, interventions=i) for i in (steer, ()))
    assert np.abs(np.asarray(found.gold - plain.gold)).max() > 1e-6
    with pytest.raises(UserError, match="the model has no layer 4"):
        logit_lens(
            case.model, case.inputs["right"], at, gold, k=2, interventions=Add.steer(case.vectors[0], layer=LAYERS)
        )
