"""What a study would cost: cells, FLOPs, memory, and hours by kind of device, before anything runs."""

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

#: Share of a device's peak that a job is assumed to reach. Sweeps on CPUs reached 0.73 of the matmuls' own rate.
UTILISATION = 0.4
#: Examples that are encoded to see how long prompts are.
_SAMPLE = 16


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of a study on one model.

    tokens: of a prompt. jobs: name -> (how many examples, FLOPs of all of them). weights, step: bytes of the weights
    and of a training step.
    """

    model: str
    tokens: int
    jobs: dict[str, tuple[int, float]]
    weights: float
    step: float

    @classmethod
    def of(cls, experiment: Experiment, conditions: Sequence, args) -> "Estimate":
        """For conditions from :func:`train.study.options.conditions`. Placements that choose the same modules are
        counted twice here, but trained once."""
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
        # A step runs each layer forward, again in the backward pass, and backward. Frozen kernels have no gradient.
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
            f"Devices at {UTILISATION:.0%} of their published bfloat16 peak, this machine at its own float32 matmul "
            "rate; without compilation.\n"
        )


def trace_cost(model, batch: Batch) -> Cost:
    """What P0's trace of a batch costs."""
    variants, _ = patch_grid(MODULE_SITES, model.config.text.num_hidden_layers)
    noise = Add(np.asarray(batch.spans["question"], np.float32)[..., None])
    gold = Gold.of(batch.inputs, batch.spans["answer"])
    return estimate(model, batch.inputs, variants, gold, base=(noise,), clean=())


def _activations(text, remat: str) -> float:
    """Bytes for each token that a training step keeps for its backward pass, in float32: the residual stream at every
    layer, what ``remat`` keeps, and about twelve more rows in the layer that is being differentiated."""
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    kept = {
        "full": 0,
        "some": 2 * text.intermediate_size,
        "none": 2 * text.intermediate_size + text.hidden_size + heads,
    }
    depth = text.num_hidden_layers
    return 4.0 * (text.hidden_size * (depth + 12) + kept[remat] * depth)


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def matmul_rate(size: int = 2048) -> float:
    """FLOPs per second of a square float32 matmul on this machine: the median of five."""
    x = jnp.ones((size, size))
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / float(np.median(seconds))
