"""The sweep engine against the naive one, which runs the whole model for every variant, and generation under
interventions against transformers' own with hooks.

Everything is in float32, and every run has noise on its embeddings.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import PAD, attention_edited, edited, make_batch, part_masks, tensors, writer
from kind_cases import FAMILIES, HEADS, LAYERS, WIDTH, error, nothing, only, slot, spans_of

import vlm_jax
from interventions import (
    Ablation,
    Add,
    AttentionKnockout,
    Gate,
    Gold,
    HeadGate,
    Logits,
    LoRA,
    LoReFT,
    Noise,
    Patch,
    ProjectOut,
    Replace,
    UniformAttention,
    bind,
    generate_variants,
    stack,
    sweep,
)
from interventions.engine.grids import cut_grid, head_grid, layer_windows, patch_grid
from interventions.engine.prefix import shared_prefix
from interventions.kinds.groups import GROUPS
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch

pytestmark = pytest.mark.usefixtures("quick_programs")

EXACT, CAUGHT = 1e-5, 1e-3
#: For two tests in which the engines sum attention in another order: on CPUs with AVX2 alone they differ by 1.2e-5.
ROUNDED = 1.5e-5
COUNT = 5
TEXT_ROWS = [[11, 6, 4], [8, 5, 3], [14, 3, 2]]


class Runs:
    """A batch for a model: its noise, its read-out, and variants of every kind for it."""

    def __init__(self, case, rows, side="left"):
        self.case, self.model, self.side = case, case.model, side
        self.batch = make_batch(rows, side, 0, case.config)
        self.masks = part_masks(case.config, rows, side)
        self.real = self.batch["attention_mask"] == 1
        self.inputs = vlm_jax.Inputs.from_hf(case.model.config, **self.batch)
        self.bound = Batch(self.inputs, spans_of(self.masks), 2)
        self.read = Logits.of(self.inputs)
        self.rng = np.random.default_rng(11)
        self.shape = self.real.shape
        self.base = (Add(0.3 * self.normal(*self.shape, WIDTH)),)
        self.late = self.masks["question"] | self.masks["answer"]  # so that a prefix is shared
        sites = ("text.attn_out", "text.mlp_out", "text.resid_mid")
        self.donor = {site: jnp.asarray(self.normal(LAYERS, *self.shape, WIDTH)) for site in sites}
        head_dim = case.model.config.text.head_dim
        self.head_donor = {"text.head_out": jnp.asarray(self.normal(LAYERS, *self.shape, HEADS, head_dim))}

    def normal(self, *shape):
        return self.rng.standard_normal(shape, np.float32)

    def some(self):
        """Some of the tokens from the question on, at least the last."""
        where = self.late & (self.rng.random(self.shape) < 0.5)
        where[:, -1] = self.late[:, -1]
        return where | (self.late & ~where.any(1, keepdims=True))

    def both(self, variants, **how):
        """What either engine says, the naive one first."""
        return [
            np.asarray(sweep(self.model, self.inputs, variants, self.read, base=self.base, engine=engine, **more))
            for engine, more in (("naive", {}), ("sweep", how))
        ]

    def knock(self, i, mode):
        query, keys = ("text", "image") if self.masks["image"].any() else ("question+answer", "before")
        knock = AttentionKnockout.between(
            LAYERS, query, keys, [i % LAYERS, LAYERS - 1], mode=mode, keep=0.1 * i, seed=i
        )
        return bind((knock,), self.bound)[0]


def table_of(i):
    """Slot ``i % 2`` in a layer that depends on ``i``, and slot 0 in the last one."""
    table = slot(i % LAYERS, i % 2)
    table[-1] = 0
    return table


def lora(runs, i):
    sites = ("text.self_attn.q_proj", "text.mlp.down_proj")
    config = runs.model.config.text
    shapes = {sites[0]: (WIDTH, HEADS * config.head_dim), sites[1]: (config.intermediate_size, WIDTH)}
    weights = {site: (0.3 * runs.normal(2, n, 3), 0.3 * runs.normal(2, 3, m)) for site, (n, m) in shapes.items()}
    return LoRA(weights, dict.fromkeys(sites, table_of(i)), np.float32(0.5 + i))


def dora(runs, i):
    adapter = lora(runs, i)
    return adapter.replace(
        magnitude={site: 1 + abs(runs.normal(*b.shape[::2])) for site, (_, b) in adapter.weights.items()}
    )


def noise(runs, i):
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(i), len(runs.real))))
    return Noise(keys, np.full(len(runs.real), 0.2 * (i + 1), np.float32), where=runs.some())


def head_gate(runs, i):
    scale = np.ones((LAYERS, HEADS), np.float32)
    scale[i % LAYERS, (i + 1) % HEADS] = 0.2 * i
    return HeadGate(scale, where=runs.some())


def question_gate(runs, i):
    """Of a group, which bind looks up in the batch."""
    gate = Gate({"text.resid_post": only(i % LAYERS, 0.2 * i, 1)}, group="question")
    return bind((gate,), runs.bound)[0]


# Every kind, as a function of the batch and of the variant's number. Variants differ in layers (in windows of layers),
# heads, tokens, slots, strengths and values.
LAYER_KINDS = {
    "patch": lambda r, i: Patch(
        r.donor,
        {
            "text.attn_out": np.where(layer_windows(LAYERS, 2)[i % LAYERS], np.arange(LAYERS), 99).astype(np.int32),
            "text.mlp_out": slot(i % LAYERS, (i + 1) % LAYERS),
            "text.resid_mid": nothing(),
        },
        r.some(),
    ),
    "patch of heads": lambda r, i: Patch(
        r.head_donor, {"text.head_out": slot(i % LAYERS, 1)}, r.some(), np.arange(HEADS) == i % HEADS
    ),
    "gate": lambda r, i: Gate(
        {"text.attn_out": only(i % LAYERS, 0.2 * i, 1), "text.mlp_out": only(LAYERS - 1, 0.5, 1)}, where=r.some()
    ),
    "ablation": lambda r, i: Ablation(
        {"text.mlp_out": r.normal(2, len(GROUPS), WIDTH)},
        {"text.mlp_out": table_of(i)},
        np.ones(len(GROUPS), bool),
        r.rng.integers(0, len(GROUPS), r.real.shape).astype(np.int32),
        where=r.some(),
    ),
    "gate of a group": question_gate,
    "gate of every token": lambda r, i: Gate.cut(LAYERS, [i % LAYERS], scale=0.1 * i),
    "head gate": head_gate,
    **{
        mode: lambda r, i, mode=mode: r.knock(i, mode)
        for mode in ("post_softmax", "pre_softmax", "value_norm", "random_mass")
    },
    "uniform": lambda r, i: UniformAttention(only(i % LAYERS, 1 - 0.2 * i, 0), where=r.some()),
    "add": lambda r, i: Add(r.normal(2, WIDTH), "text.resid_post", table_of(i), where=r.some()),
    "replace": lambda r, i: Replace(r.normal(2, WIDTH), "text.mlp_out", table_of(i), where=r.some()),
    "project out": lambda r, i: ProjectOut.of(
        r.normal(2, 3, WIDTH), {"text.resid_post": table_of(i), "text.attn_out": table_of(i + 1)}, where=r.some()
    ),
    "loreft": lambda r, i: LoReFT(
        {"text.resid_post": tuple(0.3 * r.normal(*s) for s in ((2, WIDTH, 3), (2, WIDTH, 3), (2, 3)))},
        {"text.resid_post": table_of(i)},
        where=r.some(),
    ),
    "lora": lora,
    "dora": dora,
}
ENTRY_KINDS = {
    "noise": noise,
    "replaced embeddings": lambda r, i: Replace(r.normal(WIDTH), where=r.some()),
    "added to each embedding": lambda r, i: Add(r.normal(*r.shape, WIDTH), where=r.some()),
}
NORM_KINDS = {"norm": lambda r, i: Gate({"text.norm": np.float32(0.5 + 0.3 * i)}, where=r.some())}


def visual_gate(site):
    def make(runs, i):
        depth = runs.model.depths["visual"]
        return Gate({site: only(i % depth, 0.2 * i, 1, depth)})

    return make


def patches_added(runs, i):
    """Corrupts the images: something is added to every patch."""
    width = runs.case.config.vision_config.hidden_size
    return Add(runs.normal(width), "visual.embeddings")


def projected(site):
    return lambda runs, i: Add(runs.normal(WIDTH), site)


PROJECTED = {"qwen3_vl": "merger", "qwen2_5_vl": "merger", "gemma3": "mm_input_projection", "llava": "linear_2"}
OUTSIDE = (*ENTRY_KINDS.values(), *NORM_KINDS.values())
# What acts outside of the decoder's layers; Qwen3-VL's DeepStack takes the corrupted images past the embeddings.
VISUAL = {
    "embeddings and norm": ["qwen3_vl", *OUTSIDE],
    "blocks": ["qwen3_vl", visual_gate("visual.attn_out")],
    "images": [
        "qwen3_vl",
        patches_added,
        projected("projector.merger"),
        projected("projector.deepstack_merger_list"),
    ],
    **{
        name: [name, visual_gate("visual.mlp_out"), patches_added, projected(f"projector.{PROJECTED[name]}"), *OUTSIDE]
        for name in FAMILIES[1:]
    },
}


@pytest.fixture
def runs(cases):
    """Prompts with images, for a family."""
    return lambda family: Runs(cases(family), cases(family).rows)


@pytest.fixture
def texts(cases):
    """Prompts without images."""
    return Runs(cases("qwen3_vl"), TEXT_ROWS)


def agree(runs, variants, bound=EXACT, **how):
    naive, fast = runs.both(variants, **how)
    assert naive.shape == (len(variants), len(runs.real), 320)
    spread = np.abs(naive[:, None] - naive[None]).max((2, 3))[~np.eye(len(variants), dtype=bool)]
    assert spread.min() > CAUGHT  # every variant its own run, or their order would not be seen
    assert error(fast, naive) < bound
    return naive


# Sweep equals naive


# Kinds that are swept together, on the tokens behind a shared prefix but for the last group.
GROUPED = {
    "patches": ("patch", "patch of heads", "gate of a group"),
    "gates": ("gate", "head gate", "uniform", "ablation"),
    "knock-outs": ("post_softmax", "pre_softmax"),
    "controls": ("value_norm", "random_mass"),
    "vectors": ("add", "replace", "project out", "loreft"),
    "embeddings": tuple(ENTRY_KINDS),
    "norm": tuple(NORM_KINDS),
    "every token": ("gate of every token", "lora", "dora"),
}
KINDS = LAYER_KINDS | ENTRY_KINDS | NORM_KINDS


def test_every_kind_is_grouped():
    assert sorted(kind for kinds in GROUPED.values() for kind in kinds) == sorted(KINDS)


@pytest.mark.parametrize("kinds", GROUPED.values(), ids=GROUPED)
def test_kinds_of_a_group(texts, kinds):
    """On prompts without images."""
    bound = ROUNDED if kinds == GROUPED["knock-outs"] else EXACT
    agree(texts, [tuple(KINDS[kind](texts, i) for kind in kinds) for i in range(COUNT)], bound)


class Loud(vlm_jax.Intervention):
    """A kind that says nothing of its layers and tokens, and is not registered."""

    sites = frozenset({"text.resid_mid", "text.norm"})

    def __init__(self, strength):
        self.strength = strength

    def __call__(self, site, value, ctx):
        return value * self.strength


jax.tree_util.register_pytree_node(Loud, lambda loud: ((loud.strength,), None), lambda _, children: Loud(*children))


def test_a_kind_with_the_defaults(texts):
    """Beside one that begins in a higher layer and at a later token: it decides where the variants begin."""
    agree(texts, [(Loud(np.float32(0.5 + 0.2 * i)), LAYER_KINDS["gate"](texts, i + 1)) for i in range(COUNT)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_together(runs, family):
    """All kinds of the layers at once, on prompts with images; a variant's first layer is that of its first kind."""
    case = runs(family)
    agree(case, [tuple(make(case, i) for make in LAYER_KINDS.values()) for i in range(COUNT)])


@pytest.mark.parametrize("name", VISUAL)
def test_what_acts_outside_of_the_layers(runs, name):
    family, *kinds = VISUAL[name]
    case = runs(family)
    naive = agree(case, [tuple(make(case, i) for make in kinds) for i in range(COUNT)])
    if name in ("blocks", "images"):  # the row without an image is the base run's
        assert error(naive[:, 2], naive[:1, 2].repeat(COUNT, 0)) < EXACT


def tail_kinds(case, i):
    """Layer kinds on the last two tokens of every row, and a knock-out from there: behind all images."""
    where = np.zeros_like(case.real)
    where[:, -2:] = case.real[:, -2:]
    groups = np.where(where, GROUPS.index("last"), GROUPS.index("image"))
    knock = AttentionKnockout.between(LAYERS, "last", "image", [i % LAYERS], mode="pre_softmax", keep=0.1)
    gate = Gate({"text.resid_post": only(i % LAYERS, 0.2 * i, 1)}, where=where)
    return (knock.replace(groups=groups), gate, UniformAttention(only(i % LAYERS, 0.3, 0), where=where))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_may_hold_images(runs, family):
    case = runs(family)
    variants = stack([tail_kinds(case, i) for i in range(COUNT)])
    start = shared_prefix(case.model, case.inputs, variants, case.read)
    assert case.masks["image"][:, :start].any() and not case.masks["image"][:, start:].any()
    naive, fast = case.both(variants)
    assert min(np.abs(naive[0] - other).max() for other in naive[1:]) > CAUGHT
    # Logits reach 10, and the two engines sum attention over the prefix in another order.
    assert (np.abs(fast - naive) / np.maximum(1, np.abs(naive))).max() < ROUNDED


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_variants_share_a_prefix_of_images(runs, family):
    case = runs(family)
    variants = [tail_kinds(case, i) for i in range(2)]
    got = np.asarray(generate_variants(case.model, case.inputs, variants, 3))
    want = [np.asarray(vlm_jax.generate(case.model, case.inputs, 3, v)) for v in variants]
    np.testing.assert_array_equal(got, want)


def test_prefix_ends_before_an_image_that_sees_itself(runs):
    """Gemma's image tokens see each other: a change of the last of them reaches the first."""
    case = runs("gemma3")
    where = np.zeros_like(case.real)
    where[0, np.flatnonzero(case.masks["image"][0])[-1]] = True
    variants = [Add(case.normal(2, WIDTH), "text.resid_post", slot(i, 1), where=where) for i in range(LAYERS - 1)]
    naive, fast = case.both(variants)
    assert error(fast, naive) < EXACT


# What does not matter


@pytest.fixture(scope="module")
def patches(cases):
    """Patches of the tokens behind the prefix, and what they give."""
    texts = Runs(cases("qwen3_vl"), TEXT_ROWS)
    variants = [(LAYER_KINDS["patch"](texts, i), LAYER_KINDS["gate"](texts, i + 2)) for i in range(COUNT)]
    return texts, variants, texts.both(variants)


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunk_size_does_not_matter(patches, chunk):
    texts, variants, (naive, _) = patches
    got = sweep(texts.model, texts.inputs, variants, texts.read, base=texts.base, chunk=chunk)
    assert error(np.asarray(got), naive) < EXACT


def test_order_of_results_is_that_of_the_variants(patches):
    texts, variants, (naive, _) = patches
    order = [3, 0, 4, 2, 1]
    got = sweep(texts.model, texts.inputs, [variants[i] for i in order], texts.read, base=texts.base)
    assert error(np.asarray(got), naive[order]) < EXACT


def test_shared_prefix_does_not_matter(patches):
    texts, variants, (naive, _) = patches
    got = sweep(texts.model, texts.inputs, variants, texts.read, base=texts.base, start=0)
    assert error(np.asarray(got), naive) < EXACT


def test_batch_size_does_not_matter(patches):
    texts, variants, (naive, _) = patches
    rows = [2, 0]

    def of_rows(x):
        return x.replace(
            **{
                name: {site: donor[:, rows] for site, donor in x.donor.items()} if name == "donor" else x.where[rows]
                for name in ("donor", "where")
                if hasattr(x, name)
            }
        )

    some = stack([tuple(of_rows(i) for i in variant) for variant in variants])
    inputs = texts.inputs.take(rows)
    base = (Add(texts.base[0].value[rows]),)
    got = sweep(texts.model, inputs, some, Logits.of(inputs), base=base)
    assert error(np.asarray(got), naive[:, rows]) < EXACT


def test_padding_side_does_not_matter(cases):
    """Variants of a token group, whose positions differ from side to side."""
    got = []
    for side in ("left", "right"):
        runs = Runs(cases("qwen3_vl"), TEXT_ROWS, side)
        variants = [question_gate(runs, i) for i in range(LAYERS)]
        got.append(np.asarray(sweep(runs.model, runs.inputs, variants, runs.read)))
    assert np.abs(got[0][0] - got[0][1]).max() > CAUGHT
    assert error(got[1], got[0]) < EXACT


def test_vmapped_is_looped(patches):
    texts, variants, (naive, _) = patches
    stacked = stack(variants)

    def one(interventions):
        return texts.model(texts.inputs, (*texts.base, *interventions)).logits[:, -1]

    vmapped = np.asarray(jax.jit(jax.vmap(one, in_axes=(stacked.axes,)))(stacked.interventions))
    loop = jax.jit(one)
    looped = np.stack([np.asarray(loop(stacked.take(i).interventions)) for i in range(COUNT)])
    assert error(vmapped, looped) < EXACT
    assert error(naive, looped) < EXACT


@pytest.mark.parametrize("engine", ["sweep", "naive"])
def test_values_do_not_compile_again(patches, engine):
    """Other layers, heads, tokens, strengths, noise and prompts of the same shapes."""
    texts, variants, _ = patches
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    def run(seed, variants):
        prompts = make_batch(TEXT_ROWS, "left", seed, texts.case.config)
        inputs = vlm_jax.Inputs.from_hf(texts.model.config, **prompts)
        base = (Add(texts.normal(*texts.shape, WIDTH)),)
        sweep(texts.model, inputs, variants, Logits.of(inputs), base=base, engine=engine)
        return len(compiled)

    others = [(LAYER_KINDS["patch"](texts, i + 1), LAYER_KINDS["gate"](texts, i)) for i in range(COUNT)]
    run(1, variants)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert run(2, others) == 0
        run(2, others[:-1])  # another number of variants: the listener does hear
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_gold_tokens_are_scored(patches):
    """The engine's read-out of the answers, from logits of the whole model."""
    texts, variants, _ = patches
    read = Gold.of(texts.inputs, texts.masks["answer"])
    got = sweep(texts.model, texts.inputs, variants, read, base=texts.base)
    run = jax.jit(lambda m, x, i: m(x, i).logits)
    for number in (0, COUNT - 1):
        logits = np.asarray(run(texts.model, texts.inputs, (*texts.base, *variants[number])), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, answer in enumerate(texts.masks["answer"]):
            at = np.flatnonzero(answer)
            want = logp[row, at - 1, texts.batch["input_ids"][row, at]]
            valid = np.asarray(got.valid[number][row])
            np.testing.assert_allclose(np.asarray(got.logp[number][row])[valid], want, atol=EXACT)
            np.testing.assert_allclose(got.probability[number][row], np.exp(want.mean()), atol=EXACT)
            said = logits[row, at - 1].argmax(-1) == texts.batch["input_ids"][row, at]
            np.testing.assert_array_equal(np.asarray(got.hit[number][row])[valid], said)
            assert bool(got.correct[number][row]) == said.all()


@pytest.mark.parametrize("tokens, positions", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_short_answers_unembed_few_positions(texts, tokens, positions):
    answer = np.zeros(texts.inputs.input_ids.shape, bool)
    answer[:, -1] = answer[0, -tokens:] = True
    assert Gold.of(texts.inputs, answer).index.shape == (len(answer), positions)


# Grids


def test_windows():
    np.testing.assert_array_equal(layer_windows(4, 3)[[0, 1, 3]], [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(layer_windows(4, 2)[[0, 3]], [[1, 0, 0, 0], [0, 0, 1, 1]])


def test_patch_grid_takes_the_clean_runs_values(texts):
    """Every layer, head and token group: what explicit patches of a clean run's taps give."""
    masks, site = [texts.some(), texts.late], "text.head_out"
    grid, shape = patch_grid([site], LAYERS, heads=HEADS, tokens=masks)
    assert shape == (1, LAYERS, HEADS, 2) and len(grid) == np.prod(shape)
    places = [(0, 2, 1, 0), (0, 0, 3, 1), (0, 3, 0, 1)]
    donor = {site: jax.jit(lambda m, x: m(x, taps=[site]).taps[site])(texts.model, texts.inputs)}
    patches = [
        Patch(donor, {site: slot(layer, layer)}, masks[token], np.arange(HEADS) == head)
        for _, layer, head, token in places
    ]
    naive = agree(texts, patches)
    rows = np.array([np.ravel_multi_index(place, shape) for place in places])
    for engine in ("sweep", "naive"):
        got = sweep(texts.model, texts.inputs, grid.take(rows), texts.read, base=texts.base, clean=(), engine=engine)
        assert error(np.asarray(got), naive) < EXACT


def test_cut_and_head_grids():
    cuts, heads = cut_grid(3, ("attn", "mlp"), window=2), head_grid(2, 3)
    assert (len(cuts), len(heads)) == (6, 6)
    scale = cuts.take(4).interventions[0].scale  # the MLP around layer 1
    np.testing.assert_array_equal(scale["text.attn_out"], [1, 1, 1])
    np.testing.assert_array_equal(scale["text.mlp_out"], [0, 0, 1])
    np.testing.assert_array_equal(heads.take(5).interventions[0].scale, [[1, 1, 1], [1, 1, 0]])


# Generation

NEW = 6


def gate_and_knock(runs, layer=1, where=None):
    """Attention of a layer cut, and what follows the images kept from reading them in the two layers above."""
    knock = AttentionKnockout.between(LAYERS, "text", "image", [2, 3])
    return Gate({"text.attn_out": only(layer, 0, 1)}, where=where), bind((knock,), runs.bound)[0]


def oracle_tokens(runs, steps):
    """transformers' greedy tokens under hooks that act at every step, or only on more than one token."""
    oracle, masks = runs.case.oracle, runs.masks
    image = np.pad(masks["image"], ((0, 0), (0, NEW)))
    behind = np.concatenate([masks["behind"], np.broadcast_to(masks["image"].any(1)[:, None], (len(image), NEW))], 1)
    away = torch.from_numpy(behind[:, :, None] & image[:, None, :])[:, None]

    def acts(length):
        return steps == "all" or length > 1

    def cut(x):
        return torch.zeros_like(x) if acts(x.shape[1]) else x

    def knock(scores, mask):
        probs, (queries, keys) = (scores + mask).softmax(-1), scores.shape[-2:]
        here = away[:, :, keys - queries : keys, :keys]
        return torch.where(here, 0, probs) if acts(queries) else probs

    with ExitStack() as hooks:
        if steps != "none":
            layers = runs.case.layers
            hooks.enter_context(edited((writer(layers[1], "attn"), "output", cut)))
            hooks.enter_context(attention_edited({layers[n].self_attn: knock for n in (2, 3)}))
        out = oracle.generate(
            **tensors(runs.batch),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
    top = torch.stack(out.logits).topk(2).values
    assert (top[..., 0] - top[..., 1]).min() > 5e-4  # a near tie would be decided by rounding
    return out.sequences[:, -NEW:].numpy()


@pytest.fixture(scope="module")
def wanted_tokens(cases):
    runs = Runs(cases("qwen3_vl"), cases("qwen3_vl").rows)
    return {steps: oracle_tokens(runs, steps) for steps in ("none", "all", "prefill")}


def test_steps_make_a_difference(wanted_tokens):
    for one, other in (("none", "all"), ("none", "prefill"), ("all", "prefill")):
        assert (wanted_tokens[one] != wanted_tokens[other]).any(), (one, other)


@pytest.mark.parametrize("steps", ["all", "prefill"])
def test_generation_equals_transformers_with_hooks(runs, wanted_tokens, steps):
    case = runs("qwen3_vl")
    got = vlm_jax.generate(
        case.model, case.inputs, NEW, gate_and_knock(case), steps=steps, eos_token_id=(), pad_token_id=PAD
    )
    np.testing.assert_array_equal(np.asarray(got), wanted_tokens[steps])


def test_generated_variants_equal_transformers_with_hooks(runs, wanted_tokens):
    """Variants whose order is not that of their layers; the second is the one that transformers ran."""
    case = runs("qwen3_vl")
    variants = [gate_and_knock(case, layer) for layer in (3, 1, 0)]
    got = np.asarray(generate_variants(case.model, case.inputs, variants, NEW))
    np.testing.assert_array_equal(got[1], wanted_tokens["all"])
    assert (got[0] != got[1]).any() and (got[2] != got[1]).any()


def added(runs, i, where=None, new=True):
    """Loud enough to change what is said."""
    where = runs.some() if where is None else where
    return Add(3 * runs.normal(2, WIDTH), "text.resid_post", table_of(i), where=where, new=new)


@pytest.mark.parametrize("prefix, steps", [(True, "all"), (False, "prefill")], ids=["shared prefix", "no prefix"])
def test_generated_variants_are_a_loop(texts, prefix, steps):
    wheres = [texts.some() for _ in range(COUNT)]
    if not prefix:
        wheres[1][:, 0] = True
    variants = [added(texts, i, where) for i, where in enumerate(wheres)]
    got = np.asarray(generate_variants(texts.model, texts.inputs, variants, NEW, base=texts.base, steps=steps, chunk=2))
    want = [
        np.asarray(vlm_jax.generate(texts.model, texts.inputs, NEW, (*texts.base, v), steps=steps)) for v in variants
    ]
    assert len({tokens.tobytes() for tokens in want}) == COUNT
    np.testing.assert_array_equal(got, want)


def test_new_tokens_are_left_alone_unless_meant(texts):
    """``new`` decides for tokens that no mask knows; the first token is the prompt's and the same."""
    add = added(texts, 1)
    told, untold = (
        np.asarray(vlm_jax.generate(texts.model, texts.inputs, NEW, (*texts.base, add.replace(new=new))))
        for new in (True, False)
    )
    np.testing.assert_array_equal(told[:, 0], untold[:, 0])
    assert (told != untold).any()


def test_unknown_steps(texts):
    with pytest.raises(UserError, match="'prefill'"):
        vlm_jax.generate(texts.model, texts.inputs, 1, (), steps="decode")


# Several devices

SHARDED = """
import sys
import jax
import numpy as np
import vlm_jax
from interventions import Add, Gate, Gold, bind, sweep
from interventions.kinds.groups import GROUPS
from interventions.engine.bundles import bundled
from interventions.engine.grids import cut_grid, each_token, patch_grid
from vlm_jax.data import load_task
from vlm_jax.prompts import encode

assert jax.device_count() == 8
jax.config.update("jax_default_matmul_precision", "highest")
model, processor = vlm_jax.load("mini-qwen3-vl")
batch = encode(load_task("mini-docvqa", split="test", limit=8), processor, model.config)
read = Gold.of(batch.inputs, batch.spans["answer"])
depth, width = model.config.text.num_hidden_layers, model.config.text.hidden_size
shape = (*batch.inputs.input_ids.shape, width)
base = (Add(0.1 * np.random.default_rng(0).standard_normal(shape, np.float32)),)
variants = cut_grid(depth, ("attn",)).take(np.arange(1, depth))  # seven: no multiple of the devices
run = lambda inputs, **how: np.asarray(sweep(model, inputs, variants, read, base=base, chunk=2, **how).logp)

def mesh(axis):
    return jax.make_mesh((8,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))

one = run(batch.inputs)
assert np.ptp(one, 0).max() > 0.01
by_variant = run(batch.inputs, mesh=mesh("variant"))
samples = mesh("sample")

def put(array, axis):
    spec = jax.sharding.PartitionSpec(*[None] * axis, "sample")
    return jax.device_put(array, jax.sharding.NamedSharding(samples, spec))

inputs = jax.tree.map(lambda a: put(a, 0), batch.inputs.replace(position_ids=None))
inputs = inputs.replace(position_ids=put(batch.inputs.position_ids, 1))
assert len(inputs.images.pixel_values.sharding.device_set) == 8
by_sample = run(inputs)
for name, got in (("variant", by_variant), ("sample", by_sample)):
    worst = (np.abs(got - one) / np.maximum(1, np.abs(one))).max()
    assert worst < 1e-5, (name, worst)

tokens = each_token(batch.spans["question"] | batch.spans["answer"])[::2]
patches, _ = patch_grid(("text.attn_out",), depth, tokens=tokens)
start = np.flatnonzero(tokens[0].any(0))[0] // 8 * 8
assert len(bundled(model, batch.inputs, patches, int(start)).numbers) > 1
noise = (Add(base[0].value * batch.spans["question"][..., None]),)
bundles = [
    np.asarray(sweep(model, batch.inputs, patches, read, base=noise, clean=(), **how).logp)
    for how in ({}, {"mesh": mesh("variant")})
]
assert np.ptp(bundles[0], 0).max() > 0.01
assert np.abs(bundles[1] - bundles[0]).max() < 1e-5
print("equal")
"""


@pytest.mark.slow
def test_sharded_by_variant_and_by_sample():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "32"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


# Refusals


def gates(*layers):
    return [Gate.cut(LAYERS, [layer]) for layer in layers]


REFUSED = {
    "no variant": (lambda r: [], "at least one"),
    "another kind": (lambda r: [*gates(0), UniformAttention(only(0, 1, 0))], "variant 1"),
    "another site": (lambda r: [*gates(0, 1), Gate.cut(LAYERS, [0], ["mlp"])], "variant 2"),
    "another option": (lambda r: [r.knock(1, "post_softmax"), r.knock(1, "pre_softmax")], "variant 1"),
    "another shape": (
        lambda r: [Add(r.normal(n, WIDTH), "text.resid_post", slot(0)) for n in (1, 2)],
        "variant 1",
    ),
    "a variant that does nothing": (
        lambda r: [*gates(0, 1), Gate({"text.attn_out": np.ones(LAYERS, np.float32)})],
        "variant 2",
    ),
    "a variant on no token": (
        lambda r: [Gate.cut(LAYERS, [0]).replace(where=where) for where in (r.late, 0 * r.late > 0)],
        "variant 1",
    ),
    "unknown site": (lambda r: [Gate({"text.attn": np.zeros(LAYERS)})], "unknown site"),
    "absent site": (lambda r: [Gate({"visual.embeddings": np.float32(0)})], "touches nothing"),
    "another depth": (lambda r: [Gate.cut(LAYERS - 1, [0])], "layers"),
    "unbound": (lambda r: [Gate.cut(LAYERS, [0]).replace(group="question")], "bind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_swept_is_refused(texts, name):
    make, says = REFUSED[name]
    with pytest.raises(UserError, match=says) as raised:
        sweep(texts.model, texts.inputs, make(texts), texts.read)
    assert "\n" not in str(raised.value)


def test_what_does_nothing_generates_nothing(texts):
    with pytest.raises(UserError, match="variant 1"):
        generate_variants(texts.model, texts.inputs, [*gates(1), Gate.cut(LAYERS, [0], scale=1.0)], 1)


def test_unknown_engine(texts):
    with pytest.raises(UserError, match="'naive'"):
        sweep(texts.model, texts.inputs, gates(0), texts.read, engine="fast")
