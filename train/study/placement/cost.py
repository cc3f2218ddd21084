"""Estimates what a study costs before it runs: numbers of examples, FLOPs, memory, and hours for each kind of
device."""

import dataclasses
import os
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from eval.tables import Table
from interventions.engine.cost import Cost, estimate
from interventions.engine.grids import patch_grid
from interventions.engine.read import Gold
from interventions.kinds.add import Add
from interventions.modules import MODULE_SITES, module_names
from train.study.experiment import Experiment
from vlm_jax.mesh.chips import GPUS, TPUS
from vlm_jax.nn.flops import layers_flops, vision_flops
from vlm_jax.prompts import Batch, encode

#: The share of a device's peak speed that the estimate assumes. On CPUs, sweeps reached 0.73 of the speed of a matmul.
UTILISATION = 0.4
#: Number of examples that are encoded to measure the length of prompts.
_SAMPLE = 16


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of a study on one model.

    tokens: mean number of tokens in a prompt. jobs: name -> (number of examples, FLOPs for all of them). weights, step:
    bytes of the weights, and of everything that a training step holds in memory.
    """

    model: str
    tokens: int
    jobs: dict[str, tuple[int, float]]
    weights: float
    step: float

    @classmethod
    def of(cls, experiment: Experiment, conditions: Sequence, args) -> "Estimate":
        """The estimate for conditions from :func:`train.study.placement.options.conditions`. It is too high if
        placements choose the same modules: the estimate counts each of them, but the study trains them once."""
        model, families = experiment.model, list(args.families)
        depth = experiment.depth
        rows = [example for family in families for example in experiment.traced[family][: _SAMPLE // 2]]
        batch = encode(rows, experiment.processor, model.config)
        tokens = int(np.asarray(batch.inputs.attention_mask).sum() / len(rows))
        forward = layers_flops(model, 1, tokens) + vision_flops(model, batch.inputs) / len(rows)
        sweep = trace_cost(model, batch).flops / len(rows)
        traces = len(families) * (1 + len(args.corruptions)) * args.trace
        cells = sum(len(c.runs) for c in conditions) * len(families)
        cells += len(module_names(depth)) * len(families) if args.alone else 0
        steps = args.training.epochs * args.train
        # A step costs three forward passes: forward, forward again in the backward pass, and the gradients of the
        # activations. Frozen kernels get no gradient.
        jobs = {
            "traces": (traces, traces * sweep * args.tracing.replicates),
            "scores": (len(families) * args.trace, len(families) * args.trace * 12 * forward),
            "train": (cells * steps, cells * steps * 3 * forward),
            "evaluate": ((cells + len(families)) * args.eval, (cells + len(families)) * args.eval * 1.1 * forward),
        }
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
        lora = 3 * 4 * experiment.adapter_parameters(module_names(depth))
        kept = args.training.batch * tokens * _activations(model.config.text, args.training.remat)
        return cls(experiment.folder.rstrip("/"), tokens, jobs, weights, weights + lora + kept)

    @property
    def flops(self) -> float:
        return sum(flops for _, flops in self.jobs.values())

    def __str__(self) -> str:
        jobs = [(name, f"{count:,}", f"{flops / 1e15:,.3f}") for name, (count, flops) in self.jobs.items()]
        rates = {f"this machine ({jax.devices()[0].device_kind})": (matmul_rate(), _memory())}
        chips = {**GPUS, **{f"TPU {name}": chip for name, chip in TPUS.items()}}
        rates |= {name: (chip.flops_per_second * UTILISATION, chip.memory_bytes) for name, chip in chips.items()}
        hours = [
            (name, f"{self.flops / rate / 3600:,.2f}", "yes" if self.step < memory else "no")
            for name, (rate, memory) in rates.items()
        ]
        return (
            f"{self.model}: prompts of about {self.tokens} tokens, weights {self.weights / 2**30:.2f} GiB, "
            f"a training step on all modules about {self.step / 2**30:.2f} GiB\n\n"
            f"{Table(('job', 'examples', 'PFLOP'), jobs).markdown()}\n"
            f"{Table(('device', 'hours', 'a step fits'), hours).markdown()}\n"
            f"Hours are for devices at {UTILISATION:.0%} of their published bfloat16 peak, and for this machine at its "
            "measured speed of float32 matmuls. The time for compiling is not included.\n"
        )


def trace_cost(model, batch: Batch) -> Cost:
    """The cost of P0's trace of a batch."""
    variants, _ = patch_grid(MODULE_SITES, model.config.text.num_hidden_layers)
    noise = Add(jnp.asarray(batch.spans["question"], jnp.float32)[..., None], site="text.embeddings")
    gold = Gold.of(batch.inputs, batch.spans["answer"])
    return estimate(model, batch.inputs, variants, gold, base=(noise,), clean=())


def _activations(text, remat: str) -> float:
    """Bytes that a training step stores for its backward pass, for each token, in float32: the residual stream at every
    layer, the activations that ``remat`` keeps, and about twelve more vectors in the layer that is being
    differentiated."""
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    kept = {
        "full": 0,
        "some": 2 * text.intermediate_size,
        "none": 2 * text.intermediate_size + text.hidden_size + heads,
    }
    depth = text.num_hidden_layers
    return 4.0 * (text.hidden_size * (depth + 12) + kept[remat] * depth)


def _memory() -> int:
    """The size of this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def matmul_rate(size: int = 2048) -> float:
    """The speed of this machine in FLOPs per second: the median of five square float32 matmuls."""
    x = jnp.ones((size, size))
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / float(np.median(seconds))
