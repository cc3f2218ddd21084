"""A model's parameters by name, and the rows of its family's key table."""

from typing import Any

import jax

from vlm_jax.config import Config
from vlm_jax.families import FAMILIES
from vlm_jax.families.key_table import Row
from vlm_jax.model import Model


def abstract(config: Config) -> Model:
    """The model with shapes in place of arrays (``jax.eval_shape``); nothing is allocated."""
    return jax.eval_shape(lambda: Model(config, jax.random.key(0)))


def leaf_name(path) -> str:
    """The name of a path in the model's pytree, such as ``text.layers.mlp.gate_proj.kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def named_leaves(model: Model) -> dict[str, Any]:
    """Name -> parameter, or its shape for an abstract model."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def rows_of(config: Config) -> list[tuple[Row, jax.ShapeDtypeStruct]]:
    """The rows of the family's key table that a model with this config needs, each with the shape of our parameter."""
    shapes = named_leaves(abstract(config))
    table = {row.path: row for row in FAMILIES[config.family].table}
    assert shapes.keys() <= table.keys(), f"the key table lacks {shapes.keys() - table.keys()}"
    return [(row, shapes[path]) for path, row in table.items() if path in shapes]


def tensor_count(row: Row, leaf: Any) -> int:
    """How many tensors in the files form this parameter: one for each layer if it is stacked."""
    return leaf.shape[0] if row.stacked else 1
