"""A short name for a model's config and weights, by which results of another model are recognised and refused."""

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
    """16 hexadecimal digits of a SHA-256 hash of the config and of each parameter's name, shape and checksum.

    The checksum has 64 bits and is computed from the float32 values and their positions. It is a sum of integers, so it
    does not depend on the order of summation: every device and mesh gives the same. The same values in another
    precision (a bfloat16 checkpoint loaded as float32) give the same as well. A changed bit always changes it. Two
    values that swap positions change it with a probability of 1 - 2^-64. Only two words per parameter leave the
    devices.
    """
    config = {k: v for k, v in dataclasses.asdict(model.config).items() if k != "hf"}
    del config["text"]["attention"]  # the choice of a kernel does not change the function that is computed
    if config["text"]["registers"] is None:  # as in results that are older than registers
        del config["text"]["registers"]
    leaves = named_leaves(model)
    sums = fetch(checksums(leaves))
    described = [[name, list(leaves[name].shape), [int(word) for word in sums[name]]] for name in sorted(leaves)]
    text = json.dumps([config, described], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def checksums(leaves: Any) -> Any:
    """The pytree with every array replaced by its checksum, ``(2,) uint32``."""
    return jax.tree.map(_checksum, leaves)


def _checksum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    position = jnp.uint32(0)
    for axis, size in enumerate(leaf.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(position + jnp.uint32(seed))), dtype=jnp.uint32) for seed in (1, 2)])


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: a bijection in which every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
