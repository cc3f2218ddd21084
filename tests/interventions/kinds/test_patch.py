"""Patches against PyTorch hooks on transformers' own models, and identities: own values change nothing, and the clean
run's residual stream gives the clean run."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from hf_oracle import (
    writer,
)
from kind_cases import (
    CAUGHT,
    EXACT,
    HEADS,
    LAYERS,
    TOLERANCE,
    WIDTH,
    error,
    head_edit,
    mixed,
    nothing,
    slot,
)

import vlm_jax
from interventions import (
    Add,
    Patch,
)

pytestmark = pytest.mark.usefixtures("quick_programs")


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


@pytest.fixture(scope="module")
def everywhere(qwen):
    """Clean taps of every site; a function that patches chosen sites, with noise or without."""
    inputs, real = qwen.inputs["left"], qwen.real["left"]
    clean = jax.jit(lambda m, x: m(x, taps=m.sites(x)))(qwen.model, inputs)
    noise = np.random.default_rng(3).standard_normal((*real.shape, WIDTH), np.float32)
    depths = qwen.model.depths
    layered = {site: depths[vlm_jax.sites.stack_of(site)] for site in clean.taps if vlm_jax.sites.layered(site)}
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
    or site.removesuffix(".linear_fc1").removesuffix(".linear_fc2")
    in ("projector.merger", "projector.deepstack_merger_list")
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
