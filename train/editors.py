"""How P4's representation editors are trained on a frozen model. Other interventions with trainable arrays, such as
LoRA, can be trained in the same way, to compare them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interventions.editing.editors import lowest_acting
from interventions.kinds.groups import GROUPS, label, tokens_of
from train.loop import LoopOptions, fit
from train.meter import About
from train.objective import Epochs, LabelOptions, adamw, answer_loss, scaled_rate, warmup_linear
from train.subsets import FREEZE
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.mesh.sharding import own_rows
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, Fitted, fitted, room_of
from vlm_jax.runs.ranges import BATCH, RATE, Range
from vlm_jax.sites import Intervention

#: P4's peak learning rate, for a model of this width.
_LR, _WIDTH = 6e-4, 4096
#: Editor -> the label of its trained arrays, which is P4's symbol for them; and LoRA's.
EDITOR_LABELS = {
    "visual": "psi_V",
    "cross": "psi_c",
    "prefix": "psi_P",
    "suffix": "psi_S",
    "ends": "psi_PS",
    "steering": "psi_M",
    "lora": "lora",
}


#: A function of an encoded batch: editor -> the tokens that it changes, ``(B, T)`` bool.
Mark = Callable[[Batch], dict[str, np.ndarray]]


@flax.struct.dataclass
class Edited:
    """A frozen model, and the editors that are trained, by name
    (:func:`interventions.editing.editors.init_editors`): interventions with trainable arrays in ``weights``.

    block, layer: the vision block and the layer at which the backward pass ends, because no editor acts below.
    """

    model: Model
    editors: dict[str, Any]
    block: int = flax.struct.field(pytree_node=False, default=0)
    layer: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def of(cls, model: Model, editors: Mapping[str, Any]) -> "Edited":
        return cls(model, dict(editors), *lowest_acting(model, editors.values()))


def editor_label(path: str) -> str:
    """The rule for :class:`Edited`: the editors' arrays are trained, the model and the slots are frozen."""
    root, _, rest = path.partition(".")
    if root != "editors":
        return FREEZE
    name, field, *_ = rest.split(".")
    return EDITOR_LABELS[name] if field == "weights" else FREEZE


def edited_tokens(editors: Mapping[str, Intervention], published: bool = False) -> Mark:
    """A function that marks the tokens of each editor in an encoded batch: those of its group. A row may have none.

    Args:
        published: the suffix is at the end of the prompt with its answer, as in P4's released training code; the
            answer's last token is left out as there. Scored and generated answers know nothing of this.
    """
    groups = {name: group for name, editor in editors.items() if (group := getattr(editor, "group", None))}

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
    where = batch.where or {}
    editors = tuple(
        editor.replace(where=where[name]) if name in where else editor for name, editor in params.editors.items()
    )
    return edited_loss(params.model, editors, batch, params.block, params.layer)


def edited_loss(
    model: Model, editors: tuple[Intervention, ...], batch: Fitted, block: int, layer: int
) -> Float[Array, ""]:
    """The mean cross-entropy, in nats, of the gold tokens and the token that ends their turn, under interventions.

    Args:
        block, layer: as in :class:`Edited`.
    """
    inputs = batch.inputs.turned()
    editors = jax.tree.map(jnp.asarray, editors)  # layers index them while being traced
    features, _ = model.features(inputs, editors, frozen=block)
    embedded, _ = model.embed(inputs, editors, features=features)
    x, window = embedded.x, model.window(inputs)
    if layer:
        x, *_ = model.text.scan(x, window, layers=(0, layer), deepstack=embedded.deepstack, remat=True)
    x, *_ = model.text.scan(
        x,
        window,
        layers=(layer, None),
        deepstack=embedded.deepstack,
        interventions=editors,
        remat=True,
    )
    target = jnp.take_along_axis(inputs.input_ids, batch.index, 1)
    return answer_loss(model, x, batch.index, batch.valid, target)


@dataclasses.dataclass(frozen=True)
class TrainingOptions(LabelOptions, LoopOptions):
    """How editors are trained. The defaults are those of P4's released code."""

    epochs: Annotated[int, Range(least=1)] = 3
    """Number of passes over all training examples."""
    batch: Annotated[int, BATCH] = 16
    """Training examples in a micro-batch, which is what runs at once. A step has BATCH x ACCUMULATION examples."""
    accumulation: Annotated[int, Range(least=1)] = 1
    """Micro-batches in a step. They run one after the other, and their gradients are averaged."""
    lr: Annotated[float | None, RATE] = None
    """Peak learning rate of Adam. The rate rises from 0 to the peak, then falls linearly to 0. By default 6e-4 x 4096 /
    WIDTH, where WIDTH is the model's hidden size; for P4's model, of width 4096, this is P4's rate."""
    warmup: Annotated[float, Range(least=0, below=1)] = 0.03
    """Share of the steps in which the learning rate rises."""
    clip: Annotated[float, Range(above=0)] = 1.0
    """Largest global norm of the gradients."""


def train_editors(
    model: Model,
    processor: Processor,
    editors: dict[str, Any],
    examples: list[Example],
    options: TrainingOptions,
    *,
    seed: int = 0,
    name: str = "edit",
    folder: Path | None = None,
    mark: Mark | None = None,
) -> dict[str, Any]:
    """The editors after training. Nothing else is trained, and nothing below the lowest editor is differentiated.

    Args:
        seed: seed of the order of the training examples.
        name: the name of the training, for the progress bar.
        folder: the folder for the log and the checkpoints; None writes nothing.
        mark: marks the tokens of each editor in an encoded batch; None for those of their groups.
    """
    epochs = Epochs(len(examples), options.epochs, options.batch, options.accumulation, seed)
    room, process_rows = room_of(examples, processor, model.config), own_rows(options.batch)
    mark = mark or edited_tokens(editors)

    def step_batch(step: int) -> Fitted:
        def micro(rows: np.ndarray) -> Fitted:
            chosen = [examples[row] for row in rows[process_rows]]
            batch = fitted(chosen, room, processor, model.config, process_rows, mark)
            return batch._replace(inputs=batch.inputs.turned())

        return jax.tree.map(lambda *parts: np.stack(parts), *map(micro, epochs.rows(step)))

    lr = options.lr if options.lr is not None else scaled_rate(_LR, model.config.text.hidden_size, _WIDTH)
    schedule = functools.partial(warmup_linear, steps=epochs.steps, warmup=int(options.warmup * epochs.steps))
    labels = [EDITOR_LABELS[editor] for editor in editors]
    transforms, rates = options.optimisers(labels, lr, schedule, adamw)
    about = About(
        rate=rates,
        ids=lambda step: [examples[row].id for row in epochs.rows(step).ravel()],
        tokens=epochs.step_size * room.length,
    )
    trained = fit(
        editor_loss,
        Edited.of(model, editors),
        step_batch,
        transforms,
        editor_label,
        steps=epochs.steps,
        rows=options.batch,
        seed=seed,
        clip=options.clip,
        name=name,
        folder=folder,
        options=options,
        about=about,
    )
    return trained.params.editors
