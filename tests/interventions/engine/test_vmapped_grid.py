"""The whole layer x module grid as one ``jax.vmap`` over cells, written by hand: it compiles once and finds what the
sweep engine finds, which is one executable too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from interventions import Add, Gold, Patch, causal_trace
from interventions.engine.program import sweep_program
from interventions.modules import MODULE_SITES
from vlm_jax.data import load_task
from vlm_jax.prompts import encode

pytestmark = pytest.mark.usefixtures("quick_programs")

EXACT, CAUGHT = 1e-5, 1e-2


class Traced:
    """A tracing problem on the mini model, and the grid as one compiled call."""

    def __init__(self):
        self.model, processor = vlm_jax.load("mini-qwen3-vl")
        examples = load_task("perception", split="test", limit=3)[1:]  # two that the noise makes wrong
        batch = encode(examples, processor, self.model.config)
        self.inputs, self.question, self.answer = batch.inputs, batch.spans["question"], batch.spans["answer"]
        self.gold = Gold.of(self.inputs, self.answer)
        self.depth = self.model.config.text.num_hidden_layers
        self.traces = 0
        self.grid = jax.jit(self._grid)

    def noise(self, seed):
        shape = (*self.inputs.input_ids.shape, self.model.config.text.hidden_size)
        return np.random.default_rng(seed).standard_normal(shape, np.float32) * self.question[..., None]

    def _grid(self, model, inputs, gold, noise, layers, modules):
        """Restoration rates ``(layers, modules, B)``, effects and the corrupted run's probabilities ``(B,)``."""

        def p_gold(interventions):
            x, _ = model.hidden(inputs, interventions)
            return gold(model, model.text.norm(x), 0).probability

        donors = model(inputs, taps=MODULE_SITES).taps
        p_clean, p_corrupt = p_gold(()), p_gold((Add(noise),))

        def one_cell(layer, module):
            self.traces += 1
            in_layer = jnp.arange(self.depth) == layer
            slot = {site: jnp.where(in_layer & (module == m), layer, self.depth) for m, site in enumerate(MODULE_SITES)}
            return p_gold((Add(noise), Patch(donors, slot)))

        p_patch = jax.vmap(jax.vmap(one_cell, (None, 0)), (0, None))(layers, modules)
        te = p_clean - p_corrupt
        return (p_patch - p_corrupt) / (te + 1e-8), p_patch - p_corrupt, te

    def by_vmap(self, seed, layers, modules):
        arrays = self.grid(self.model, self.inputs, self.gold.replace(first=0), self.noise(seed), layers, modules)
        return [np.asarray(a) for a in arrays]

    def by_sweep(self, seed):
        return causal_trace(self.model, self.inputs, self.question, self.answer, noise=self.noise(seed))


@pytest.fixture(scope="module")
def traced():
    return Traced()


def test_vmapped_cells_are_the_sweeps(traced):
    rr, ie, te = traced.by_vmap(0, np.arange(traced.depth), np.arange(2))
    trace = traced.by_sweep(0)
    assert np.abs(te).min() > 0.5 and np.ptp(ie) > CAUGHT  # there is something to restore, and cells differ
    np.testing.assert_allclose(te, trace.te, atol=EXACT)
    np.testing.assert_allclose(ie.transpose(2, 0, 1), trace.ie, atol=EXACT)
    np.testing.assert_allclose(rr.transpose(2, 0, 1) * te[:, None, None], trace.rr * te[:, None, None], atol=EXACT)
    # The control: the same judge sees exchanged modules.
    assert np.abs(ie.transpose(2, 0, 1)[..., ::-1] - np.asarray(trace.ie)).max() > CAUGHT


def test_each_is_one_executable(traced):
    """For another noise and cells in another order, too."""
    layers, modules = np.arange(traced.depth), np.arange(2)
    before = sweep_program._cache_size()
    rr, _, _ = traced.by_vmap(1, layers, modules)
    turned, _, _ = traced.by_vmap(1, layers[::-1].copy(), modules[::-1].copy())
    np.testing.assert_allclose(turned[::-1, ::-1], rr, atol=1e-4)
    assert traced.traces == 1 and traced.grid._cache_size() == 1
    for seed in (1, 2):
        traced.by_sweep(seed)
    assert sweep_program._cache_size() <= before + 1  # 0 more where another test has traced these shapes
