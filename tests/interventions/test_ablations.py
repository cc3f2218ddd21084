"""Ablations by zeros, means and other samples' values: as kinds, in grids, and as patches of a trace."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from hf_oracle import writer
from kind_cases import CAUGHT, FAMILIES, HEADS, LAYERS, TOLERANCE, WIDTH, error, mixed, one_sentence, spans_of

import vlm_jax
from interventions import (
    GROUPS,
    Ablation,
    Gate,
    HeadGate,
    Logits,
    Patch,
    bind,
    label,
    reference_means,
    resampled,
    sweep,
)
from interventions.ablations import has_donor
from interventions.engine.grids import ablation_grid, layer_windows, patch_grid
from interventions.kinds.groups import tokens_of
from interventions.kinds.layers import slots
from interventions.trace.options import TraceOptions
from interventions.trace.patches import Patches
from interventions.trace.tracing import trace_examples
from vlm_jax.data import load_task
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch, batches, encode

SITES = ("text.attn_out", "text.mlp_out")


def batch_of(case, side="left"):
    return Batch(case.inputs[side], spans_of(case.masks[side]), 2)


def means_of(case, sites=SITES):
    return reference_means(case.model, [([0, 1, 2], batch_of(case))], sites)


def logits(case, *interventions):
    return np.asarray(case.model(case.inputs["left"], interventions).logits)[case.real["left"]]


def test_reference_means(cases):
    """By hand from taps; rows that fill a batch up do not count."""
    case = cases("qwen3_vl")
    found = reference_means(case.model, [([0, 1], batch_of(case))], (*SITES, "text.head_out"))
    labels = label(batch_of(case))[:2]
    for site, mean in found.values.items():
        values = np.asarray(case.model(case.inputs["left"], (), [site]).taps[site])[:, :2]
        for group, name in enumerate(GROUPS):
            where = labels == group
            assert found.known[group] == (where.any() and name != "padding")
            if found.known[group]:
                np.testing.assert_allclose(mean[:, group], values[:, where].mean(1), atol=1e-5)
    with pytest.raises(UserError, match="no value for each token"):
        reference_means(case.model, [], ["text.attn_probs"])


@pytest.mark.parametrize("family", FAMILIES)
def test_means_replace_outputs(cases, family):
    """Against a hook in transformers that writes the mean of each token's group. The control has the overall mean."""
    case = cases(family)
    means, labels = means_of(case), label(batch_of(case))
    (ablation,) = bind(Ablation.by_mean(means, [1, -1], group="question+image"), batch_of(case))
    where = tokens_of("question+image", labels)

    def edits(values):
        for layer in (1, LAYERS - 1):
            for module in ("attn", "mlp"):
                new = torch.from_numpy(values(f"text.{module}_out", layer))
                yield (
                    writer(case.layers[layer], module),
                    "output",
                    lambda old, new=new: mixed(where, new.to(old.dtype), old),
                )

    want = case.wanted(*edits(lambda site, layer: means.values[site][layer][labels]))
    assert error(logits(case, ablation), want) < TOLERANCE
    overall = case.wanted(
        *edits(lambda site, layer: np.broadcast_to(means.values[site][layer].mean(0), (*labels.shape, WIDTH)).copy())
    )
    assert error(logits(case, ablation), overall) > CAUGHT


def test_zeros_are_cuts(cases):
    case = cases("gemma3")
    assert error(logits(case, Ablation.zero(SITES, 2)), logits(case, Gate.cut(LAYERS, [2], ["attn", "mlp"]))) < 1e-6
    some = Ablation.zero("text.head_out", [0, 2]).replace(heads=np.arange(HEADS) == 1)
    assert error(logits(case, some), want := logits(case, HeadGate.cut(LAYERS, HEADS, [(0, 1), (2, 1)]))) < 1e-6
    assert error(want, logits(case)) > CAUGHT


@pytest.mark.parametrize("by_mean", [False, True])
@pytest.mark.parametrize("heads", [None, HEADS])
def test_grids(cases, by_mean, heads):
    """Every cell is the whole model with that cell's ablation."""
    case = cases("qwen3_vl")
    batch, sites = batch_of(case), SITES if heads is None else ("text.head_out",)
    ablation = Ablation.by_mean(means_of(case, sites)) if by_mean else Ablation.zero(sites)
    (bound,) = bind(ablation, batch)
    masks = [tokens_of(group, label(batch)) for group in ("question", "last")]
    variants, shape = ablation_grid(bound, sites, LAYERS, window=2, heads=heads, tokens=masks)
    read = Logits.of(case.inputs["left"])
    found = np.asarray(sweep(case.model, case.inputs["left"], variants, read)).reshape(*shape, -1)
    for site, layer, head, group in [(0, 1, 2, 0), (len(sites) - 1, 3, 0, 1)]:
        window = np.flatnonzero(layer_windows(LAYERS, 2)[layer]).tolist()
        one = Ablation.by_mean(means_of(case, sites), window) if by_mean else Ablation.zero(sites, window)
        one = one.replace(slot={sites[site]: one.slot[sites[site]]}, mean={sites[site]: one.mean[sites[site]]})
        chosen = None if heads is None else np.arange(HEADS) == head
        (one,) = bind(one.replace(where=masks[group], heads=chosen), batch)
        want = np.asarray(sweep(case.model, case.inputs["left"], [one], read, engine="naive")).reshape(-1)
        cell = (site, layer, group) if heads is None else (site, layer, head, group)
        assert error(found[cell], want) < 1e-4


def test_donors_are_of_the_same_group(cases):
    """Values of another batch's taps at the aligned tokens, and what lacks a donor stays."""
    case = cases("qwen3_vl")
    batch, donors = batch_of(case), batch_of(case, "right")
    turned = Batch(donors.inputs.take([2, 0, 1], 6), {n: s[[2, 0, 1]] for n, s in donors.spans.items()}, 2)
    found = resampled(case.model, batch, turned, SITES)
    values = np.asarray(case.model(turned.inputs, (), [SITES[0]]).taps[SITES[0]])
    own, other, known = label(batch), label(turned), has_donor(batch, turned)
    image = GROUPS.index("image")
    assert not known[0][own[0] == image].any() and known[1][own[1] == image].all()  # the last row has no image
    for row, group in ((1, image), (2, GROUPS.index("question"))):
        places, sources = np.flatnonzero(own[row] == group), np.flatnonzero(other[row] == group)
        for number, place in enumerate(places):
            source = sources[number * len(sources) // len(places)]
            np.testing.assert_allclose(found[SITES[0]][:, row, place], values[:, row, source], atol=1e-5)
    variants, shape = patch_grid(SITES, LAYERS, tokens=[known], donor=found)
    read = Logits.of(case.inputs["left"])
    swept = np.asarray(sweep(case.model, case.inputs["left"], variants, read)).reshape(*shape, -1)
    one = Patch({SITES[1]: found[SITES[1]][2:3]}, {SITES[1]: slots(LAYERS, [2])}, known)
    assert error(swept[1, 2, 0], np.asarray(sweep(case.model, case.inputs["left"], [one], read)).reshape(-1)) < 1e-4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda means: Ablation.by_mean(means, [LAYERS]), "the model has no layer 4"),
        (lambda means: Ablation.by_mean(means, [1, -3]), "name a layer twice"),
        (lambda means: Ablation.by_mean(means, []), "name at least one"),
        (lambda means: Ablation.by_mean(means), "bind it to a batch first"),
    ],
)
def test_refused(cases, make, says):
    case = cases("qwen3_vl")
    with pytest.raises(UserError) as refusal:
        logits(case, make(means_of(case)))
    assert says in str(refusal.value) and one_sentence(refusal.value)


def test_means_of_another_depth_are_refused(cases):
    case = cases("qwen3_vl")
    means = means_of(case)
    shallow = means._replace(values={site: mean[:2] for site, mean in means.values.items()})
    with pytest.raises(UserError, match="the means are of 2 layers, but the model has 4"):
        logits(case, *bind(Ablation.by_mean(shallow), batch_of(case)))


def test_another_batch_is_refused(cases):
    """The groups that were looked up are those of one batch."""
    case = cases("qwen3_vl")
    (bound,) = bind(Ablation.by_mean(means_of(case)), batch_of(case))
    other = case.inputs["left"].cut(case.inputs["left"].input_ids.shape[1] - 4)
    with pytest.raises(UserError, match="bind it anew"):
        case.model(other, bound)


def test_generated_tokens_without_a_mean_are_left_alone(mini, examples):
    """Means of prompts without answers say nothing of generated tokens, which then keep their values."""
    model, processor = mini
    asked = encode(examples, processor, model.config, with_answer=False)
    means = reference_means(model, [([0, 1, 2, 3], asked)], ["text.mlp_out"])
    (ablation,) = bind(Ablation.by_mean(means, [0, 1]), asked)
    found = vlm_jax.generate(model, asked.inputs, 4, ablation)
    np.testing.assert_array_equal(found, vlm_jax.generate(model, asked.inputs, 4, ablation, steps="prefill"))
    assert not means.known[GROUPS.index("answer")]


def test_donors_are_values_of_the_layers(cases):
    case = cases("qwen3_vl")
    for site in ("text.embeddings", "text.attn_probs"):
        with pytest.raises(UserError, match="no value for each token in every layer"):
            resampled(case.model, batch_of(case), batch_of(case), [site])


def test_groups_without_a_mean_are_refused(cases):
    case = cases("qwen3_vl")
    means = means_of(case)
    means.known[GROUPS.index("question")] = False
    with pytest.raises(UserError, match="no token of the group 'question'"):
        bind(Ablation.by_mean(means), batch_of(case))
    bind(Ablation.by_mean(means, group="image"), batch_of(case))  # where it acts there is one


# In a trace


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def examples():
    return load_task("mini-okvqa", split="trace", limit=4)


def effects(mini, examples, batch=4, **options):
    traced = trace_examples(*mini, examples, TraceOptions(direction="break", batch=batch, **options), "t")
    return traced.ie[:, 0].reshape(len(examples), 8, 2, -1), traced


def probability(mini, encoded, interventions=()):
    """p(gold) of one pass: the geometric mean over gold tokens, in NumPy."""
    answer = encoded.spans["answer"]
    logits = np.asarray(mini[0](encoded.inputs, interventions).logits, np.float64)
    logp = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    ids = np.asarray(encoded.inputs.input_ids)
    gold = np.take_along_axis(logp[:, :-1], ids[:, 1:, None], 2)[..., 0]
    return np.exp((gold * answer[:, 1:]).sum(1) / answer.sum(1))


def test_zero_ablation_of_the_clean_run(mini, examples):
    """IE is how much p(gold) falls if a module's output is cut."""
    found, traced = effects(mini, examples, patch="zero")
    encoded = encode(examples, mini[1], mini[0].config)
    clean = probability(mini, encoded)
    np.testing.assert_allclose(traced.p_clean, clean, atol=1e-5)
    for layer, number, module in ((0, 0, "attn"), (5, 1, "mlp")):
        want = clean - probability(mini, encoded, Gate.cut(8, [layer], [module]))
        np.testing.assert_allclose(found[:, layer, number, 0], want, atol=1e-5)
        assert np.abs(want).max() > 1e-3


def test_mean_ablation_of_the_clean_run(mini, examples):
    """By the traced samples' means, or by those of others."""
    others = load_task("mini-docvqa", split="trace", limit=3)
    encoded = encode(examples, mini[1], mini[0].config)
    clean, found = probability(mini, encoded), {}
    for name, reference in (("own", None), ("others", others)):
        options = TraceOptions(direction="break", patch="mean", batch=4)
        traced = trace_examples(*mini, examples, options, "t", reference=reference)
        found[name] = traced.ie[:, 0].reshape(len(examples), 8, 2)
        groups = batches(reference or examples, mini[1], mini[0].config, 2)
        means = reference_means(mini[0], groups, SITES)
        one = Ablation.by_mean(means, 3).replace(slot={}, mean={})
        whole = Ablation.by_mean(means, 3)
        site = "text.mlp_out"
        (one,) = bind(whole.replace(slot={site: whole.slot[site]}, mean={site: whole.mean[site]}), encoded)
        np.testing.assert_allclose(found[name][:, 3, 1], clean - probability(mini, encoded, one), atol=1e-5)
    assert np.abs(found["own"] - found["others"]).max() > 1e-3


def test_resampled_values_do_not_depend_on_the_batch(mini, examples):
    """One sample's donor depends on the seed alone, and its effect is that of a patch made by hand."""
    found, _ = effects(mini, examples, patch="resample", seed=1)
    alone, _ = effects(mini, examples, batch=1, patch="resample", seed=1)
    other, _ = effects(mini, examples, patch="resample", seed=2)
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert np.abs(found - other).max() > 1e-3
    options = TraceOptions(direction="break", patch="resample", seed=1)
    encoded = encode(examples[:1], mini[1], mini[0].config)
    donors = Patches(*mini, examples, options).donors([0], 1)
    values = resampled(mini[0], encoded, donors, SITES)
    patch = Patch({SITES[0]: values[SITES[0]][1:2]}, {SITES[0]: slots(8, [1])}, has_donor(encoded, donors))
    want = probability(mini, encoded) - probability(mini, encoded, patch)
    np.testing.assert_allclose(found[:1, 1, 0, 0], want, atol=1e-5)


def test_samples_without_a_donor_are_missing(mini):
    """A picture's tokens have no donor among questions without one: null, and not an effect of 0."""
    pictures = load_task("mini-okvqa", split="trace", limit=1)
    blind = [dataclasses.replace(one.without_images(), id=f"blind {one.id}") for one in pictures]
    options = TraceOptions(direction="break", patch="resample", positions=("image", "last"), batch=2)
    ie = trace_examples(*mini, [*pictures, *blind], options, "t").ie[:, 0].reshape(2, 8, 2, 2)
    assert np.isnan(ie[..., 0]).all() and np.isfinite(ie[..., 1]).all()


def test_breaking_by_the_corrupted_run(mini, examples):
    """Corrupted values in the clean run. TE is that of restoring; what every module together breaks is all of it."""
    found, traced = effects(mini, examples, window=8, positions=("all",))
    restored = trace_examples(*mini, examples, TraceOptions(batch=4), "t")
    np.testing.assert_allclose(traced.te, restored.te, atol=1e-5)
    single, _ = effects(mini, examples)
    assert np.abs(single[..., 0] - restored.ie[:, 0].reshape(4, 8, 2)).max() > 1e-2
    # A window of all layers at the central layer covers every attention; noise on the question reaches the answer only
    # through attention.
    np.testing.assert_allclose(found[:, 4, 0, 0], traced.te[:, 0], atol=2e-2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patch": "zero"}, "give --direction break"),
        ({"patch": "zero", "direction": "break", "positions": ("each",)}, "drop --patch and --direction"),
        ({"patch": "nothing"}, "unknown patch 'nothing'"),
    ],
)
def test_options_that_exclude_each_other(options, says):
    with pytest.raises(UserError) as refusal:
        TraceOptions(**options).check(8)
    assert says in str(refusal.value) and one_sentence(refusal.value)


def test_one_sample_has_no_donor(mini, examples):
    with pytest.raises(UserError, match="there is only one: raise --limit"):
        effects(mini, examples[:1], patch="resample")
    with pytest.raises(UserError, match="placing LoRA needs how much modules restore"):
        dataclasses.replace(TraceOptions(), direction="break").check_modules()


def test_one_program(mini):
    """Layers of a mean ablation are values."""
    case_model, processor = mini
    encoded = encode(load_task("mini-okvqa", split="trace", limit=1), processor, case_model.config)
    means = reference_means(case_model, [([0], encoded)], SITES)
    traced = []

    @jax.jit
    def run(ablation):
        traced.append(1)
        return case_model(encoded.inputs, ablation).logits

    first, second = (run(*bind(Ablation.by_mean(means, layer), encoded)) for layer in (1, 4))
    assert len(traced) == 1 and np.abs(np.asarray(first - second)).max() > CAUGHT
