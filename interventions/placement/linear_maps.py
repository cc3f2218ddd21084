"""The linears of a model that can have adapters: their places in the forward pass, the model and transformers."""

from typing import NamedTuple

from vlm_jax import Model
from vlm_jax.checkpoints.leaves import named_leaves, rows_of
from vlm_jax.families.key_table import TRANSPOSE
from vlm_jax.sites import SITES, layered, stack_of


class LinearMap(NamedTuple):
    """A linear, or the linears of the same name in all layers.

    count: in how many layers it is; None outside of the layers. run: how many of these the model runs.
    hf: transformers' name of the module, with ``{}`` for the number of the layer; None if it is no ``nn.Linear`` there.
    """

    inputs: int
    outputs: int
    count: int | None
    run: int | None
    hf: str | None

    def modules(self) -> dict[str, int]:
        """transformers' names of the modules -> the layer, 0 outside of the layers."""
        return {} if self.hf is None else {self.hf.format(layer): layer for layer in range(self.count or 1)}


def linear_maps(model: Model) -> dict[str, LinearMap]:
    """Site -> the linear whose output is there. The model may be abstract."""
    names = {row.path: row.hf for row, _ in rows_of(model.config) if row.op is TRANSPOSE}
    maps = {}
    for leaf, array in named_leaves(model).items():
        site = site_of(leaf)
        if site is None:
            continue
        *stack, inputs, outputs = array.shape
        run = model.depths[stack_of(site)] if layered(site) else None
        hf = names[leaf].removesuffix(".weight") if leaf in names else None
        maps[site] = LinearMap(inputs, outputs, stack[0] if stack else None, run, hf)
    return maps


def site_of(leaf: str) -> str | None:
    """The site of the linear whose kernel has this name in the model; None for other parameters."""
    part, _, rest = leaf.removesuffix(".kernel").partition(".")
    stack, _, name = rest.partition(".")
    in_layers = stack in ("layers", "blocks")
    site = f"{part}.{name}" if in_layers else f"projector.{rest.removeprefix('multi_modal_projector.')}"
    return site if leaf.endswith(".kernel") and site in SITES else None
