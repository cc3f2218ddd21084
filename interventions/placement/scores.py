"""Scores of modules from gradients or activations. LoRA can be placed by them instead of by P0's trace.

Every score is ``(L, 2)`` float64; the last axis is attention (q, k, v, o) and MLP (gate, up, down). A higher score is
a more important module. The decorator :func:`score` registers a score, with what it needs besides the model and the
samples. ``groups`` is ``list(vlm_jax.prompts.batches(...))``: row numbers and their encoded batch. A short batch
repeats its last row, and the repeats do not count. The gold answers are teacher-forced.

The gradients of all weights would need as much memory as the model. So a gradient is measured while the backward pass
is in its layer (:class:`Gauge`), or the gradients of only some layers are kept at a time.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from interventions.engine.grids import cut_grid
from interventions.engine.read import Gold, Scores
from interventions.engine.sweep import sweep_runs
from interventions.kinds.lora import LoRA
from interventions.modules import MODULES, module_names, tower_names
from interventions.placement.adapters import adapter_parameters
from interventions.trace.corruption import Corrupter, survey
from interventions.trace.options import TraceOptions
from vlm_jax import Inputs, Model, UserError
from vlm_jax.checkpoints.leaves import leaf_name
from vlm_jax.data import Example
from vlm_jax.nn.decoder import Decoder, Layer, Window
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.sites import NO_TAPS, TEXT_LINEARS, Context, Intervention, Probe
from vlm_jax.typing import Array, ArrayLike

#: Bytes of the gradients that :func:`gradient_norm` keeps at a time. The gradients of one batch come on top.
GRADIENT_BYTES = 2**32
Groups = Sequence[tuple[Sequence[int], Batch]]
#: ``(rows, batch) -> interventions`` that corrupt the batch.
Corrupt = Callable[[Sequence[int], Batch], tuple]

#: A score of every module, attention and MLP.
ModuleScores = Float64[np.ndarray, "layers 2"]

Need = Literal["corruption", "fresh adapter", "trained adapter"]


class ModuleScore(NamedTuple):
    """A score of modules: ``compute(model, groups, *needed) -> (L, 2)``.

    needs: the arguments after the model and the samples. "corruption": a function that corrupts a batch as the trace
    does (:func:`corrupter`). "fresh adapter", "trained adapter": a LoRA on all modules, untrained or trained.
    """

    compute: Callable[..., np.ndarray]
    needs: tuple[Need, ...] = ()


#: All scores that placements can read, by name; restoration rates ("rr") come from a trace instead.
SCORES: dict[str, ModuleScore] = {}


def score(name: str, *needs: Need) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Registers a function as the score ``name``, with what it needs (:class:`ModuleScore`)."""

    def register(compute: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        assert name not in SCORES, f"there is a score {name!r} already"
        SCORES[name] = ModuleScore(compute, needs)
        return compute

    return register


_OUTPUTS = {module: f"text.{module}_out" for module in MODULES}
_LINEARS = {module: [f"text.{name}" for name in TEXT_LINEARS[module]] for module in MODULES}


def module_sizes(model: Model, tower: bool = False) -> Int[np.ndarray, "layers 2"]:
    """LoRA parameters of every module, of the decoder or of the vision tower, at rank 1: inputs plus outputs of its
    linears."""
    names = tower_names(model.depths["visual"]) if tower else module_names(model.depths["text"])
    return np.array([adapter_parameters(model, [name], 1) for name in names]).reshape(-1, 2)


def weights(model: Model) -> Int[np.ndarray, "layers 2"]:
    """The number of weights of every module's linears, without biases. A score divided by it is a score per
    parameter."""
    kernels = {name: kernel.size // len(kernel) for name, kernel in _kernels(model.text.layers).items()}
    row = [sum(kernels[site] for site in _LINEARS[module]) for module in MODULES]
    return np.tile(row, (model.config.text.num_hidden_layers, 1))


@score("gradient_norm")
def gradient_norm(model: Model, groups: Groups, *, layers: int | None = None) -> ModuleScores:
    """``sum ||dL/dW||_F^2`` over a module's linears W. L is the training loss: the mean cross-entropy of all gold
    tokens and ends of turns.

    The gradient is summed over all samples before it is squared, so the result does not depend on the batches.

    Args:
        layers: the number of layers whose gradients are kept at a time. Each such group of layers needs one pass over
            the samples. None: as many as fit into ``GRADIENT_BYTES``.
    """
    depth = model.config.text.num_hidden_layers
    if layers is None:
        layers = max(1, GRADIENT_BYTES // int(4 * weights(model)[0].sum()))
    rows = []
    for low in range(0, depth, layers):
        high = min(low + layers, depth)
        kernels = _kernels(model.text.layers)
        total = {site: jnp.zeros((high - low, *kernel.shape[1:])) for site, kernel in kernels.items()}
        for batch, gold in _golds(groups, f"gradient norm, layers {low} to {high - 1}"):
            total = _add_kernel_gradients(total, model, batch.inputs, gold, low=low, high=high)
        rows.append(_by_module({name: _square(gradient) for name, gradient in total.items()}))
    return np.concatenate(rows) / _tokens(groups) ** 2


@score("fisher")
def fisher(model: Model, groups: Groups) -> ModuleScores:
    """The trace of the empirical Fisher information: the mean over samples of ``||d log p(gold) / dW||_F^2``, summed
    over a module's linears W.

    ``log p(gold)`` is the sum over the gold answer's tokens (P0's T), without the end of the turn.
    """

    def each(rows, batch: Batch) -> jax.Array:
        return _fisher(model, batch.inputs, Gold.of(batch.inputs, batch.spans["answer"]))

    return _mean(groups, "Fisher", each)


def corrupter(
    model: Model, processor: Processor, examples: Sequence[Example], groups: Groups, options: TraceOptions
) -> Corrupt:
    """The corruption that a causal trace of the examples with these options uses in its first replicate: each sample
    gets the same noise, and sigma_E is the same."""
    return Corrupter(model, processor, examples, survey(model, groups), options)


class Attribution(NamedTuple):
    """For each sample: p(gold) of the clean and the corrupted run, and an estimate of a causal trace's ``ie``."""

    p_clean: Float[Array, "batch"]
    p_corrupt: Float[Array, "batch"]
    ie: Float[Array, "batch layers 2"]


@score("attribution", "corruption")
def attribution(model: Model, groups: Groups, corrupt: Corrupt) -> ModuleScores:
    """Attribution patching (Nanda 2023): the mean over samples of a first-order estimate of P0's indirect effect.

    It needs two forward passes and one backward pass for all modules together. The indirect effect is the numerator
    of RR.

    Args:
        corrupt: :func:`corrupter`, or another function ``(rows, batch) -> interventions`` that corrupts a batch.
    """

    def each(rows, batch: Batch) -> jax.Array:
        return attribute(model, batch.inputs, batch.spans["answer"], corrupt(rows, batch)).ie

    return _mean(groups, "attribution", each)


def attribute(
    model: Model, inputs: Inputs, answer_mask: Bool[ArrayLike, "batch tokens"], corrupt: tuple
) -> Attribution:
    """``(a_clean - a_corrupt) . dp/da`` in the corrupted run, summed over all tokens. Here a is a module's output and p
    the geometric mean of the gold tokens' probabilities (P0, equation 1).

    Args:
        answer_mask: the gold tokens.
    """
    return _attribute(model, inputs, Gold.of(inputs, answer_mask), corrupt)


@score("page", "fresh adapter")
def page(model: Model, groups: Groups, lora: LoRA) -> ModuleScores:
    """PAGE-style energy of a fresh adapter's gradient, ``||dL/dB||_F^2`` summed over a module's linears.

    At initialisation B = 0, so A has no gradient and ``dL/dB = scale * A^T dL/dW``, with A in the orientation of
    ``x @ A``. Its expectation over draws of A is ``scale^2 r / (3 in) ||dL/dW||^2``. L is the loss of
    :func:`gradient_norm`. The idea is from arXiv 2605.06183; this formula was derived here and is not taken from there.

    Args:
        lora: an adapter on all modules, from :func:`interventions.placement.adapters.init_lora`.

    Raises:
        UserError: if the adapter is not on all modules, or its B is not zero.
    """
    _check_everywhere(model, lora)
    if any(np.any(b) for _, b in lora.weights.values()):
        raise UserError("page needs a fresh adapter, but B of this one is not zero: make one with init_lora")
    lora = lora.replace(dropout=0.0, key=None)
    total = {site: jnp.zeros(b.shape, jnp.float32) for site, (_, b) in lora.weights.items()}
    for batch, gold in _golds(groups, "PAGE"):
        total = _add_adapter_gradients(total, model, batch.inputs, gold, lora)
    return _by_module({site: _square(gradient) for site, gradient in total.items()}) / _tokens(groups) ** 2


@score("lora_drop", "trained adapter")
def lora_drop(model: Model, groups: Groups, lora: LoRA) -> ModuleScores:
    """The size of a trained adapter's outputs: the mean over real tokens of ``||scale * B A x||^2``, summed over a
    module's linears (after LoRA-drop, arXiv 2402.07721; the square and the mean over tokens are our interpretation).

    Args:
        lora: a trained adapter on all modules. x is the input of its linears in the adapted model.

    Raises:
        UserError: if the adapter is not on all modules.
    """
    _check_everywhere(model, lora)
    lora = lora.replace(dropout=0.0, key=None)
    total, count = np.zeros(()), 0
    for rows, batch in progress(groups, desc="LoRA-drop", unit="batch"):
        mask = np.array(batch.inputs.attention_mask)
        mask[len(rows) :] = False
        total, count = total + _by_module(_lora_outputs(model, batch.inputs, mask, lora)), count + mask.sum()
    return total / count


@score("talo")
def talo(model: Model, groups: Groups) -> ModuleScores:
    """The accuracy that is lost by cutting a module: minus P3's Delta of a task. Cutting MLPs is our extension.

    An answer is correct if every gold token and the end of the turn are the likeliest tokens, as in
    :mod:`interventions.talo`. With few samples many modules have the same score.
    """
    cuts = cut_grid(model.config.text.num_hidden_layers)

    def each(rows, batch: Batch) -> jax.Array:
        gold = Gold.of(batch.inputs, batch.spans["answer"] | batch.spans["end"])
        runs = sweep_runs(model, batch.inputs, cuts, gold)
        lost = runs.base.correct.astype(int) - runs.variants.correct.astype(int)  # (2 L, B)
        return lost.reshape(2, -1, lost.shape[-1]).transpose(2, 1, 0)

    return _mean(groups, "TaLo", each)


@flax.struct.dataclass
class Gauge(Intervention):
    """An intervention that changes no value and measures gradients.

    Its "gradient" with respect to ``zeros[site] (L, B)`` is one number for every layer and sample. The backward pass
    computes it from the true gradient ``g (B, T, D)`` at the site:

    * without ``clean``, at a linear: ``||x^T g||_F^2``, the squared norm of its weight's gradient for one sample;
    * with ``clean[site] (L, B, T, D)``: ``(clean - value) . g``, the first-order effect of the clean value.
    """

    zeros: dict[str, Float[ArrayLike, "layers batch"]]
    clean: dict[str, Float[ArrayLike, "layers batch tokens width"]] | None = None

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.zeros)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        zeros = self.zeros[site][ctx.layer]
        if self.clean is None:
            return _gauged(_weight_norm, value, jax.lax.stop_gradient(ctx.input), zeros)
        return _gauged(_inner, value, jax.lax.stop_gradient(self.clean[site][ctx.layer] - value), zeros)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gauged(measure, value, beside, zeros):
    return value


def _gauged_forward(measure, value, beside, zeros):
    return value, beside


def _gauged_backward(measure, beside, g):
    return g, jnp.zeros_like(beside), measure(beside.astype(jnp.float32), g.astype(jnp.float32))


_gauged.defvjp(_gauged_forward, _gauged_backward)


def _weight_norm(
    x: Float[ArrayLike, "batch tokens inputs"], g: Float[ArrayLike, "batch tokens outputs"]
) -> Float[Array, "batch"]:
    """``||x_b^T g_b||_F^2`` for every sample b, computed from the smaller of two matrices: tokens by tokens, or
    the weight's gradient of one sample at a time."""
    inputs, outputs, tokens = x.shape[-1], g.shape[-1], x.shape[1]
    if tokens * (inputs + outputs) < inputs * outputs:
        return jnp.sum((x @ x.mT) * (g @ g.mT), (1, 2))
    return jax.lax.map(lambda pair: jnp.sum((pair[0].T @ pair[1]) ** 2), (x, g))


def _inner(difference: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.sum(difference * g, range(1, g.ndim))


class _Listener(Intervention):
    """A LoRA that records the squared norms of its outputs over the tokens of ``mask (B, T)``, for one layer."""

    def __init__(self, lora: LoRA, mask: jax.Array):
        self.lora, self.mask, self.sites = lora, mask, lora.sites
        self.norms: dict[str, jax.Array] = {}

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        changed = self.lora(site, value, ctx)
        added = (changed - value).astype(jnp.float32)
        self.norms[site] = jnp.sum(added**2 * self.mask[..., None])
        return changed


def _through(
    text: Decoder,
    span: tuple[int, int],
    x: Float[ArrayLike, "batch tokens width"],
    window: Window,
    deepstack: Float[ArrayLike, "levels batch tokens width"] | None,
    layers: Layer | None = None,
    listener: Callable[[], tuple["_Listener", ...]] = tuple,
) -> tuple[Float[Array, "batch tokens width"], list[dict[str, jax.Array]]]:
    """``x`` after the layers of a span, and the norms that each layer's listener recorded. A backward pass recomputes
    the layers.

    Args:
        layers: stacked copies of these layers, if the result is to be differentiated by them. None: the model's layers,
            read one at a time, because a slice of their stack would be a copy.
    """

    def body(x, scanned):
        layer, index = scanned
        layer = jax.tree.map(lambda a: a[index], text.layers) if layer is None else layer
        listeners = listener()
        probe = Probe(listeners, NO_TAPS, Context(index))
        x, _ = layer(x, text.at(window, index), (), text.deepstack_at(deepstack, index), probe)
        return x, [one.norms for one in listeners]

    return jax.lax.scan(jax.checkpoint(body), x, (layers, jnp.arange(*span)))


def _scores(model: Model, inputs: Inputs, gold: Gold, interventions: tuple) -> Scores:
    """The gold tokens' scores. A backward pass keeps only the residual stream and recomputes each layer."""
    x, _ = model.hidden(inputs, interventions, remat=True)
    return gold(model, model.text.norm(x), 0)


def _zeros(model: Model, inputs: Inputs, sites) -> dict[str, jax.Array]:
    shape = model.config.text.num_hidden_layers, len(inputs.input_ids)
    return {site: jnp.zeros(shape) for site in sites}


@jax.jit
def _fisher(model: Model, inputs: Inputs, gold: Gold) -> jax.Array:
    def logp(zeros):
        return jnp.sum(_scores(model, inputs, gold, (Gauge(zeros),)).logp)

    sites = [site for linears in _LINEARS.values() for site in linears]
    squares = jax.grad(logp)(_zeros(model, inputs, sites))
    return jnp.stack([sum(squares[site] for site in _LINEARS[module]).T for module in MODULES], -1)


@jax.jit
def _attribute(model: Model, inputs: Inputs, gold: Gold, corrupt: tuple) -> Attribution:
    outputs = _OUTPUTS.values()
    clean = model(inputs, (), [*outputs, "text.norm"]).taps
    p_clean = gold(model, clean.pop("text.norm"), 0).probability

    def probability(zeros):
        p = _scores(model, inputs, gold, (*corrupt, Gauge(zeros, clean))).probability
        return jnp.sum(p), p

    effects, p_corrupt = jax.grad(probability, has_aux=True)(_zeros(model, inputs, outputs))
    return Attribution(p_clean, p_corrupt, jnp.stack([effects[site].T for site in outputs], -1))


@functools.partial(jax.jit, static_argnames=("low", "high"), donate_argnums=0)
def _add_kernel_gradients(total: dict, model: Model, inputs: Inputs, gold: Gold, *, low: int, high: int) -> dict:
    """``total`` plus the gradients of the gold tokens' summed cross-entropy with respect to the kernels of layers low
    to high."""
    text, window = model.text, model.window(inputs)
    (x, deepstack), _ = model.embed(inputs)
    x, _ = _through(text, (0, low), x, window, deepstack)

    def loss(layers):
        y, _ = _through(text, (low, high), x, window, deepstack, layers)
        y, _ = _through(text, (high, model.config.text.num_hidden_layers), y, window, deepstack)
        return -jnp.sum(gold(model, text.norm(y), 0).logp)

    # As precise as the activations: a gradient has the precision of what it is a gradient of.
    gradients = _kernels(jax.grad(loss)(jax.tree.map(lambda a: a[low:high].astype(text.dtype), text.layers)))
    return {name: total[name] + gradients[name] for name in total}


@functools.partial(jax.jit, donate_argnums=0)
def _add_adapter_gradients(total: dict, model: Model, inputs: Inputs, gold: Gold, lora: LoRA) -> dict:
    def loss(b):
        adapter = lora.replace(weights={site: (a, b[site]) for site, (a, _) in lora.weights.items()})
        return -jnp.sum(_scores(model, inputs, gold, (adapter,)).logp)

    gradients = jax.grad(loss)({site: b for site, (_, b) in lora.weights.items()})
    return {site: total[site] + gradients[site] for site in total}


@jax.jit
def _lora_outputs(model: Model, inputs: Inputs, mask, lora: LoRA) -> dict[str, jax.Array]:
    (x, deepstack), _ = model.embed(inputs)
    text, window = model.text, model.window(inputs)
    span = 0, model.config.text.num_hidden_layers
    _, (norms,) = _through(text, span, x, window, deepstack, listener=lambda: (_Listener(lora, mask),))
    return norms


def _kernels(layers) -> dict[str, jax.Array]:
    """The kernels of the linears in stacked layers, by site."""
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(layers)[0]}
    return {f"text.{name.removesuffix('.kernel')}": leaf for name, leaf in leaves.items() if name.endswith(".kernel")}


def _square(gradient: Float[Array, "layers inputs outputs"]) -> Float[Array, "layers"]:
    """``||.||_F^2`` of every layer's matrix."""
    return jnp.sum(gradient.astype(jnp.float32) ** 2, (1, 2))


def _by_module(linears: dict[str, jax.Array]) -> ModuleScores:
    """Sums the linears' numbers, site -> ``(L,)``, by module."""
    return np.stack([sum(fetch(linears[s]).astype(np.float64) for s in _LINEARS[module]) for module in MODULES], -1)


def _check_everywhere(model: Model, lora: LoRA) -> None:
    sites = {site for linears in _LINEARS.values() for site in linears}
    if lora.sites != sites or any((np.asarray(lora.slot[s]) >= len(lora.weights[s][0])).any() for s in sites):
        raise UserError("the adapter leaves modules out: score one that is placed on all of them (LLM-all)")


def _mean(groups: Groups, label: str, each: Callable[[Sequence[int], Batch], jax.Array]) -> ModuleScores:
    """The mean over samples of the values ``(B, L, 2)`` that ``each`` computes for a batch."""
    total, count = np.zeros(()), 0
    for rows, batch in progress(groups, desc=label, unit="batch"):
        values = fetch(each(rows, batch)).astype(np.float64)[: len(rows)]
        total, count = total + values.sum(0), count + len(rows)
    return total / count


def _golds(groups: Groups, label: str) -> Iterator[tuple[Batch, Gold]]:
    """Each batch with the tokens that training would score: gold tokens and ends of turns, but not those of repeats."""
    for rows, batch in progress(groups, desc=label, unit="batch"):
        gold = Gold.of(batch.inputs, batch.spans["answer"] | batch.spans["end"])
        real = np.arange(len(gold.valid)) < len(rows)
        yield batch, gold.replace(valid=gold.valid & real[:, None])


def _tokens(groups: Groups) -> int:
    """The number of gold tokens and ends of turns of all samples."""
    return sum(int((b.spans["answer"] | b.spans["end"])[: len(rows)].sum()) for rows, b in groups)
