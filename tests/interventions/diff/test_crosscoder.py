"""Crosscoders: pairs of the same tokens, and latents that are found to belong to one model or to both."""

import dataclasses

import numpy as np
import pytest

from interventions.diff.activations import ActivationOptions, Computed, Index, Shuffled
from interventions.diff.crosscoder import TOKENS, Paired, second_share
from interventions.diff.place import Place
from interventions.kinds.groups import GROUPS
from train.dictionaries import DictionaryOptions, train_dictionaries
from vlm_jax import UserError, load
from vlm_jax.data import load_task

pytestmark = pytest.mark.usefixtures("quick_programs")
OPTIONS = ActivationOptions(("text.resid_post",), (1, 4), activation_batch=4)


@pytest.fixture(scope="module")
def models():
    return load("mini-llava-text"), load("mini-llava")


@pytest.fixture(scope="module")
def examples():
    return [*load_task("mini-vsr", split="train", limit=6), *load_task("mini-aokvqa", split="train", limit=4)]


@pytest.fixture(scope="module")
def paired(models, examples):
    return Paired.of(*models, examples, OPTIONS)


def test_pairs_are_of_the_same_tokens(models, examples, paired):
    """Against each model's own reading, example by example, in units of the scales."""
    options = dataclasses.replace(OPTIONS, tokens=TOKENS)
    width = 128
    for block in range(len(paired.blocks)):
        found = paired.read(block)["text.resid_post"]
        assert found.shape[2] == 2 * width
        rows = paired.index.example[paired.index.block == block]
        for example in np.unique(rows):
            for half, (model, blind) in enumerate(zip(models, (True, False), strict=True)):
                one = examples[example].without_images() if blind else examples[example]
                alone = Computed.of(*model, [one], options).read(0)["text.resid_post"]
                scale = paired.scales["text.resid_post"][half][:, None, None]
                part = found[:, rows == example, half * width : (half + 1) * width]
                np.testing.assert_allclose(part * scale, alone, atol=2e-4)


def test_each_models_values_have_a_spread_of_about_1(paired):
    first = paired.read(0)["text.resid_post"]
    for half in np.split(first, 2, axis=-1):
        np.testing.assert_allclose(np.sqrt(half.var(1).mean(-1)), 1, atol=1e-4)


def test_models_that_read_other_tokens_are_refused(models, examples):
    with pytest.raises(UserError, match="as different tokens: compare stages of one model"):
        Paired.of(load("mini-gemma3"), models[1], examples, OPTIONS)


class Planted:
    """Pairs that are made of eight directions of both models, four of the first only and four of the second only."""

    def __init__(self, rows=8192, blocks=8, width=16):
        rng = np.random.default_rng(0)
        directions = rng.standard_normal((16, 2, width))
        directions[8:12, 1] = directions[12:, 0] = 0
        directions /= np.linalg.norm(directions, axis=(1, 2), keepdims=True)
        self.directions = directions.reshape(16, -1)
        codes = (rng.random((rows, 16)) < 0.12) * (1 + rng.random((rows, 16)))
        self.values = (codes @ self.directions * 5).astype(np.float32)[None]
        block = np.repeat(np.arange(blocks), rows // blocks).astype(np.int32)
        group = np.full(rows, GROUPS.index("question"), np.int32)
        self.index = Index(block, block, block, group, block)

    def read(self, block):
        return {"text.resid_post": self.values[:, self.index.block == block]}


def test_planted_owners_are_found():
    source = Planted()
    options = DictionaryOptions(latents=16, k=2, batch=256, epochs=25, lr=0.01, activation="batchtopk", aux_k=4)
    place = Place("text.resid_post", 3)
    outcome = train_dictionaries(Shuffled(source, 256, buffer=2), [place], options)
    found = outcome.dictionaries[place]
    cosines = source.directions @ np.asarray(found.W_dec).T
    assert np.median(cosines.max(1)) > 0.95
    share = second_share(found)[cosines.argmax(1)]
    good = cosines.max(1) > 0.9
    assert good.sum() >= 12
    assert (share[8:12][good[8:12]] < 0.2).all() and (share[12:][good[12:]] > 0.8).all()
    assert (np.abs(share[:8] - 0.5)[good[:8]] < 0.25).all()
