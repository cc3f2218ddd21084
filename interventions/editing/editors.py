"""Representation editors (P4, MRT): on the vision blocks, behind the projector, and at both ends of the text in every
layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from interventions.kinds.layers import layer_table, slots
from interventions.kinds.reft import Editor, LoReFT
from vlm_jax import Model
from vlm_jax.errors import UserError
from vlm_jax.sites import BLOCK_SITES, LAYER_SITES, Intervention, Stage, stage

#: Editor -> the site that it acts at. visual: psi_V, on all patches; cross: psi_c, on the visual tokens behind the
#: projector; prefix, suffix: psi_P and psi_S, on the first and the last tokens of the text; ends: psi_P and psi_S tied,
#: one editor for both; steering: MoReS (arXiv 2412.12359), on the visual tokens in the decoder's layers.
EDITOR_SITES = {
    "visual": "visual.resid_post",
    "cross": "text.embeddings",
    "prefix": "text.resid_post",
    "suffix": "text.resid_post",
    "ends": "text.resid_post",
    "steering": "text.resid_post",
}
#: P4's editors.
EDITORS = ("visual", "cross", "prefix", "suffix")


def init_editors(
    model: Model,
    *,
    kind: type[Editor] = LoReFT,
    editors: Iterable[str] = EDITORS,
    visual_rank: int = 6,
    rank: int = 4,
    blocks: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    length: int = 4,
    key: PRNGKeyArray,
) -> dict[str, Editor]:
    """Editors by name (:data:`EDITOR_SITES`), initialised as in P4's code and in that of ReFT: an orthonormal
    projection orthogonal, linear maps as PyTorch initialises them, constants uniform in 0 to 1. So new editors already
    change the model.

    Args:
        visual_rank: the rank of psi_V and psi_c.
        rank: the rank of the editors in the decoder's layers.
        blocks, layers: which vision blocks and layers have an editor; None: all. (psi_P in the last layer has no effect
            on the answer, so it gets no gradient.)
        length: how many tokens psi_P and psi_S edit, at either end of the instruction: the text behind the image,
            without the last token of the prompt.

    Raises:
        UserError: for an editor that this model cannot have, for a block or layer that it lacks, or for a rank or
            length below 1 or a rank above the width.
    """
    names, vision = list(editors), model.config.vision
    if vision is None and (of_image := [name for name in names if name not in ("prefix", "suffix", "ends")]):
        raise UserError(
            f"the model has no vision tower, so there is nothing for the editor {of_image[0]!r}: choose a "
            "vision-language model, or only prefix and suffix"
        )
    if length < 1:
        raise UserError(f"the editors' length is {length}: give at least 1")
    depths, width = model.depths, model.config.text.hidden_size
    groups = {
        "visual": None,
        "cross": "image",
        "prefix": f"first{length}:instruction",
        "suffix": f"last{length}:instruction",
        "ends": f"first{length}:instruction+last{length}:instruction",
        "steering": "image",
    }
    made = {}
    # One key for each editor there is, so that an editor begins alike whichever others there are.
    for name, own in zip(EDITOR_SITES, jax.random.split(key, len(EDITOR_SITES)), strict=True):
        if name not in names:
            continue
        tower, _, _ = EDITOR_SITES[name].partition(".")
        depth = None if name == "cross" else depths[tower]
        where = blocks if name == "visual" else layers
        features = vision.hidden_size if vision and name == "visual" else width
        size = visual_rank if name in ("visual", "cross") else rank
        made[name] = _editor(kind, name, groups[name], features, size, own, depth, where)
    return made


def _editor(
    kind: type[Editor],
    name: str,
    group: str | None,
    width: int,
    rank: int,
    key: PRNGKeyArray,
    depth: int | None,
    layers: Iterable[int] | None,
) -> Editor:
    if not 0 < rank <= width:
        raise UserError(f"the rank of the {name} editor is {rank}: give 1 to {width}")
    slot, count = (np.int32(0), 1) if depth is None else (slots(depth, layers), int(layer_table(depth, layers).sum()))
    u, w, b = jax.random.split(key, 3)
    bound = 1 / np.sqrt(width)
    if kind.orthonormal:
        orthogonal = jax.nn.initializers.orthogonal()
        projection = jax.vmap(lambda key: orthogonal(key, (width, rank)))(jax.random.split(u, count))
    else:
        projection = jax.random.uniform(u, (count, width, rank), minval=-bound, maxval=bound)
    constant = (-bound, bound) if "W" in kind.sources else (0.0, 1.0)
    sources = {
        "W": jax.random.uniform(w, (count, width, rank), minval=-bound, maxval=bound),
        "b": jax.random.uniform(b, (count, rank), minval=constant[0], maxval=constant[1]),
    }
    weights = (projection, *(sources[source] for source in kind.sources))
    site = EDITOR_SITES[name]
    return kind(weights={site: weights}, slot={site: jnp.asarray(slot)}, group=group)


def editor_parameters(editors: Mapping[str, Any]) -> dict[str, int]:
    """Trainable parameters of each editor, or of another intervention with trainable ``weights``."""
    return {name: sum(a.size for a in jax.tree.leaves(editor.weights)) for name, editor in editors.items()}


def lowest_acting(model: Model, interventions: Iterable[Intervention]) -> tuple[int, int]:
    """The lowest vision block and the lowest layer in which one of the interventions changes something, or what a lower
    one changed arrives; the number of blocks or layers where there is none. A backward pass to the interventions'
    arrays ends there."""
    block, layer = model.depths["visual"], model.depths["text"]
    for intervention in interventions:
        active = intervention.active()
        for site in intervention.sites:
            acting = np.flatnonzero(np.atleast_1d(active.get(site, True)))
            if not len(acting):
                continue
            if site in LAYER_SITES:
                layer = min(layer, int(acting[0]))
            elif stage(site) is not Stage.EXIT:  # in the tower, behind it, or before the layers
                layer = 0
                if site.startswith("visual."):
                    block = min(block, int(acting[0]) if site in BLOCK_SITES else 0)
    return block, layer
