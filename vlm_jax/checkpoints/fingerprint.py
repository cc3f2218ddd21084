"""Which model is this? A short name for a config and all weights, so that results of another model are refused."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.leaves import named_leaves
from vlm_jax.model import Model
from vlm_jax.runs.processes import fetch


def fingerprint(model: Model) -> str:
    """16 hexadecimal digits of a SHA-256 over the config's fields and, of every parameter, its name, its shape and a
    64-bit checksum of its float32 values and their places.

    The checksum is a sum of integers, which no order of summing changes: it is the same on every device and mesh, and
    for the same values in another precision (a bfloat16 checkpoint loaded as float32). One changed bit changes it; two
    values that change places do, but for one chance in 2^64. Nothing leaves the devices but two words per parameter.
    """
    config = {k: v for k, v in dataclasses.asdict(model.config).items() if k != "hf"}
    del config["text"]["attention"]  # how it is computed, not what
    leaves = named_leaves(model)
    sums = fetch(checksums(leaves))
    described = [[name, list(leaves[name].shape), [int(word) for word in sums[name]]] for name in sorted(leaves)]
    text = json.dumps([config, described], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def checksums(leaves: Any) -> Any:
    """Two words ``(2,) uint32`` in the place of every array of a pytree."""
    return jax.tree.map(_checksum, leaves)


def _checksum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    place = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(seed))), dtype=jnp.uint32) for seed in (1, 2)])


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: one to one, and every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
