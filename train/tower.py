"""Trains LoRA in the vision tower. No part of the forward pass can be reused from one step to the next, unlike with
:mod:`train.trunk`: the images run through the tower in every step."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from interventions.editing.editors import lowest_acting
from interventions.kinds.lora import LoRA
from train.adapter import Adapted, LoRAOptions, fit_adapter
from train.editors import edited_loss
from train.objective import Epochs
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.mesh.sharding import own_rows
from vlm_jax.processor import Processor
from vlm_jax.prompts import Fitted, fitted, room_of


def tower_loss(params: Adapted, batch: Fitted, key: jax.Array) -> Float[Array, ""]:
    """:func:`train.objective.answer_loss` of the gold tokens and the token that ends their turn. The backward pass runs
    through all layers, but not through vision blocks below ``params.lowest``. ``key`` is the random key of dropout."""
    return edited_loss(params.model, (params.lora.replace(key=key),), batch, params.lowest, 0)


def train_tower_lora(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    names: Sequence[str],
    options: LoRAOptions,
    name: str,
    folder: Path | None = None,
) -> LoRA:
    """Trains LoRA on modules of which at least one is of the vision tower, such as "V2-attn".

    Args:
        name: the name of the training, for the progress bar and messages.
        folder: the folder for checkpoints and ``metrics.jsonl``, as in :func:`train.trunk.train_lora`.

    Raises:
        UserError: as :func:`train.trunk.train_lora`.
    """
    lora = options.begin(model, names)
    params = Adapted(model, lora, lowest_acting(model, [lora])[0], options.remat)
    epochs = Epochs(len(examples), options.epochs, options.batch, options.accumulation, options.seed)
    room, process_rows = room_of(examples, processor, model.config), own_rows(options.batch)

    def micro(rows: np.ndarray) -> Fitted:
        batch = fitted([examples[row] for row in rows[process_rows]], room, processor, model.config, process_rows)
        return batch._replace(inputs=batch.inputs.turned())

    def step_batch(step: int) -> Fitted:
        return jax.tree.map(lambda *parts: np.stack(parts), *map(micro, epochs.rows(step)))

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    ids, tokens = [example.id for example in examples], epochs.step_size * room.length
    return fit_adapter(tower_loss, params, step_batch, epochs, options, names, name, folder, ids, tokens=tokens)
