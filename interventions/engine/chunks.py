"""How many variants a sweep works on together, and how many it holds at once."""

import jax

from vlm_jax import Inputs, Model
from vlm_jax.mesh.sharding import shards

#: Tokens of the variants that are worked on together: enough rows for a full matmul, few enough that hardly any
#: variant is carried along before its first layer. An accelerator needs more rows.
CHUNK_TOKENS = {"cpu": 192}
_ACCELERATOR_TOKENS = 8192
#: Bytes that the states of the variants in one sweep may take.
LIVE_BYTES = 2**30


def chunk_of(inputs: Inputs, start: int, backend: str | None = None) -> int:
    """How many variants to work on together, each with the tokens from ``start`` on.

    Args:
        backend: JAX's name of the backend; None: this machine's.
    """
    batch, length = inputs.input_ids.shape
    tokens = CHUNK_TOKENS.get(backend or jax.default_backend(), _ACCELERATOR_TOKENS) * shards("batch", batch)
    return max(1, tokens // (batch * (length - start)))


def block_of(model: Model, inputs: Inputs, start: int, count: int, chunk: int) -> int:
    """How many of ``count`` variants are swept at once: as many as fit in :data:`LIVE_BYTES`. The other variants need
    another sweep, which computes the base run and the clean run again."""
    batch, length = inputs.input_ids.shape
    state = batch * (length - start) * model.config.text.hidden_size * 4
    return min(count, max(chunk, LIVE_BYTES * shards("batch", batch) // state))
