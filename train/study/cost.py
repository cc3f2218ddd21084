"""What a study would cost: cells, FLOPs, memory, and hours by kind of device, before anything runs."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

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
from vlm_jax.prompts import Batch, encode

#: Share of a device's peak that a job is assumed to reach; sweeps on this project's CPUs reached .73 of their matmuls'.
UTILISATION = 0.4
#: Examples that are encoded to see how long prompts are.
_SAMPLE = 16


class Device(NamedTuple):
    """Peak FLOP/s in bfloat16 and bytes of memory, as the vendors publish them, of one chip."""

    flops: float
    memory: float


DEVICES = {
    "A100 80GB": Device(312e12, 80e9),
    "H100 SXM": Device(989e12, 80e9),
    "TPU v5e": Device(197e12, 16e9),
    "TPU v5p": Device(459e12, 95e9),
    "TPU v6e": Device(918e12, 32e9),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The jobs of one model: how many, and the FLOPs of all of them; bytes of the weights and of a training step."""

    model: str
    tokens: int
    jobs: dict[str, tuple[int, float]]
    weights: float
    step: float

    @classmethod
    def of(cls, experiment: Experiment, conditions: Sequence, args) -> "Estimate":
        """Of :func:`train.study.options.conditions`. Placements that choose the same modules are counted twice here
        and trained once."""
        model, families = experiment.model, list(args.families)
        depth = experiment.depth
        rows = [example for family in families for example in experiment.traced[family][: _SAMPLE // 2]]
        batch = encode(rows, experiment.processor, model.config)
        tokens = int(np.asarray(batch.inputs.attention_mask).sum() / len(rows))
        text = sum(leaf.size for leaf in jax.tree.leaves(model.text.layers))
        forward = 2.0 * text * tokens + _vision(model, batch) / len(rows)
        sweep = trace_cost(model, batch).flops / len(rows)
        traces = len(families) * (1 + len(args.corruptions)) * args.trace
        cells = sum(len(c.runs) for c in conditions) * len(families)
        cells += len(module_names(depth)) * len(families) if args.alone else 0
        steps = args.training.epochs * args.train
        # A step runs a layer forward, again for the backward pass, and backward; frozen kernels have no gradient.
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
        rates |= {name: (device.flops * UTILISATION, device.memory) for name, device in DEVICES.items()}
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
    """Bytes a token that a training step keeps for its backward pass, in float32: the residual stream at every layer,
    what remat spares, and some twelve rows more in the layer at work."""
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    spared = {
        "full": 0,
        "some": 2 * text.intermediate_size,
        "none": 2 * text.intermediate_size + text.hidden_size + heads,
    }
    depth = text.num_hidden_layers
    return 4.0 * (text.hidden_size * (depth + 12) + spared[remat] * depth)


def _vision(model, batch: Batch) -> float:
    """FLOPs of the vision tower on a batch, its attention left out."""
    if batch.inputs.images is None:
        return 0.0
    size = sum(leaf.size for leaf in jax.tree.leaves(model.visual))
    return 2.0 * size * float(np.asarray(batch.inputs.images.patch_mask).sum())


def _memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a square float32 matmul here: the median of five."""
    x = jnp.ones((size, size))
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / float(np.median(seconds))
