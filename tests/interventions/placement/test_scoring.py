"""Scores against jax.grad of the whole model, PyTorch hooks, exact patching and one forward pass per cut.

The oracle of gradients differentiates ``model(inputs).logits`` by every weight; the scores never do.
"""

import dataclasses
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_oracle import make_batch, part_masks, tensors, text_layers, tiny_config, tiny_model
from kind_cases import LAYERS, TEXT, rows_of
from scipy.stats import spearmanr

import vlm_jax
from interventions import Add, Gate, Gold, causal_trace
from interventions.kinds.layers import slots
from interventions.modules import module_names
from interventions.placement import scores as scoring
from interventions.placement.adapters import init_lora
from interventions.trace.options import TraceOptions
from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.data import load_task
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch, batches
from vlm_jax.sites import TEXT_LINEARS

pytestmark = pytest.mark.usefixtures("quick_programs")

FAMILIES = ("qwen3_vl", "gemma3")
CASES = ("qwen3_vl", pytest.param("gemma3", marks=pytest.mark.slow))
EXACT, CAUGHT = 1e-4, 1e-2
SITES = {module: [f"text.{name}" for name in names] for module, names in TEXT_LINEARS.items()}
TEXT_ROWS = [[9, 6, 3], [5, 5, 2], [12, 4, 2]]
#: Two batches of one shape; the second is filled up with a repeated row.
GROUPS = (([0, 1], [0, 1]), ([2], [2, 2]))


class Case:
    """A tiny random model of a family, and three prompts of two, one and two gold tokens and the end of a turn."""

    def __init__(self, family, folder):
        config = tiny_config(family, text={"num_hidden_layers": LAYERS} | TEXT.get(family, {}))
        self.oracle = tiny_model(config)
        self.oracle.save_pretrained(folder)
        self.model, _ = vlm_jax.load(folder)
        rows = TEXT_ROWS if family == "gemma3" else rows_of(family)  # without a vision tower it compiles faster
        self.batch = make_batch(rows, "right", 0, config)
        masks = part_masks(config, rows, "right")
        end = masks["answer"] & ~np.roll(masks["answer"], -1, 1)
        self.spans = {**masks, "answer": masks["answer"] & ~end, "end": end}
        self.inputs = vlm_jax.Inputs.from_hf(self.model.config, **self.batch)
        self.groups = [(rows, self.take(filled)) for rows, filled in GROUPS]

    def take(self, rows):
        return Batch(self.inputs.take(rows, 4), {name: span[rows] for name, span in self.spans.items()}, 2)

    @property
    def trained(self):
        return self.spans["answer"] | self.spans["end"]

    def gradient(self, where):
        """dW of minus the log-probabilities of the tokens ``where (B, T)``: site -> ``(L, in, out)``."""
        found = named_leaves(_gradient(self.model, self.inputs, jnp.asarray(where)))
        sites = {site: site.replace("text.", "text.layers.") + ".kernel" for names in SITES.values() for site in names}
        return {site: np.asarray(found[name], np.float64) for site, name in sites.items()}


@jax.jit
@jax.grad
def _gradient(model, inputs, where):
    logp = jax.nn.log_softmax(model(inputs).logits[:, :-1].astype(jnp.float32))
    own = jnp.take_along_axis(logp, inputs.input_ids[:, 1:, None], -1)[..., 0]
    return -jnp.sum(own * where[:, 1:])


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    known = {}

    def get(family):
        if family not in known:
            known[family] = Case(family, tmp_path_factory.mktemp(family))
        return known[family]

    return get


def energy(gradients):
    """``(L, 2)``: squared norms of site -> ``(L, n, m)``."""
    return np.stack([sum((gradients[s] ** 2).sum((1, 2)) for s in names) for names in SITES.values()], -1)


def error(found, expected):
    assert found.shape == expected.shape == (LAYERS, 2)
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


def each_row(mask):
    """The mask with one row at a time."""
    return [mask * (np.arange(len(mask)) == row)[:, None] for row in range(len(mask))]


# Gradients


@pytest.mark.parametrize("family", CASES)
def test_gradient_norm(cases, family):
    case = cases(family)
    found = scoring.gradient_norm(case.model, case.groups)
    expected = energy(case.gradient(case.trained)) / case.trained.sum() ** 2
    assert error(found, expected) < EXACT
    if family == "gemma3":  # some layers at a time: the same number
        assert error(scoring.gradient_norm(case.model, case.groups, layers=3), expected) < EXACT
    # The controls: the gold answer alone; samples apart; the repeated row counted; attention for MLP.
    repeated = [case.groups[0], ([0, 1], case.groups[1][1])]
    for wrong in (
        energy(case.gradient(case.spans["answer"])) / case.spans["answer"].sum() ** 2,
        sum(energy(case.gradient(one)) for one in each_row(case.trained)) / case.trained.sum() ** 2,
        scoring.gradient_norm(case.model, repeated),
        expected[:, ::-1],
    ):
        assert error(wrong, expected) > CAUGHT


@pytest.mark.parametrize("family", CASES)
def test_fisher(cases, family):
    case = cases(family)
    found = scoring.fisher(case.model, case.groups)
    rows = [energy(case.gradient(one)) for one in each_row(case.spans["answer"])]
    expected = np.mean(rows, 0)
    assert error(found, expected) < EXACT
    mixed = energy(case.gradient(case.spans["answer"])) / len(rows)
    ended = np.mean([energy(case.gradient(one)) for one in each_row(case.trained)], 0)
    repeated = np.mean([*rows, rows[-1]], 0)
    for wrong in (mixed, ended, repeated, expected[::-1]):
        assert error(wrong, expected) > CAUGHT


@pytest.mark.parametrize("inputs, outputs", [(5, 7), (60, 70)], ids=["the weight's", "tokens by tokens"])
def test_norm_of_a_weights_gradient(inputs, outputs):
    """Either way of working it out."""
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((3, 11, n)).astype(np.float32) for n in (inputs, outputs))
    expected = [np.sum((a.T.astype(float) @ b) ** 2) for a, b in zip(x, g, strict=True)]
    np.testing.assert_allclose(scoring._weight_norm(x, g), expected, rtol=1e-5)


def test_a_gauge_changes_nothing(cases):
    """Neither the logits nor the gradients that pass it."""
    case = cases("qwen3_vl")
    zeros = {site: jnp.zeros((LAYERS, len(case.inputs.input_ids))) for names in SITES.values() for site in names}

    @jax.jit
    @jax.value_and_grad
    def loss(x, gauges):
        return jnp.sum(jnp.sin(case.model(case.inputs, (Add(x), *gauges)).logits))

    x = jnp.zeros((*case.inputs.input_ids.shape, 64))
    (plain, slope), (gauged, gauged_slope) = loss(x, ()), loss(x, (scoring.Gauge(zeros),))
    np.testing.assert_allclose(gauged, plain, rtol=1e-6)
    np.testing.assert_allclose(gauged_slope, slope, rtol=1e-4, atol=1e-4 * float(jnp.abs(slope).max()))


@pytest.mark.slow
def test_no_gradient_of_all_weights_is_held():
    """Memory that the compiled programs take beside their arguments, of a model of 102 MiB in 8 layers."""
    config = vlm_jax.load("mini-qwen3-vl")[0].backbone().config
    text = dataclasses.replace(config.text, hidden_size=512, intermediate_size=2048, vocab_size=320)
    config = dataclasses.replace(config, text=text)
    model = jax.eval_shape(lambda: vlm_jax.Model(config, jax.random.key(0)))
    inputs = vlm_jax.Inputs.from_hf(config, input_ids=np.ones((2, 48), np.int32))
    gold = Gold.of(inputs, np.arange(48) > [[45], [44]])
    layer = int(4 * scoring.weights(model)[0].sum())

    def memory(program, *args, **how):
        return program.lower(*args, **how).compile().memory_analysis().temp_size_in_bytes / layer

    def total(layers):
        return {s: jnp.zeros((layers, *kernel.shape[1:])) for s, kernel in scoring._kernels(model.text.layers).items()}

    assert memory(scoring._fisher, model, inputs, gold) < 2
    assert memory(scoring._add_kernel_gradients, total(1), model, inputs, gold, low=3, high=4) < 4
    assert memory(scoring._add_kernel_gradients, total(8), model, inputs, gold, low=0, high=8) > 8  # the control


# Adapters


def adapter(model, seed=0, spread=0.0):
    """LoRA on all modules; B is as PEFT begins with it, zero, or random."""
    lora = init_lora(model, module_names(LAYERS), r=3, alpha=5, dropout=0.1, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    weights = {s: (a, b + spread * rng.standard_normal(b.shape, np.float32)) for s, (a, b) in lora.weights.items()}
    return lora.replace(weights=weights)


@pytest.mark.parametrize("family", CASES)
def test_page(cases, family):
    case = cases(family)
    lora, gradient = adapter(case.model), case.gradient(case.trained)
    found = scoring.page(case.model, case.groups, lora)

    def oracle(scale):
        by_b = {s: scale * np.einsum("lir,lio->lro", a, gradient[s]) for s, (a, _) in lora.weights.items()}
        return energy(by_b) / case.trained.sum() ** 2

    assert error(found, oracle(5 / 3)) < EXACT
    assert error(oracle(1), oracle(5 / 3)) > CAUGHT
    assert error(scoring.page(case.model, case.groups, adapter(case.model, seed=1)), found) > CAUGHT


def test_page_is_a_weighted_gradient_norm_on_average(cases):
    """Over draws of A, as its docstring says."""
    case = cases("qwen3_vl")
    gradient = case.gradient(case.trained)["text.mlp.down_proj"][1]
    draws = [adapter(case.model, seed).weights["text.mlp.down_proj"][0][1] for seed in range(60)]
    mean = np.mean([np.sum((np.asarray(a).T @ gradient) ** 2) for a in draws])
    assert mean == pytest.approx(3 / (3 * len(gradient)) * np.sum(gradient**2), rel=0.1)


@pytest.mark.parametrize("family", CASES)
def test_lora_drop(cases, family):
    """The adapter merged into transformers' own weights, and what its linears read, by hooks."""
    case = cases(family)
    lora = adapter(case.model, spread=0.3)
    found = scoring.lora_drop(case.model, case.groups, lora)
    real, total = case.batch["attention_mask"] == 1, np.zeros((LAYERS, 2))
    changed = {}
    with ExitStack() as stack, torch.no_grad():
        for layer, module in enumerate(text_layers(case.oracle)):
            for column, names in enumerate(TEXT_LINEARS.values()):
                for name in names:
                    linear = module.get_submodule(name)
                    a, b = lora.weights[f"text.{name}"]
                    delta = float(lora.scale) * torch.from_numpy(np.asarray(a[layer] @ b[layer]).T.copy())

                    def hook(_, args, delta=delta, at=(layer, column)):
                        total[at] += float(((args[0] @ delta.T)[torch.from_numpy(real)] ** 2).sum())

                    changed[linear] = linear.weight.clone()
                    linear.weight += delta
                    stack.callback(linear.register_forward_pre_hook(hook).remove)
        case.oracle(**tensors(case.batch), use_cache=False)
        for linear, weight in changed.items():
            linear.weight.copy_(weight)
    expected = total / real.sum()
    assert error(found, expected) < EXACT
    # An adapter that is heard but does not act is not what was trained.
    assert error(scoring.lora_drop(case.model, case.groups, lora.replace(scale=lora.scale / 2)), expected / 4) > CAUGHT


def test_adapters_that_cannot_be_scored(cases):
    case = cases("qwen3_vl")
    some = init_lora(case.model, ["L1-attn", "L2-mlp"], r=2, alpha=1, dropout=0, key=jax.random.key(0))
    for score in (scoring.page, scoring.lora_drop):
        with pytest.raises(UserError, match="leaves modules out"):
            score(case.model, case.groups, some)
    with pytest.raises(UserError, match="B of this one is not zero"):
        scoring.page(case.model, case.groups, adapter(case.model, spread=0.1))


def test_sizes(cases):
    """Of the tiny Qwen3-VL: width 64, 4 heads and 2 key-value heads of 32, 96 inside the MLP."""
    case = cases("qwen3_vl")
    attention = [(64, 128), (64, 64), (64, 64), (128, 64)]
    mlp = [(64, 96), (64, 96), (96, 64)]
    sizes = [sum(n + m for n, m in shapes) for shapes in (attention, mlp)]
    assert scoring.module_sizes(case.model).tolist() == [sizes] * LAYERS
    assert scoring.weights(case.model).tolist() == [[sum(n * m for n, m in s) for s in (attention, mlp)]] * LAYERS


# Attribution patching


@pytest.mark.parametrize("family", CASES)
def test_attribution(cases, family):
    """Against jax.grad by zeros that are added to the modules' outputs in the corrupted run."""
    case, sites = cases(family), ("text.attn_out", "text.mlp_out")
    noise = 0.3 * np.random.default_rng(3).standard_normal((*case.inputs.input_ids.shape, 64), np.float32)
    corrupt = (Add(noise * case.spans["question"][..., None]),)
    found = scoring.attribute(case.model, case.inputs, case.trained, corrupt)

    @jax.jit
    def run(zeros, corrupt):
        added = tuple(Add(value, site, slots(LAYERS, None)) for site, value in zeros.items())
        out = case.model(case.inputs, (*corrupt, *added), sites)
        logp = jax.nn.log_softmax(out.logits[:, :-1])
        own = jnp.take_along_axis(logp, jnp.asarray(case.inputs.input_ids)[:, 1:, None], -1)[..., 0]
        where = case.trained[:, 1:]
        p = jnp.exp(jnp.sum(own * where, 1) / where.sum(1))
        return p.sum(), (p, out.taps)

    zeros = dict.fromkeys(sites, jnp.zeros((LAYERS, *case.inputs.input_ids.shape, 64)))
    none = (Add(jnp.zeros_like(noise)),)
    (_, (p_clean, clean)), at_clean = jax.value_and_grad(run, has_aux=True)(zeros, none)
    (_, (p_corrupt, bad)), at_corrupt = jax.value_and_grad(run, has_aux=True)(zeros, corrupt)
    np.testing.assert_allclose(found.p_clean, p_clean, rtol=EXACT)
    np.testing.assert_allclose(found.p_corrupt, p_corrupt, rtol=EXACT)

    def ie(gradient, sites=sites):
        return np.stack([((clean[s] - bad[s]) * gradient[s]).sum((2, 3)).T for s in sites], -1)

    size = np.abs(ie(at_corrupt)).max()
    np.testing.assert_allclose(found.ie, ie(at_corrupt), atol=EXACT * size)
    for wrong in (ie(at_clean), -ie(at_corrupt), ie(at_corrupt, sites[::-1])):
        assert np.abs(wrong - ie(at_corrupt)).max() > CAUGHT * size


# On a model that knows something


@pytest.fixture(scope="module")
def mini():
    model, processor = vlm_jax.load("mini-qwen3-vl")
    examples = load_task("knowledge", split="trace", limit=96)
    groups = list(batches(examples, processor, model.config, 12))
    shape = groups[0][1].inputs.input_ids.shape
    return model, processor, examples, [g for g in groups if g[1].inputs.input_ids.shape == shape]


@pytest.mark.slow
def test_attribution_is_first_order(mini):
    """The error of the estimate falls in proportion to the noise. On all of P0's noise the probability is far from
    linear in any sample, but modules rank nearly as they do by exact patching."""
    model, processor, examples, groups = mini
    rows, batch = groups[0]
    corrupt = scoring.corrupter(model, processor, examples, groups, TraceOptions())(rows, batch)
    question, answer, errors = batch.spans["question"], batch.spans["answer"], []
    for scale in (1, 0.03, 0.01, 0.003):
        noise = scale * corrupt[0].value
        exact = np.asarray(causal_trace(model, batch.inputs, question, answer, noise=noise).ie)
        found = np.asarray(scoring.attribute(model, batch.inputs, answer, (Add(noise),)).ie)
        errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
        if scale == 1:
            whole = scoring.attribution(model, groups[:1], lambda rows, batch: corrupt)
            np.testing.assert_allclose(whole, found[: len(rows)].mean(0), rtol=1e-5)
            assert spearmanr(found.mean(0).ravel(), exact.mean(0).ravel()).statistic > 0.9
    assert errors[0] > 0.5 and errors[1] > 3 * errors[2] and errors[2] > 2 * errors[3] and errors[3] < 0.03, errors


def test_corruption_is_the_traces(mini):
    """A sample's noise is the same in another batch, and is noise on the question alone."""
    model, processor, examples, groups = mini
    corrupt = scoring.corrupter(model, processor, examples, groups, TraceOptions())
    rows, batch = groups[0]
    noise = np.asarray(corrupt(rows, batch)[0].value)
    turned = Batch(batch.inputs.take([2, 1], 2), {name: span[[2, 1]] for name, span in batch.spans.items()}, 1)
    np.testing.assert_allclose(corrupt([rows[2], rows[1]], turned)[0].value, noise[[2, 1]], rtol=1e-6, atol=1e-6)
    assert (np.abs(noise).max(-1) > 0).tolist() == batch.spans["question"].tolist()
    other = scoring.corrupter(model, processor, examples, groups, TraceOptions(seed=1))(rows, batch)[0].value
    assert not np.allclose(other, noise)


@pytest.mark.slow
def test_talo_is_minus_the_gain_of_each_cut(mini):
    model, _, _, groups = mini
    found = scoring.talo(model, groups)
    forward = jax.jit(lambda model, inputs, cut: jnp.argmax(model(inputs, (cut,)).logits, -1))

    def accuracy(cut):
        right = []
        for rows, batch in groups:
            said, where = np.asarray(forward(model, batch.inputs, cut)), batch.spans["answer"] | batch.spans["end"]
            wrong = (said[:, :-1] != batch.inputs.input_ids[:, 1:]) & where[:, 1:]
            right += (~wrong.any(1))[: len(rows)].tolist()
        return np.mean(right)

    both = Gate({f"text.{module}_out": np.ones(8, np.float32) for module in ("attn", "mlp")})
    base = accuracy(both)
    expected = np.zeros((8, 2))
    for layer in range(8):
        for column, module in enumerate(("attn", "mlp")):
            cut = Gate({site: scale.copy() for site, scale in both.scale.items()})
            cut.scale[f"text.{module}_out"][layer] = 0
            expected[layer, column] = base - accuracy(cut)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert 0 < base < 1 and expected.max() > 0.1 and len(np.unique(expected)) > 3  # there is something to see
