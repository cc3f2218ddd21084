"""Splits a pytree of parameters into the leaves that are trained and the frozen rest, which gets no gradient.

A rule gives every leaf a label that depends on its path, such as "lora_a", "text" or "freeze". optax.partition then
uses one optimiser for each label.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import optax

from vlm_jax import Model
from vlm_jax.checkpoints.leaves import leaf_name, named_leaves
from vlm_jax.errors import UserError

#: ``label(path)``: the label of the leaf at a path, which :func:`vlm_jax.checkpoints.leaves.leaf_name` writes. A rule
#: is an argument of cached functions, so it must be a function at the top level of a module, or a frozen dataclass.
Label = Callable[[str], str]
#: The label of leaves that are not trained. They stay bit-equal.
FREEZE = "freeze"
#: The parts of a model, which are labels of its parameters. The vision tower ("visual") includes the projector.
TRAINABLE_PARTS = ("text", "visual")


def all_trained(path: str) -> str:
    """The rule that labels every leaf "train"."""
    return "train"


@dataclasses.dataclass(frozen=True)
class ByPart:
    """The rule that labels a model's leaf with its part ("text", "visual") if that part is trained, else "freeze". The
    part "registers" is the embeddings of registers alone."""

    trained: tuple[str, ...]

    def __call__(self, path: str) -> str:
        part = path.partition(".")[0]
        if "registers" in self.trained and path.startswith("text.register_embeddings."):
            return "registers"
        return part if part in self.trained else FREEZE


def check_trainable(model: Model) -> None:
    """Refuses a model whose matrices have fewer bits than its activations: small steps would be lost in rounding."""
    bits = model.text.dtype.itemsize
    narrow = [name for name, leaf in named_leaves(model).items() if leaf.dtype.itemsize < bits]
    if narrow:
        raise UserError(
            f"{narrow[0]} has fewer bits than the activations, so it cannot be trained: use --dtype float32"
        )


@flax.struct.dataclass
class Rest:
    """A pytree without its trained leaves.

    leaves: path -> frozen leaf. paths: the paths of all leaves, in their order in the tree. structure: the tree's
    structure.
    """

    leaves: dict[str, jax.Array]
    paths: tuple[str, ...] = flax.struct.field(pytree_node=False)
    structure: Any = flax.struct.field(pytree_node=False)

    def joined(self, trained: Mapping[str, jax.Array]) -> Any:
        """The whole pytree: the frozen leaves and these trained ones."""
        leaves = {**self.leaves, **trained}
        return self.structure.unflatten([leaves[path] for path in self.paths])

    def trained_of(self, params: Any) -> dict[str, jax.Array]:
        """The trained leaves of a pytree of the same structure."""
        leaves = zip(self.paths, jax.tree.leaves(params), strict=True)
        return {path: leaf for path, leaf in leaves if path not in self.leaves}


def split(params: Any, label: Label) -> tuple[dict[str, jax.Array], Rest]:
    """Splits ``params`` into the leaves that the rule does not freeze, by path, and the rest.

    Raises:
        UserError: if two leaves have the same path, or nothing is left to train.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = {leaf_name(path): leaf for path, leaf in flat}
    if len(leaves) < len(flat):
        raise UserError("two parameters have the same path: rename the keys that contain a dot")
    trained = {path: leaf for path, leaf in leaves.items() if label(path) != FREEZE}
    if not trained:
        raise UserError("every parameter is labelled freeze, so there is nothing to train: give some another label")
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return trained, Rest(frozen, tuple(leaves), structure)


def partitioned(
    transforms: Mapping[str, optax.GradientTransformation], label: Label, clip: float | None = None
) -> optax.GradientTransformation:
    """The optimiser that applies to each label's leaves the transformation of that label. Frozen leaves get updates of
    zero.

    Equal arguments give the same object, so that equal trainings share one compiled step. For this the transformations
    must be cached too, as those of :func:`train.objective.adamw` are.

    Args:
        clip: the largest global norm of all gradients together. Larger gradients are scaled down before the update.

    Raises:
        UserError: if there is a transformation for the label "freeze".
    """
    if FREEZE in transforms:
        raise UserError(f"the label {FREEZE!r} has a transformation, but stands for no training: use another label")
    return _partitioned(tuple(sorted(transforms.items())), label, clip)


@functools.cache
def _partitioned(transforms: tuple, label: Label, clip: float | None) -> optax.GradientTransformation:
    known = {**dict(transforms), FREEZE: optax.set_to_zero()}

    def labels(params):
        def of(path, _) -> str:
            if (name := label(leaf_name(path))) not in known:
                raise UserError(
                    f"{leaf_name(path)} has the label {name!r}, which has no optimiser: use one of {', '.join(known)}"
                )
            return name

        return jax.tree_util.tree_map_with_path(of, params)

    partition = optax.partition(known, labels)
    return partition if clip is None else optax.chain(optax.clip_by_global_norm(clip), partition)
