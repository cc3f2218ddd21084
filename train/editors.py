"""How P4's representation editors are trained: the parameters, the loss and the labels for :func:`train.loop.fit`."""

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interventions.editing.editors import lowest_edited
from interventions.kinds.groups import GROUPS, label, tokens_of
from interventions.kinds.reft import Editor
from train.objective import answer_loss
from train.subsets import FREEZE
from vlm_jax import Model
from vlm_jax.prompts import Batch, Fitted

#: Editor -> the label of its trained arrays, which is P4's symbol for them.
EDITOR_LABELS = {
    "visual": "psi_V",
    "cross": "psi_c",
    "prefix": "psi_P",
    "suffix": "psi_S",
    "ends": "psi_PS",
    "steering": "psi_M",
}


@flax.struct.dataclass
class Edited:
    """A frozen model, and the editors that are trained, by name
    (:func:`interventions.editing.editors.init_editors`).

    block, layer: the first vision block and the first layer with an editor below or in it; the backward pass ends
    there.
    """

    model: Model
    editors: dict[str, Editor]
    block: int = flax.struct.field(pytree_node=False, default=0)
    layer: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def of(cls, model: Model, editors: Mapping[str, Editor]) -> "Edited":
        return cls(model, dict(editors), *lowest_edited(model, editors))


def editor_label(path: str) -> str:
    """The rule for :class:`Edited`: the editors' arrays are trained, the model and the slots are frozen."""
    root, _, rest = path.partition(".")
    if root != "editors":
        return FREEZE
    name, field, *_ = rest.split(".")
    return EDITOR_LABELS[name] if field == "weights" else FREEZE


def edited_tokens(editors: Mapping[str, Editor], published: bool = False) -> Callable[[Batch], dict[str, np.ndarray]]:
    """A function that marks the tokens of each editor in an encoded batch: those of its group. A row may have none.

    Args:
        published: the suffix is at the end of the prompt with its answer, as in P4's released training code; the
            answer's last token is left out as there. Scored and generated answers know nothing of this.
    """
    groups = {name: editor.group for name, editor in editors.items() if editor.group is not None}

    def mark(batch: Batch) -> dict[str, np.ndarray]:
        labels = label(batch)
        where = {name: tokens_of(group, labels) for name, group in groups.items()}
        if published and "suffix" in groups:
            # With the last token renamed, the end of the text without it is a group like any other.
            last = labels.shape[1] - 1 - (labels != GROUPS.index("padding"))[:, ::-1].argmax(1)
            labels = labels.copy()
            labels[np.arange(len(labels)), last] = GROUPS.index("padding")
            where["suffix"] = tokens_of(groups["suffix"].replace("instruction", "text"), labels)
        return where

    return mark


def editor_loss(params: Edited, batch: Fitted, key: jax.Array) -> Float[Array, ""]:
    """P4's next-token loss: the mean cross-entropy, in nats, of the gold tokens and the token that ends their turn, in
    the model with the editors. The editors act on ``batch.where``. ``key`` is not used."""
    model, inputs, where = params.model, batch.inputs.turned(), batch.where or {}
    editors = tuple(editor.replace(where=where.get(name)) for name, editor in params.editors.items())
    editors = jax.tree.map(jnp.asarray, editors)  # layers index them while being traced
    features, _ = model.features(inputs, editors, frozen=params.block)
    embedded, _ = model.embed(inputs, editors, features=features)
    x, window = embedded.x, model.window(inputs)
    if params.layer:
        x, *_ = model.text.scan(x, window, layers=(0, params.layer), deepstack=embedded.deepstack, remat=True)
    x, *_ = model.text.scan(
        x,
        window,
        layers=(params.layer, None),
        deepstack=embedded.deepstack,
        interventions=editors,
        remat=True,
    )
    target = jnp.take_along_axis(inputs.input_ids, batch.index, 1)
    return answer_loss(model, x, batch.index, batch.valid, target)
