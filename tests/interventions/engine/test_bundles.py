"""Variants that act late carry only the tokens from their first one on: the same results as the whole model for each.

Everything is in float32, and every run has noise on all embeddings, so nothing but the engine makes variants equal.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from kind_cases import FAMILIES, LAYERS, WIDTH, Case, error, slot

from interventions import GROUPS, Add, AttentionKnockout, Gate, Gold, Logits, Patch, Replace, stack, sweep
from interventions.engine import bundles
from interventions.engine.bundles import bundled
from interventions.engine.cost import estimate
from interventions.engine.grids import each_token, patch_grid
from interventions.modules import MODULE_SITES

pytestmark = pytest.mark.usefixtures("quick_programs")

EXACT, CAUGHT = 2e-5, 1e-3  # logits reach 10, and the engines sum attention in another order


class Grid:
    """A ragged batch of a family whose tokens are patched one by one. ``noise`` makes the base run."""

    def __init__(self, case: Case):
        self.model, self.inputs = case.model, case.inputs["left"]
        self.masks, self.real = case.masks["left"], case.real["left"]
        rng = np.random.default_rng(3)
        self.noise = (Add(0.3 * rng.standard_normal((*self.real.shape, WIDTH), np.float32)),)
        self.donor = {
            site: jnp.asarray(rng.standard_normal((LAYERS, *self.real.shape, WIDTH), np.float32))
            for site in MODULE_SITES
        }

    def tokens(self, every: int) -> list[np.ndarray]:
        """Every n-th token of the prompts, and the last."""
        positions = np.arange(self.real.shape[1])[::-1] % every == 0
        return each_token(self.real & positions)

    def by_engine(self, variants, read, **options) -> list[np.ndarray]:
        """The answers of the naive engine and of the fast one."""
        return [
            np.asarray(sweep(self.model, self.inputs, variants, read, base=self.noise, engine=engine, **options))
            for engine in ("naive", "sweep")
        ]


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    made = {}

    def grid(family):
        if family not in made:
            made[family] = Grid(Case(family, tmp_path_factory.mktemp(family)))
        return made[family]

    return grid


def begins(grid, variants, start=0) -> list[int]:
    return [bundle.begin for bundle in next(iter(bundled(grid.model, grid.inputs, variants, start)))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grid_over_every_token(grids, family):
    """P0's patches, whose donor is the clean run, of every third token, in prompts of several images and none."""
    grid = grids(family)
    variants, shape = patch_grid(MODULE_SITES, LAYERS, tokens=grid.tokens(3))
    assert len(begins(grid, variants)) > 2
    naive, fast = grid.by_engine(variants, Logits.of(grid.inputs), clean=())
    assert naive.shape == (np.prod(shape), len(grid.real), 320)
    last = naive.reshape(*shape, *naive.shape[1:])[:, :, -1]  # patches of the last token, which are in the last bundle
    assert np.abs(last[:, :, None] - last[:, None])[:, ~np.eye(LAYERS, dtype=bool)].max((1, 2, 3)).min() > CAUGHT
    assert error(fast, naive) < EXACT


def test_a_bundle_that_begins_too_late_is_seen(grids, monkeypatch):
    """The control: some tokens of a bundle are patched that it does not carry."""
    grid = grids("qwen3_vl")
    variants, _ = patch_grid(MODULE_SITES, LAYERS, tokens=grid.tokens(3))
    exact = bundles._by_token

    def late(*args):
        (first, numbers), *others = exact(*args).items()
        return {first: numbers} | {min(begin + 3, grid.real.shape[1] - 1): numbers for begin, numbers in others}

    monkeypatch.setattr(bundles, "_by_token", late)
    naive, fast = grid.by_engine(variants, Logits.of(grid.inputs), clean=())
    assert error(fast, naive) > CAUGHT


def single(grid, token):
    return grid.real & (np.arange(grid.real.shape[1]) == token)


def of_donor(grid, token, i):
    tables = {site: slot(i % LAYERS, i % LAYERS) for site in MODULE_SITES}
    return Patch(grid.donor, tables, single(grid, token))


def knock_out(grid, token, i):
    labels = np.where(single(grid, token), 5, 1) * grid.real
    query, key = GROUPS[5], GROUPS[1]
    knock = AttentionKnockout.between(LAYERS, query, key, [i % LAYERS], mode="pre_softmax", keep=0.2)
    return knock.replace(groups=labels)


KINDS = {
    "donor": of_donor,
    "gate": lambda grid, token, i: Gate({"text.attn_out": np.full(LAYERS, 0.3, np.float32)}, where=single(grid, token)),
    "embedding": lambda grid, token, i: Replace(np.full(WIDTH, 0.5, np.float32), where=single(grid, token)),
    "norm": lambda grid, token, i: Gate({"text.norm": np.float32(0.5)}, where=single(grid, token)),
    "knock-out": knock_out,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_act_on_one_token(grids, kind, monkeypatch):
    """One variant acts on the last token alone."""
    monkeypatch.setattr(bundles, "_FEWEST_VARIANTS", 2)
    grid = grids("qwen3_vl")
    length = grid.real.shape[1]
    tokens = [length - 1 - 3 * i for i in range(6)]
    variants = stack([KINDS[kind](grid, token, i) for i, token in enumerate(tokens)])
    assert len(begins(grid, variants)) > 1
    clean = () if kind in ("donor", "embedding") else None  # with a clean run beside the base run, and without
    naive, fast = grid.by_engine(variants, Logits.of(grid.inputs), clean=clean)
    assert np.abs(naive[0] - naive[1]).max() > CAUGHT
    assert error(fast, naive) < EXACT


def test_answers_that_begin_before_a_bundle(grids):
    """Gold tokens that are predicted before the bundle's first token are the base run's."""
    grid = grids("qwen2_5_vl")
    gold = Gold.of(grid.inputs, grid.masks["answer"])
    variants, _ = patch_grid(MODULE_SITES, LAYERS, tokens=grid.tokens(2))
    answers = [
        sweep(grid.model, grid.inputs, variants, gold, base=grid.noise, clean=(), engine=engine)
        for engine in ("naive", "sweep")
    ]
    naive, fast = (np.asarray(scores.logp) for scores in answers)
    late = max(begins(grid, variants))
    assert late > gold.index[gold.valid].min() - 1  # it does not hold the token that predicts the first gold one
    assert np.ptp(naive, 0).max() > CAUGHT
    assert error(fast, naive) < EXACT


def test_several_sweeps_keep_the_order(grids, monkeypatch):
    """Variants that do not fit into memory at once, in an order that is neither that of layers nor of tokens."""
    grid = grids("qwen3_vl")
    variants, _ = patch_grid(MODULE_SITES, LAYERS, tokens=grid.tokens(3))
    order = np.random.default_rng(0).permutation(len(variants))[:31]
    variants, read = variants.take(order), Logits.of(grid.inputs)
    whole = np.asarray(sweep(grid.model, grid.inputs, variants, read, base=grid.noise, clean=()))
    monkeypatch.setattr(bundles, "_FEWEST_VARIANTS", 2)
    monkeypatch.setattr(bundles, "LIVE_BYTES", 4 * WIDTH * grid.real.size * 7)
    sweeps = bundled(grid.model, grid.inputs, variants, 0)
    assert len(sweeps) > 2 and len(sweeps.numbers) > 2
    assert len({tuple(len(bundle.variants) for bundle in of_sweep) for of_sweep in sweeps}) == 1
    parts = np.asarray(sweep(grid.model, grid.inputs, variants, read, base=grid.noise, clean=()))
    assert error(parts, whole) < EXACT


def test_variants_of_every_token_make_one_bundle(grids):
    grid = grids("qwen3_vl")
    variants, _ = patch_grid(MODULE_SITES, LAYERS)
    ((bundle,),) = bundled(grid.model, grid.inputs, variants, 8)
    assert bundle.begin == 8 and bundle.variants is variants


def test_bundles_do_not_part_an_image_that_sees_itself(grids):
    """In Gemma the first token of an image sees its last."""
    grid = grids("gemma3")
    variants, _ = patch_grid(MODULE_SITES, LAYERS, tokens=each_token(grid.real))
    image = grid.masks["image"]
    inside = image[:, 1:] & image[:, :-1]
    assert all(begin == 0 or not inside[:, begin - 1].any() for begin in begins(grid, variants))


def test_a_grid_over_every_token_costs_little_more_than_half(grids):
    """Of one in which every variant carries all tokens."""
    grid = grids("llava")
    read = Logits.of(grid.inputs)
    every, _ = patch_grid(MODULE_SITES, LAYERS, tokens=each_token(grid.real))
    together, _ = patch_grid(MODULE_SITES, LAYERS, tokens=[grid.real] * len(each_token(grid.real)))
    costs = [
        estimate(grid.model, grid.inputs, variants, read, base=grid.noise, clean=()) for variants in (every, together)
    ]
    assert 0.5 < costs[0].flops / costs[1].flops < 0.68
    assert costs[0].bytes < 0.68 * costs[1].bytes


def test_no_more_sweeps_than_variants(grids, monkeypatch):
    """Where not even one variant's state fits."""
    grid = grids("qwen3_vl")
    variants, _ = patch_grid(MODULE_SITES, LAYERS)
    monkeypatch.setattr(bundles, "LIVE_BYTES", 4 * WIDTH)
    assert len(bundled(grid.model, grid.inputs, variants, 0)) == len(variants)


def test_few_variants_make_one_program(grids):
    """However late they act: another bundle is another program."""
    grid = grids("qwen3_vl")
    variants, _ = patch_grid(MODULE_SITES[:1], LAYERS, tokens=grid.tokens(3)[-2:])
    assert begins(grid, variants) == [0]
