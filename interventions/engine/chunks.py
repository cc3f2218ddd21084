"""How many variants a sweep works on together."""

import jax

from vlm_jax import Inputs
from vlm_jax.mesh.sharding import shards

#: Tokens of the variants that are worked on together: enough rows for a full matmul, few enough that hardly any
#: variant is carried along before its first layer. An accelerator needs more rows.
CHUNK_TOKENS = {"cpu": 192}
_ACCELERATOR_TOKENS = 8192


def chunk_of(inputs: Inputs, start: int, backend: str | None = None) -> int:
    """How many variants to work on together, each with the tokens from ``start`` on.

    Args:
        backend: JAX's name of the backend; None: this machine's.
    """
    batch, length = inputs.input_ids.shape
    tokens = CHUNK_TOKENS.get(backend or jax.default_backend(), _ACCELERATOR_TOKENS) * shards("batch", batch)
    return max(1, tokens // (batch * (length - start)))
