"""Representation editors (P4, MRT): LoReFT on the vision blocks, behind the projector, and at both ends of the text in
every layer."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from interventions.kinds.base import layer_table, slots
from interventions.kinds.loreft import LoReFT
from vlm_jax import Model
from vlm_jax.errors import UserError

#: Editor -> the site that it acts at: psi_V on all patches; psi_c on the visual tokens; psi_P and psi_S on the first
#: and the last tokens of the text.
EDITOR_SITES = {
    "visual": "visual.resid_post",
    "cross": "text.embeddings",
    "prefix": "text.resid_post",
    "suffix": "text.resid_post",
}


def init_editors(
    model: Model,
    *,
    visual_rank: int = 6,
    rank: int = 4,
    blocks: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    key: PRNGKeyArray,
) -> dict[str, LoReFT]:
    """P4's four editors by name (:data:`EDITOR_SITES`), initialised as in its code: R orthogonal, W and b as PyTorch
    initialises a linear layer. So new editors already change the model.

    Args:
        visual_rank: the rank of psi_V and psi_c.
        rank: the rank of psi_P and psi_S.
        blocks, layers: which vision blocks and layers have an editor; None: all. (psi_P in the last layer has no effect
            on the answer, so it gets no gradient.)

    Raises:
        UserError: for a model without a vision tower, for a block or layer that it lacks, or for a rank below 1 or
            above the width.
    """
    vision = model.config.vision
    if vision is None:
        raise UserError("the model has no vision tower to edit: choose a vision-language model")
    depths, width = model.depths, model.config.text.hidden_size
    keys = jax.random.split(key, len(EDITOR_SITES))
    return {
        "visual": _editor("visual", vision.hidden_size, visual_rank, keys[0], depths["visual"], blocks),
        "cross": _editor("cross", width, visual_rank, keys[1]),
        "prefix": _editor("prefix", width, rank, keys[2], depths["text"], layers),
        "suffix": _editor("suffix", width, rank, keys[3], depths["text"], layers),
    }


def _editor(
    name: str, width: int, rank: int, key: PRNGKeyArray, depth: int | None = None, layers: Iterable[int] | None = None
) -> LoReFT:
    if not 0 < rank <= width:
        raise UserError(f"the rank of the {name} editor is {rank}: give 1 to {width}")
    slot, count = (np.int32(0), 1) if depth is None else (slots(depth, layers), int(layer_table(depth, layers).sum()))
    r, w, b = jax.random.split(key, 3)
    bound = 1 / np.sqrt(width)
    weights = (
        jax.vmap(lambda key: jax.nn.initializers.orthogonal()(key, (width, rank)))(jax.random.split(r, count)),
        jax.random.uniform(w, (count, width, rank), minval=-bound, maxval=bound),
        jax.random.uniform(b, (count, rank), minval=-bound, maxval=bound),
    )
    return LoReFT(weights={EDITOR_SITES[name]: weights}, slot={EDITOR_SITES[name]: jnp.asarray(slot)})


def editor_parameters(editors: Mapping[str, LoReFT]) -> dict[str, int]:
    """Trainable parameters of each editor."""
    return {name: sum(a.size for a in jax.tree.leaves(editor.weights)) for name, editor in editors.items()}
