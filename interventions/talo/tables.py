"""Which samples are right when a layer is cut: the one part of TaLo that runs the model (P3)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from interventions.engine.cost import Announced, estimate
from interventions.engine.read import Gold
from interventions.engine.sweep import sweep_runs
from interventions.engine.variants import stack
from interventions.kinds.attention import UniformAttention
from interventions.kinds.base import layer_table
from interventions.kinds.gates import Gate
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.prompts import batches
from vlm_jax.runs.processes import fetch, progress

Cut = Literal["attn", "mlp", "block", "uniform"]


#: A sweep takes longer to compile than padding costs.
_LENGTH_STEP = 32


def layer_cut(depth: int, layer: int, cut: Cut) -> Gate | UniformAttention:
    """Takes something of one decoder layer out, at every token, generated ones included.

    "attn": its attention adds nothing, as if q, k, v and o were zero (the paper's cut). "uniform": it attends evenly to
    all it sees, as if q were zero. "mlp" and "block" (attention and MLP) are extensions of ours.
    """
    if cut not in get_args(Cut):
        raise UserError(f"unknown cut {cut!r}: use one of {', '.join(get_args(Cut))}")
    if cut == "uniform":
        return UniformAttention(layer_table(depth, [layer]))
    return Gate.cut(depth, [layer], ("attn", "mlp") if cut == "block" else (cut,))


def tabulate(
    model: Model, processor, examples: Sequence[Example], cut: Cut = "attn", *, batch: int = 32, label: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples the model answers, as it is ``base (N,)`` and with each layer cut ``correct (L, N)``, bool.

    Right is forced-greedy: at every token of the gold answer and of its turn's end, the likeliest token is that token,
    so greedy decoding would write ``answers[0]`` to the letter and stop.
    """
    depth = model.config.text.num_hidden_layers
    cuts = [layer_cut(depth, layer, cut) for layer in range(depth)]
    groups = list(batches(examples, processor, model.config, batch, step=_LENGTH_STEP))
    golds = [Gold.of(encoded.inputs, encoded.spans["answer"] | encoded.spans["end"]) for _, encoded in groups]
    asked = [(encoded.inputs, stack(cuts), gold) for (_, encoded), gold in zip(groups, golds, strict=True)]
    costs = [estimate(model, *sweep) for sweep in asked]
    right = np.zeros((1 + depth, len(examples)), bool)
    bar = progress(total=len(examples), desc=f"cut {cut} {label}".strip(), unit="sample")
    with Announced(sum(costs[1:], costs[0])), bar:
        for (rows, _), sweep in zip(groups, asked, strict=True):
            runs = fetch(sweep_runs(model, *sweep))
            right[0, rows] = runs.base.correct[: len(rows)]
            right[1:, rows] = runs.variants.correct[:, : len(rows)]
            bar.update(len(rows))
    return right[0], right[1:]


def subtask(example: Example) -> str:
    """An example's task, and its category within it where the task has any."""
    return example.task if example.subtask is None else f"{example.task}: {example.subtask}"


class TaskTable(NamedTuple):
    """A task's samples and their table: ``base (N,)``, ``correct (L, N)``, and their sub-tasks ``strata (N,)``."""

    examples: list[Example]
    base: np.ndarray
    correct: np.ndarray
    strata: np.ndarray
