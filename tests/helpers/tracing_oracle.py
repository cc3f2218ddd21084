"""What traces are compared with: whole forward passes, read in NumPy."""

import jax
import numpy as np

from vlm_jax.prompts import encode


@jax.jit
def forward(model, inputs, interventions=()):
    return model(inputs, interventions).logits


def probability(logits, batch) -> np.ndarray:
    """The geometric mean of the gold tokens' probabilities ``(B,)``, of the prompts' own gold tokens."""
    logits, ids = np.asarray(logits, np.float64), np.asarray(batch.inputs.input_ids)
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    rows = []
    for row, answer in enumerate(batch.spans["answer"]):
        places = np.flatnonzero(answer)
        rows.append(np.exp(np.mean(logp[row, places - 1, ids[row, places]])))
    return np.array(rows)


def changed(task, examples):
    """The gold probabilities ``(B,)`` of these examples, encoded in the shape of the task's batch."""
    batch = encode(examples, task.processor, task.model.config, step=task.batch.inputs.input_ids.shape[1])
    return probability(forward(task.model, batch.inputs), batch)
