"""Latents of dictionaries: ablated, clamped, steered and spliced, against PyTorch hooks and NumPy."""

import numpy as np
import pytest
import torch
from hf_oracle import reader
from kind_cases import CAUGHT, LAYERS, TOLERANCE, dictionary, error, mixed, one_sentence, slot

from interventions import Gold, Latents, load_interventions, save_interventions, stack, sweep
from vlm_jax import UserError
from vlm_jax.sites import Context

pytestmark = pytest.mark.usefixtures("quick_programs")

SITE = "text.resid_post"
CHOSEN = (3, 40, 41, 90)


def oracle(one, x, change, error=True):
    """The dictionary spelt out in PyTorch, in double precision."""
    arrays = [torch.from_numpy(np.asarray(a)).double() for a in (one.W_enc, one.b_enc, one.W_dec, one.b_dec)]
    w_enc, b_enc, w_dec, b_dec = arrays
    before = x.double() @ w_enc + b_enc
    if one.architecture == "topk":
        kept = before.topk(one.k, -1)
        codes = torch.zeros_like(before).scatter(-1, kept.indices, kept.values.clamp(min=0))
    else:
        codes = torch.where(before > torch.from_numpy(one.threshold), before.clamp(min=0), 0.0)
    changed = change(codes.clone())
    reconstruction = changed @ w_dec + b_dec
    return (reconstruction + error * (x.double() - codes @ w_dec - b_dec)).float()


def set_to(value):
    def change(codes):
        codes[..., list(CHOSEN)] = value
        return codes

    return change


def add(value):
    def change(codes):
        codes[..., list(CHOSEN)] += value
        return codes

    return change


CHANGES = {
    "ablate": (lambda *where, **how: Latents.ablate(*where, CHOSEN, **how), set_to(0.0)),
    "clamp": (lambda *where, **how: Latents.clamp(*where, CHOSEN, 3.0, **how), set_to(3.0)),
    "steer": (lambda *where, **how: Latents.steer(*where, CHOSEN, 2.0, **how), add(2.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_equals_hook(case, name):
    """The second of two slots, in one layer, on some tokens."""
    make, change = CHANGES[name]
    one, layer = case.dictionary.member(1), LAYERS - 2

    def wanted(layer, where):
        return case.wanted((reader(case.oracle, layer), "input", lambda x: mixed(where, oracle(one, x, change), x)))

    latents = make(case.dictionary, {SITE: slot(layer, 1)}, where=case.some)
    got = case.logits(latents=latents)
    assert error(got, wanted(layer, case.some)) < TOLERANCE
    assert error(got, wanted(layer + 1, case.some)) > CAUGHT and error(got, wanted(layer, ~case.some)) > CAUGHT


def test_identity_with_error_changes_nothing(case):
    plain = case.logits()
    spliced = Latents.splice(case.dictionary, {SITE: slot(1, 0)}, error=True, where=case.some)
    assert error(case.logits(latents=spliced), plain) == 0
    ablated = Latents.ablate(case.dictionary, {SITE: slot(1, 0)}, range(96), where=case.some)
    assert error(case.logits(latents=ablated), plain) > CAUGHT


def with_thresholds(rng):
    one = dictionary(rng, members=1).member(0)
    return one.replace(architecture="jumprelu", k=None, threshold=np.abs(rng.standard_normal(96)).astype(np.float32))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_architectures_and_the_error(architecture, error, name):
    rng = np.random.default_rng(0)
    one = dictionary(rng, members=1).member(0) if architecture == "topk" else with_thresholds(rng)
    x = rng.standard_normal((2, 5, 64), np.float32)
    make, change = CHANGES[name]
    got = make(one, {SITE: np.zeros(1, np.int32)}, error=error)(SITE, x, Context(layer=0))
    want = oracle(one, torch.from_numpy(x), change, error).numpy()
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    assert np.abs(want - oracle(one, torch.from_numpy(x), change, not error).numpy()).max() > CAUGHT


def test_all_latents_ablated_is_the_bias():
    """Without the error, an ablation of everything leaves the decoder's bias."""
    one = dictionary(np.random.default_rng(1), members=1).member(0)
    x = np.random.default_rng(2).standard_normal((2, 3, 64), np.float32)
    slots = {SITE: np.zeros(1, np.int32)}
    got = Latents.ablate(one, slots, range(96), error=False)(SITE, x, Context(layer=0))
    np.testing.assert_allclose(got, np.broadcast_to(one.b_dec, x.shape), atol=1e-6)
    spliced = Latents.splice(one, slots)(SITE, x, Context(layer=0))
    np.testing.assert_allclose(spliced, one(x), atol=1e-6)
    assert np.abs(spliced - x).max() > CAUGHT


def test_a_sweep_over_latents_equals_single_runs(qwen):
    """The dictionary is shared by the variants, not copied."""
    inputs, answer = qwen.inputs["left"], qwen.masks["left"]["answer"]
    gold = Gold.of(inputs, answer)
    variants = stack(Latents.each(qwen.dictionary, {SITE: slot(2, 1)}, [5, 17, 60]))
    # Only scale and shift differ from variant to variant.
    assert sum(map(bool, variants.mapped)) == 2
    got = sweep(qwen.model, inputs, variants, gold)
    naive = sweep(qwen.model, inputs, variants, gold, engine="naive")
    np.testing.assert_allclose(got.logp, naive.logp, atol=1e-5)
    assert np.ptp(np.asarray(got.logp), axis=0).max() > 1e-4  # the latents differ


def test_the_file(tmp_path):
    one = with_thresholds(np.random.default_rng(3))
    latents = Latents.clamp(one, {SITE: slot(1)}, [2, 4], 1.5, group="text", new=True)
    save_interventions(tmp_path / "latents.safetensors", [latents])
    (loaded,) = load_interventions(tmp_path / "latents.safetensors")
    x = np.random.default_rng(4).standard_normal((1, 3, 64), np.float32)
    where = {"where": np.ones((1, 3), bool)}
    both = [i.replace(**where)(SITE, x, Context(layer=1)) for i in (latents, loaded)]
    np.testing.assert_array_equal(*both)
    assert (loaded.group, loaded.new, loaded.error, loaded.architecture) == ("text", True, True, "jumprelu")


@pytest.mark.parametrize("latents", [[], [96], [-1]])
def test_latents_that_are_not_there(latents):
    one = dictionary(np.random.default_rng(5), members=1).member(0)
    with pytest.raises(UserError, match="0 to 95") as caught:
        Latents.ablate(one, {SITE: slot(0)}, latents)
    assert one_sentence(caught.value)


def test_another_width():
    one = dictionary(np.random.default_rng(6), members=1).member(0)
    latents = Latents.splice(one, {SITE: np.zeros(1, np.int32)})
    with pytest.raises(UserError, match="width of 64, but the width here is 32") as caught:
        latents(SITE, np.zeros((1, 2, 32), np.float32), Context(layer=0))
    assert one_sentence(caught.value)
