"""The cost of a sweep. It is printed before a long sweep, and compared with the measured time after it."""

import dataclasses
import time

from interventions.engine.bundles import bundled
from interventions.engine.prefix import shared_prefix
from interventions.engine.variants import Variants, first_layers, sized_variants
from vlm_jax import Inputs, Model
from vlm_jax.nn.flops import head_flops, layers_flops
from vlm_jax.runs.processes import fetch

#: A job of fewer FLOPs is so short that nothing is printed.
_LONG = 1e11


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a sweep, without the vision tower.

    token_layers: tokens times layers that are computed.
    flops: of the necessary matmuls, including the runs of whole prompts and the unembedding.
    bytes: of the variants' states that are held at once.
    naive_flops: of one whole forward pass for each variant.
    """

    token_layers: int
    flops: float
    bytes: int
    naive_flops: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.token_layers + other.token_layers,
            self.flops + other.flops,
            max(self.bytes, other.bytes),
            self.naive_flops + other.naive_flops,
        )

    def __str__(self) -> str:
        saving = self.naive_flops / self.flops
        return (
            f"{self.token_layers:,} token-layers, {self.flops / 1e9:,.1f} GFLOP ({saving:.1f} times less than a pass "
            f"per variant), {self.bytes / 2**20:,.1f} MiB of live variants"
        )

    def measured(self, seconds: float) -> str:
        """The time that the sweep took, and its speed, as text."""
        return f"{seconds:.1f} s, {self.flops / seconds / 1e9:,.1f} GFLOP/s of necessary work"


class Announced:
    """Prints what a long job's sweeps will cost, and afterwards how long they took. Short jobs print nothing.

    Used as ``with Announced(cost)``.
    """

    def __init__(self, cost: Cost):
        self.cost, self.long = cost, cost.flops > _LONG

    def __enter__(self) -> "Announced":
        self.begun = time.perf_counter()
        if self.long:
            print(f"to do: {self.cost}")
        return self

    def __exit__(self, kind, *_) -> None:
        if self.long and kind is None:
            print(f"done: {self.cost.measured(time.perf_counter() - self.begun)}")


def estimate(model: Model, inputs: Inputs, variants: Variants, read, *, base=(), clean=None, gold: int = 4) -> Cost:
    """The cost of :func:`interventions.engine.sweep.sweep` with these arguments.

    Args:
        gold: positions that the read-out unembeds.
    """
    config, variants = model.config.text, sized_variants(variants, model.depths)
    batch, length = inputs.input_ids.shape
    start = shared_prefix(model, inputs, variants, read, base, clean)
    depth = config.num_hidden_layers
    sweeps = bundled(model, inputs, variants, start)
    head = head_flops(model, gold * batch)
    entire = layers_flops(model, batch, length)
    flops, token_layers = entire, depth * length
    if clean is not None:
        flops += layers_flops(model, batch, length - start, start)
        token_layers += depth * (length - start)
    alive = depth - fetch(first_layers(variants, depth))
    for begin, numbers in sweeps.numbers.items():
        layers = int(alive[numbers].sum())
        flops += layers / depth * layers_flops(model, batch, length - begin, begin)
        token_layers += layers * (length - begin)
    live = sum(-(-len(numbers) // len(sweeps)) * (length - begin) for begin, numbers in sweeps.numbers.items())
    return Cost(
        token_layers=batch * token_layers,
        flops=flops + head * (len(variants) + 1 + (clean is not None)),
        bytes=batch * live * config.hidden_size * model.text.dtype.itemsize,
        naive_flops=(len(variants) + 1) * (entire + head),
    )
