"""Every kind of intervention against PyTorch hooks on transformers' own models, and identities that need no oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import (
    edited,
    reader,
    tensors,
    writer,
)
from kind_cases import (
    CAUGHT,
    EXACT,
    HEADS,
    LAYERS,
    MODULES,
    TOLERANCE,
    WIDTH,
    error,
    mixed,
    nothing,
    one_sentence,
    only,
    slot,
    spans_of,
)

import vlm_jax
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

# The oracle itself


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


# Against hooks in transformers


@pytest.mark.parametrize("module", ["attn", "mlp"])
def test_patch_equals_hook(case, module):
    site = f"text.{module}_out"

    def wanted(layer):
        donor = torch.from_numpy(case.donor[site][2])  # the slot, not the layer, says what is put there
        return case.wanted((writer(case.layers[layer], module), "output", partial(mixed, case.some, donor)))

    got = case.logits(
        patch=case.neutral["patch"].replace(
            slot={name: slot(1, 2) if name == site else nothing() for name in case.donor}, where=case.some
        )
    )
    assert error(got, wanted(1)) < TOLERANCE
    assert error(got, wanted(2)) > CAUGHT and error(got, case.wanted()) > CAUGHT


def head_edit(case, function):
    """An edit of what the heads read ``(B, T, H, d)``."""

    def edit(x):
        return function(x.unflatten(-1, (HEADS, -1))).flatten(-2)

    return lambda layer: (case.layers[layer].self_attn.o_proj, "input", edit)


def test_patch_of_one_head_equals_hook(case):
    def wanted(head):
        def function(x):
            x = x.clone()
            x[:, :, head] = mixed(case.some, torch.from_numpy(case.head_donor[0][:, :, head]), x[:, :, head])
            return x

        return case.wanted(head_edit(case, function)(2))

    got = case.logits(
        heads=case.neutral["heads"].replace(
            slot={"text.head_out": slot(2)}, where=case.some, heads=np.arange(HEADS) == 1
        )
    )
    assert error(got, wanted(1)) < TOLERANCE
    assert error(got, wanted(2)) > CAUGHT


def test_head_gate_equals_hook(case):
    """Heads of several layers at several strengths, 0 among them."""
    scale = np.ones((LAYERS, HEADS), np.float32)
    scale[0, 1], scale[2, 3], scale[3, 0] = 0, 0.5, 2

    def wanted(scale):
        gates = torch.from_numpy(scale)
        return case.wanted(
            *(head_edit(case, lambda x, g=gates[layer]: x * g[:, None])(layer) for layer in range(LAYERS))
        )

    got = case.logits(head_gate=HeadGate(scale))
    assert error(got, wanted(scale)) < TOLERANCE
    assert error(got, wanted(np.roll(scale, 1, 1))) > CAUGHT and error(got, wanted(np.roll(scale, 1, 0))) > CAUGHT


@pytest.mark.parametrize("modules", MODULES, ids="+".join)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_cut_equals_hook(case, layer, modules):
    def wanted(layer):
        return case.wanted(*((writer(case.layers[layer], module), "output", torch.zeros_like) for module in modules))

    gate = Gate.cut(LAYERS, [layer], modules)
    scale = case.neutral["gate"].scale | gate.scale
    got = case.logits(gate=case.neutral["gate"].replace(scale=scale))
    assert error(got, wanted(layer)) < TOLERANCE
    assert error(got, wanted((layer + 1) % LAYERS)) > CAUGHT


def test_gate_on_some_tokens_equals_hook(case):
    def half(x):
        return mixed(case.some, 0.5 * x, x)

    scale = {site: only(1, 0.5, 1) for site in case.donor}
    got = case.logits(gate=Gate(scale, where=case.some))
    edits = [(writer(case.layers[1], module), "output", half) for module in ("attn", "mlp")]
    assert error(got, case.wanted(*edits)) < TOLERANCE
    assert error(got, case.wanted(edits[0])) > CAUGHT


def knocked(case, keys=("image",)):
    """Which query may not read which key ``(B, 1, T, T)``: what comes behind the first image, and the images."""
    masks = case.masks["left"]
    read = np.logical_or.reduce([masks[name] for name in keys])
    return torch.from_numpy(masks["behind"][:, :, None] & read[:, None, :])[:, None]


def post_softmax(case, keep=0.0, **how):
    """P1, equations 3 and 4: the probabilities times the mask."""
    factor = torch.where(knocked(case, **how), keep, 1.0)
    return lambda scores, mask: (scores + mask).softmax(-1) * factor


def pre_softmax(case, **how):
    """Geva et al.: the scores are minus infinity."""
    away = knocked(case, **how)
    return lambda scores, mask: (scores + mask).masked_fill(away, torch.finfo(scores.dtype).min).softmax(-1)


KNOCK_OUTS = {"post_softmax": post_softmax, "pre_softmax": pre_softmax}


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


def projected_out(vectors, x):
    basis, _ = torch.linalg.qr(torch.from_numpy(vectors).double().T)
    return x - (x.double() @ basis @ basis.T).float()


def reft(case, number, x):
    """P4, equation 1: ``h + R^T (W h + b - R h)`` with orthonormal rows R, spelt out by Gram-Schmidt."""
    r, w, b = (torch.from_numpy(weight[number]).double() for weight in case.loreft)
    rows = []
    for column in r.T:
        for row in rows:
            column = column - (column @ row) * row
        rows.append(column / column.norm())
    rotation, x = torch.stack(rows), x.double()
    return (x + (x @ w + b - x @ rotation.T) @ rotation).float()


RESIDUAL = {
    "add": lambda case, x: x + torch.from_numpy(case.vectors[1]),
    "replace": lambda case, x: torch.from_numpy(case.vectors[1]).expand_as(x),
    "project": lambda case, x: projected_out(case.directions[1], x),
    "loreft": lambda case, x: reft(case, 1, x),
}


@pytest.mark.parametrize("kind", RESIDUAL)
def test_edit_of_the_residual_stream_equals_hook(case, kind):
    """The second of two slots, in one layer, on some tokens."""

    def wanted(layer, where):
        function = RESIDUAL[kind]
        return case.wanted((reader(case.oracle, layer), "input", lambda x: mixed(where, function(case, x), x)))

    layer = LAYERS - 2
    table = slot(layer, 1)
    if kind in ("project", "loreft"):
        table = {"text.resid_post": table}
    got = case.logits(**{kind: case.neutral[kind].replace(slot=table, where=case.some)})
    assert error(got, wanted(layer, case.some)) < TOLERANCE
    assert error(got, wanted(layer + 1, case.some)) > CAUGHT and error(got, wanted(layer, ~case.some)) > CAUGHT


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


# Identities


def without_weights(model, layer, names):
    """The model with the kernels and biases of some linears of a layer zeroed."""
    zeroed = []

    def zero(path, leaf):
        path = jax.tree_util.keystr(path)
        if "text" in path and any(name in path for name in names):
            zeroed.append(path)
            return leaf.at[layer].set(0)
        return leaf

    model = jax.tree_util.tree_map_with_path(zero, model)
    assert len(zeroed) >= len(names)
    return model


@pytest.mark.parametrize("layer", range(LAYERS))
def test_gated_attention_has_no_weights(case, layer):
    scale = case.neutral["gate"].scale | Gate.cut(LAYERS, [layer]).scale
    cut = case.logits(gate=case.neutral["gate"].replace(scale=scale))
    zeroed = without_weights(case.model, layer, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert error(cut, case.logits(model=zeroed)) < EXACT
    assert error(cut, case.logits()) > CAUGHT


@pytest.mark.parametrize("layer", range(LAYERS))
def test_uniform_attention_has_no_queries(case, layer):
    got = case.logits(uniform=UniformAttention(only(layer, 1, 0)))
    assert error(got, case.logits(model=without_weights(case.model, layer, ["q_proj"]))) < EXACT
    assert error(got, case.logits()) > CAUGHT


@pytest.mark.parametrize("modules", MODULES, ids="+".join)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_cut_changes_every_row(case, layer, modules):
    scale = case.neutral["gate"].scale | Gate.cut(LAYERS, [layer], modules).scale
    cut, clean = case.logits(gate=case.neutral["gate"].replace(scale=scale)), case.logits()
    ends = np.cumsum(case.real["left"].sum(1)) - 1
    assert (np.abs(cut - clean)[ends].max(-1) > CAUGHT).all()


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
    assert case.traced == max(before, 1) == 1


# Sites, taps and gradients, on Qwen3-VL


@pytest.fixture(scope="module")
def qwen(cases):
    return cases("qwen3_vl")


@pytest.fixture(scope="module")
def everywhere(qwen):
    """Clean taps of every site; a function that patches chosen sites, with noise or without."""
    inputs, real = qwen.inputs["left"], qwen.real["left"]
    clean = jax.jit(lambda m, x: m(x, taps=m.sites(x)))(qwen.model, inputs)
    noise = np.random.default_rng(3).standard_normal((*real.shape, WIDTH), np.float32)
    depths = qwen.model.depths
    layered = {site: depths[site.split(".")[0]] for site, v in clean.taps.items() if vlm_jax.sites.layered(site)}
    donors = {site: value if site in layered else value[None] for site, value in clean.taps.items()}
    off = {site: nothing(layered[site]) if site in layered else np.int32(99) for site in donors}
    run = jax.jit(lambda m, x, i: m(x, i).logits)

    def patch(slots, donors=donors, loud=0.0):
        # The noise comes behind the patch: a patch of the embeddings must not see it.
        interventions = Patch(donors, off | slots), Add(loud * noise)
        return np.asarray(run(qwen.model, inputs, interventions))[real]

    patch.clean, patch.donors, patch.layered = np.asarray(clean.logits)[real], donors, layered
    return patch


SITES = sorted(
    site
    for site in vlm_jax.SITES
    if site.startswith("text.")
    or site in {f"visual.{n}" for n in ("embeddings", *vlm_jax.sites._BLOCK, *vlm_jax.sites.VISUAL_LINEARS["qwen3"])}
    or site in ("projector.merger", "projector.deepstack_merger_list")
)


def test_every_site_is_patched(everywhere):
    assert sorted(everywhere.donors) == SITES


@pytest.mark.parametrize("site", SITES)
def test_own_activations_change_nothing(everywhere, site):
    depth = everywhere.layered.get(site)
    slots = {site: np.int32(0) if depth is None else np.arange(depth, dtype=np.int32)}
    assert error(everywhere(slots), everywhere.clean) < EXACT
    # Not because a patch does nothing.
    reversed_ = everywhere.donors | {site: everywhere.donors[site][..., ::-1]}
    assert error(everywhere(slots, reversed_), everywhere.clean) > CAUGHT


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("site", ["text.resid_pre", "text.resid_mid", "text.resid_post"])
def test_restoring_the_residual_stream_of_a_layer_gives_the_clean_run(everywhere, site, layer):
    assert error(everywhere({}, loud=1.0), everywhere.clean) > 0.1
    assert error(everywhere({site: slot(layer, layer)}, loud=1.0), everywhere.clean) < EXACT


@pytest.fixture(scope="module")
def attention(qwen, everywhere):
    """Runs one knock-out, or a patch of some heads, beside the other modes that do nothing; gives the probabilities
    ``(L, B, H, S, keys)``, what the heads read ``(L, B, S, H, d)`` and the logits."""
    run = jax.jit(lambda m, x, i: m(x, i, ["text.attn_probs", "text.head_out"]))
    sites = ("text.attn_probs", "text.head_out")
    neutral = {
        mode: qwen.bound(between(mode).replace(keep=np.ones((LAYERS, len(GROUPS), len(GROUPS)), np.float32)))
        for mode in ("pre_softmax", "post_softmax", "value_norm", "random_mass")
    }
    donors = {site: everywhere.donors[site] for site in sites}
    neutral["patch"] = Patch(donors, dict.fromkeys(sites, nothing()), heads=np.arange(HEADS) == 2)

    def tapped(intervention=None, **slots):
        interventions = dict(neutral)
        if intervention is not None:
            interventions[intervention.mode] = qwen.bound(intervention)
        interventions["patch"] = neutral["patch"].replace(slot=neutral["patch"].slot | slots)
        out = run(qwen.model, qwen.inputs["left"], tuple(interventions.values()))
        return *(np.asarray(out.taps[site]) for site in sites), np.asarray(out.logits)

    return tapped


@pytest.mark.parametrize("site", ["text.head_out", "text.attn_probs"])
def test_own_activations_of_one_head_change_nothing(qwen, everywhere, attention, site):
    """And another layer's, at that head, do."""
    same, other = (attention(**{site: slot(1, number)})[2][qwen.real["left"]] for number in (1, 3))
    assert error(same, everywhere.clean) < EXACT
    assert error(other, everywhere.clean) > CAUGHT


def between(mode, layers=(1,), query="text", key="image", **how):
    return AttentionKnockout.between(LAYERS, query, key, layers, mode=mode, **how)


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


def test_noise_is_drawn_by_row(qwen):
    """Standard deviation, and what is not meant is left alone; a row's noise is the same in any batch."""
    real = qwen.real["left"]
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), len(real))))
    scale = np.array([0.5, 1, 2], np.float32)

    def drawn(rows):
        noise = Noise(keys[rows], scale[rows], where=real[rows])
        zeros = jnp.zeros((len(rows), real.shape[1], 512))
        return np.asarray(noise("text.embeddings", zeros, vlm_jax.sites.Context()))

    whole, part = drawn([0, 1, 2]), drawn([2, 0])
    np.testing.assert_array_equal(part, whole[[2, 0]])
    assert not whole[~real].any()
    for row in range(3):
        np.testing.assert_allclose(whole[row][real[row]].std(), scale[row], rtol=0.05)


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


# Gradients


GRADIENT_SITES = {"text.attn_out": 1, "text.head_out": 2, "text.resid_post": 0}


def test_gradients_equal_autograd(qwen):
    """Of a random linear function of the logits, with respect to zeros that are added in one layer."""
    real = qwen.real["left"]
    shape = (1, *real.shape, WIDTH)
    zeros = {site: np.zeros(shape, np.float32) for site in GRADIENT_SITES}
    head_dim = qwen.model.config.text.head_dim
    zeros["text.head_out"] = np.zeros((1, *real.shape, HEADS, head_dim), np.float32)
    weight = np.random.default_rng(1).standard_normal((*real.shape, 320)).astype(np.float32) * real[..., None]

    @jax.jit
    @jax.grad
    def gradient(zeros, model):
        adds = [Add(value, site, jnp.asarray(slot(GRADIENT_SITES[site]))) for site, value in zeros.items()]
        return (model(qwen.inputs["left"], adds).logits * weight).sum()

    got = gradient(zeros, qwen.model)
    added = {site: torch.from_numpy(zero[0]).requires_grad_() for site, zero in zeros.items()}
    layers = {site: qwen.layers[layer] for site, layer in GRADIENT_SITES.items()}
    heads = added["text.head_out"]
    with edited(
        (writer(layers["text.attn_out"], "attn"), "output", lambda x: x + added["text.attn_out"]),
        (layers["text.head_out"].self_attn.o_proj, "input", lambda x: x + heads.flatten(-2)),
        (reader(qwen.oracle, 0), "input", lambda x: x + added["text.resid_post"]),
    ):
        logits = qwen.oracle(**tensors(qwen.batches["left"]), use_cache=False).logits
        (logits * torch.from_numpy(weight)).sum().backward()
    for site, tensor in added.items():
        want = tensor.grad.numpy()
        assert np.abs(want[real]).max() > 1
        np.testing.assert_allclose(got[site][0][real], want[real], atol=1e-4 * np.abs(want).max(), err_msg=site)


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
