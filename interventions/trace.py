"""P0: causal tracing of every layer's attention and MLP (section 2.2, equations 1-6).

python -m interventions.trace --task mini-okvqa --limit 64 --out runs/trace
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.stats import bootstrap
from tqdm import tqdm

from interventions.cost import Cost, Meter, estimate
from interventions.grids import patch_grid
from interventions.kinds import Add
from interventions.read import Gold
from interventions.sweep import PREFIX_BUCKET, sweep_runs
from vlm_jax import Inputs, Model
from vlm_jax.data import Example, load_task
from vlm_jax.errors import UserError, command
from vlm_jax.options import ModelOptions
from vlm_jax.prompts import Batch, batches, compiled_shapes
from vlm_jax.runs import Run

#: The last axis of ``ie`` and ``rr``.
MODULES = ("attn", "mlp")
_SITES = ("text.attn_out", "text.mlp_out")


class Trace(NamedTuple):
    """Per sample: ``p_clean, p_corrupt, te (B,)`` and ``ie, rr (B, L, 2)``, last axis attention, mlp."""

    p_clean: Any
    p_corrupt: Any
    te: Any
    ie: Any
    rr: Any


def causal_trace(
    model: Model,
    inputs: Inputs,
    question_mask,
    answer_mask,
    *,
    noise=None,
    noise_scale: float = 2.0,
    key: jax.Array | None = None,
    engine: Literal["sweep", "naive"] = "sweep",
    eps: float = 1e-8,
) -> Trace:
    """Restoration rate of every layer's attention and MLP output (P0, equations 1-6).

    The corrupted run adds noise to the embeddings of the question tokens; each cell patches one module's clean
    output, at all positions, into the corrupted run.

    Args:
        question_mask: ``(B, T)``, where the noise goes; answer_mask: ``(B, T)``, the gold tokens in ``inputs``.
        noise: ``(B, T, D)``, added as it is at question positions. Where None it is drawn with ``key`` from
            N(0, (noise_scale * sigma_E)^2), sigma_E the standard deviation of all embeddings of real tokens.
        engine: "sweep" shares prefix and depth; "naive" runs the whole model for every cell (the oracle).
        eps: of equation 4.

    Raises:
        UserError: if a row has no question or no gold token.
    """
    question, answer = np.asarray(question_mask, bool), np.asarray(answer_mask, bool)
    if not question.any(1).all():
        raise UserError(f"row {int(np.argmin(question.any(1)))} has no question token: mark at least one in its mask")
    gold = Gold.of(inputs, answer)
    if noise is None:
        embedded = _embed(model, inputs)
        sigma = embedding_std(embedded.x, inputs.attention_mask)
        key = jax.random.key(0) if key is None else key
        noise = noise_scale * sigma * jax.random.normal(key, embedded.x.shape)
    noise = jnp.where(question[..., None], noise, 0)
    variants, shape = patch_grid(_SITES, model.config.text.num_hidden_layers)
    runs = sweep_runs(model, inputs, variants, gold, base=(Add(noise),), clean=(), engine=engine)
    p_clean, p_corrupt = runs.clean.probability, runs.base.probability
    p_patch = runs.variants.probability.reshape(*shape, -1).transpose(2, 1, 0)
    te = p_clean - p_corrupt
    ie = p_patch - p_corrupt[:, None, None]
    return Trace(p_clean, p_corrupt, te, ie, ie / (te[:, None, None] + eps))


@jax.jit
def _embed(model: Model, inputs: Inputs):
    return model.embed(inputs)[0]


@jax.jit
def embedding_std(x: jax.Array, mask: jax.Array) -> jax.Array:
    """sigma_E: the standard deviation over all elements of ``x (B, T, D)`` at real tokens."""
    return jnp.std(x.astype(jnp.float32), where=jnp.broadcast_to(mask[..., None], x.shape))


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """How a task is traced."""

    noise_scale: float = 2.0
    """s of equation 5: noise has standard deviation s * sigma_E."""
    min_te: float = 0.01
    """Samples whose TE is below this do not enter RR_mean: the ratio would be noise over noise."""
    batch: int = 16
    """Samples per compiled call."""
    seed: int = 0
    """Seed of the noise; a sample's noise does not depend on the batch that it is in."""


class TaskTrace(NamedTuple):
    """A traced task: the :class:`Trace` of all samples as NumPy arrays, their ids, sigma_E, compiled shapes."""

    trace: Trace
    ids: list[str]
    sigma: float
    shapes: int


def trace_examples(model: Model, processor, examples: list[Example], options: TraceOptions, label: str) -> TaskTrace:
    """Traces every example. sigma_E is measured once, over all of them."""
    groups = list(batches(examples, processor, model.config, options.batch, align=PREFIX_BUCKET))
    square = total = count = 0.0
    for rows, batch in groups:
        x = np.asarray(_embed(model, batch.inputs).x, np.float64)[: len(rows)]
        x = x[batch.inputs.attention_mask[: len(rows)]]
        square, total, count = square + (x**2).sum(), total + x.sum(), count + x.size
    sigma = float(np.sqrt(square / count - (total / count) ** 2))
    parts: list[Trace | None] = [None] * len(examples)
    costs = [grid_cost(model, batch) for _, batch in groups]
    bar = tqdm(total=len(examples), desc=f"trace {label}", unit="sample")
    with Meter(sum(costs[1:], costs[0])), bar:
        for rows, batch in groups:
            shape = (batch.inputs.input_ids.shape[1], model.config.text.hidden_size)
            keys = [jax.random.fold_in(jax.random.key(options.seed), row) for row in rows]
            noise = np.zeros((len(batch.inputs.input_ids), *shape), np.float32)
            for i, k in enumerate(keys):
                noise[i] = options.noise_scale * sigma * np.asarray(jax.random.normal(k, shape))
            spans = batch.spans
            result = causal_trace(model, batch.inputs, spans["question"], spans["answer"], noise=noise)
            for i, row in enumerate(rows):
                parts[row] = Trace(*(np.asarray(a)[i] for a in result))
            bar.update(len(rows))
    return TaskTrace(
        Trace(*map(np.stack, zip(*parts, strict=True))), [e.id for e in examples], sigma, compiled_shapes(groups)
    )


def grid_cost(model: Model, batch: Batch) -> Cost:
    """What :func:`causal_trace` costs on a batch."""
    variants, _ = patch_grid(_SITES, model.config.text.num_hidden_layers)
    noise = Add(np.asarray(batch.spans["question"], np.float32)[..., None])
    gold = Gold.of(batch.inputs, batch.spans["answer"])
    return estimate(model, batch.inputs, variants, gold, base=(noise,), clean=())


def summarise(traced: TaskTrace, min_te: float, seed: int = 0) -> dict:
    """RR_mean with its 95 % percentile bootstrap interval, the ranking, the ratio of means, and counts."""
    trace = traced.trace
    used = trace.te >= min_te
    if not used.any():
        raise UserError(f"no sample has TE >= {min_te}: raise --noise-scale, or choose samples that the model answers")
    rr = trace.rr[used]
    if len(rr) > 1:
        interval = bootstrap((rr,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=seed, vectorized=True)
        low, high = interval.confidence_interval
    else:
        low = high = rr[0]
    mean = rr.mean(0)
    names = module_names(len(mean))
    order = np.argsort(-mean.ravel(), kind="stable")
    return {
        "samples": len(trace.te),
        "te_not_positive": int((trace.te <= 0).sum()),
        "excluded_by_min_te": int((~used).sum()),
        "p_clean": float(trace.p_clean.mean()),
        "p_corrupt": float(trace.p_corrupt.mean()),
        "sigma_E": traced.sigma,
        "compiled_shapes": traced.shapes,
        "ranking": [names[i] for i in order],
        "rr_mean": dict(zip(names, mean.ravel().tolist(), strict=True)),
        "rr_low": dict(zip(names, low.ravel().tolist(), strict=True)),
        "rr_high": dict(zip(names, high.ravel().tolist(), strict=True)),
        "ratio_of_means": dict(zip(names, (trace.ie.mean(0) / trace.te.mean()).ravel().tolist(), strict=True)),
    }


def module_names(depth: int) -> list[str]:
    """``L0-attn, L0-mlp, L1-attn, ...``: the modules in the order of ``rr[...].ravel()``."""
    return [f"L{layer}-{module}" for layer in range(depth) for module in MODULES]


@dataclasses.dataclass(frozen=True)
class Args(TraceOptions, ModelOptions):
    """Trace which layers' attention and MLP outputs restore the answer when the question is corrupted (P0)."""

    task: str = "mini-okvqa"
    """Task name, family (knowledge, perception) or JSONL file."""
    limit: int = 96
    """Samples to trace."""
    out: Path = Path("runs/trace")
    """Run folder: trace.npz, summary.json, heatmap.png."""


@command
def main(args: Args) -> None:
    from interventions.figures import heatmap

    examples = load_task(args.task, split="trace", limit=args.limit)
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}: give at least 1")
    model, processor = args.load()
    run = Run.open(args.out, args, model.config, processor)
    traced = trace_examples(model, processor, examples, args, args.task)
    summary = {"task": args.task, **summarise(traced, args.min_te)}
    trace = traced.trace
    run.save_arrays("trace.npz", **trace._asdict(), ids=np.array(traced.ids))
    rr_mean = np.array(list(summary["rr_mean"].values())).reshape(-1, 2)
    run.write("heatmap.png", lambda path: heatmap(path, {args.task: rr_mean}))
    run.save_json("summary.json", summary)
    print(
        f"{args.task}: {summary['samples']} samples, TE <= 0 in {summary['te_not_positive']}, "
        f"p_clean {summary['p_clean']:.3f}, p_corrupt {summary['p_corrupt']:.3f}"
    )
    for name in summary["ranking"][:10]:
        mean, low, high = (summary[key][name] for key in ("rr_mean", "rr_low", "rr_high"))
        print(f"  {name:10s} RR {mean:+.3f}  [{low:+.3f}, {high:+.3f}]")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
