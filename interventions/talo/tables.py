"""The table of correct answers with each layer cut: the only part of TaLo (P3) that runs the model."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Shaped

from interventions.engine.cost import Announced, estimate
from interventions.engine.read import Gold
from interventions.engine.sweep import sweep_runs
from interventions.engine.variants import stack
from interventions.kinds.attention import UniformAttention
from interventions.kinds.gates import Gate
from interventions.kinds.groups import bind
from interventions.kinds.layers import layer_table
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.sites import Intervention

Cut = Literal["attn", "mlp", "block", "uniform"]
#: Prompts are padded to multiples of this, because compiling a sweep for another shape takes longer than padding.
_LENGTH_STEP = 32


def layer_cut(depth: int, layer: int, cut: Cut) -> Gate | UniformAttention:
    """An intervention that cuts a part of one decoder layer, at every token, including generated ones.

    Args:
        depth: the model's number of layers.
        cut: "attn": the attention adds nothing, as if q, k, v and o were zero (the paper's cut). "uniform": attention
            is uniform over the visible tokens, as if q were zero. "mlp", "block" (attention and MLP): our extensions.
    """
    if cut not in get_args(Cut):
        raise UserError(f"unknown cut {cut!r}: use one of {', '.join(get_args(Cut))}")
    if cut == "uniform":
        return UniformAttention(layer_table(depth, [layer]))
    return Gate.cut(depth, [layer], ("attn", "mlp") if cut == "block" else (cut,))


def tabulate(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    cut: Cut = "attn",
    *,
    interventions: Sequence[Intervention] = (),
    batch: int = 32,
    label: str = "",
) -> tuple[Bool[np.ndarray, "samples"], Bool[np.ndarray, "layers samples"]]:
    """Which examples are answered correctly: by the uncut model (``base``) and with each layer cut (``correct``).

    An answer is correct if the gold token is the likeliest at every token of the gold answer and of its turn's end.
    Greedy decoding would then write exactly ``answers[0]`` and stop. Without the chat template a model has no turn to
    end, so only the tokens of the answer count.

    Args:
        interventions: those that act in all these runs; token groups are bound to every batch.
        batch: rows of a batch.
        label: label of the progress bar.
    """
    depth = model.config.text.num_hidden_layers
    cuts = [layer_cut(depth, layer, cut) for layer in range(depth)]
    groups = list(batches(examples, processor, model.config, batch, step=_LENGTH_STEP))
    golds = [Gold.of(encoded.inputs, _scored([examples[row] for row in rows], encoded)) for rows, encoded in groups]
    sweeps = [(encoded.inputs, stack(cuts), gold) for (_, encoded), gold in zip(groups, golds, strict=True)]
    bases = [bind(interventions, encoded) for _, encoded in groups]
    costs = [estimate(model, *sweep, base=base) for sweep, base in zip(sweeps, bases, strict=True)]
    answered = np.zeros((1 + depth, len(examples)), bool)
    bar = progress(total=len(examples), desc=f"cut {cut} {label}".strip(), unit="sample")
    with Announced(sum(costs[1:], costs[0])), bar:
        for (rows, _), sweep, base in zip(groups, sweeps, bases, strict=True):
            runs = fetch(sweep_runs(model, *sweep, base=base))
            answered[0, rows] = runs.base.correct[: len(rows)]
            answered[1:, rows] = runs.variants.correct[:, : len(rows)]
            bar.update(len(rows))
    return answered[0], answered[1:]


def _scored(examples: Sequence[Example], batch: Batch) -> Bool[np.ndarray, "batch tokens"]:
    """The tokens that must be the likeliest. ``examples`` are the batch's first rows; the others repeat the last."""
    ends = np.array([example.chat_template for example in examples])
    ends = np.pad(ends, (0, len(batch.spans["end"]) - len(ends)), mode="edge")
    return batch.spans["answer"] | (batch.spans["end"] & ends[:, None])


def subtask(example: Example) -> str:
    """The name of an example's task, with the example's category if the task has categories."""
    return example.task if example.subtask is None else f"{example.task}: {example.subtask}"


class TaskTable(NamedTuple):
    """A task's samples and their table of correct answers."""

    examples: list[Example]
    base: Bool[np.ndarray, "samples"]
    """By the unchanged model."""
    correct: Bool[np.ndarray, "layers samples"]
    """With each layer cut."""
    strata: Shaped[np.ndarray, "samples"]
    """The samples' sub-tasks."""
