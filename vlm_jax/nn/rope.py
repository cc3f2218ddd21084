"""Rotary angles: one-dimensional, linear and Llama-3 scaled, both layouts of multimodal RoPE, and the towers' 2-D."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from vlm_jax.config import Rope
from vlm_jax.typing import Array, ArrayLike


def _inverse_frequencies(theta: float, dim: int) -> Float32[np.ndarray, "{dim}//2"]:
    # Rounded as torch rounds: an error in a frequency's last bit becomes a visible angle after 500 tokens.
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)


def _cos_sin(angles: Float[Array, "*rows half"]) -> tuple[Float[Array, "*rows 2*half"], Float[Array, "*rows 2*half"]]:
    angles = jnp.concatenate([angles, angles], -1)
    return jnp.cos(angles), jnp.sin(angles)


def _scaled(rope: Rope, dim: int) -> Float32[np.ndarray, "{dim}//2"]:
    """Inverse frequencies after the scaling that ``rope.rope_type`` names."""
    frequencies = _inverse_frequencies(rope.rope_theta, dim)
    match rope.rope_type:
        case "linear":
            return frequencies / np.float32(rope.factor)
        case "llama3":
            # Short wavelengths stay, long ones are divided by the factor, those between are blended.
            low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
            turns = np.float32(rope.original_max_position_embeddings) / (2 * math.pi / frequencies).astype(np.float32)
            keep = np.clip((turns - low) / (high - low), 0, 1)
            return ((1 - keep) * frequencies / np.float32(rope.factor) + keep * frequencies).astype(np.float32)
    return frequencies


def _axes(rope: Rope, dim: int) -> Int32[np.ndarray, "{dim}//2"]:
    """Which position turns each frequency: 0 temporal, 1 height, 2 width."""
    axis = np.zeros(dim // 2, np.int32)
    if rope.mrope_section is None:
        return axis
    if not rope.mrope_interleaved:
        return np.repeat(np.arange(3, dtype=np.int32), rope.mrope_section)
    # t, h, w, t, h, w, ...; frequencies beyond the height and the width section are temporal.
    for dimension in (1, 2):
        axis[dimension : rope.mrope_section[dimension] * 3 : 3] = dimension
    return axis


def rotary(
    position_ids: Int[ArrayLike, "3 batch tokens"], rope: Rope, head_dim: int
) -> tuple[Float32[Array, "batch tokens {head_dim}"], Float32[Array, "batch tokens {head_dim}"]]:
    """Cosine and sine of the rotary angles at the temporal, height and width positions of every token."""
    positions = jnp.moveaxis(jnp.asarray(position_ids)[_axes(rope, head_dim)], 0, -1)  # (batch, tokens, head_dim / 2)
    return _cos_sin(positions.astype(jnp.float32) * _scaled(rope, head_dim))


def rope_2d(
    grid_positions: Int[ArrayLike, "images patches 2"], theta: float, head_dim: int
) -> tuple[Float32[Array, "images patches {head_dim}"], Float32[Array, "images patches {head_dim}"]]:
    """Cosine and sine of a vision tower's 2-D rotary angles.

    Args:
        grid_positions: row and column of each patch. The row turns the first half of the frequencies, the column the
            second half.
    """
    angles = jnp.asarray(grid_positions).astype(jnp.float32)[..., None] * _inverse_frequencies(theta, head_dim // 2)
    return _cos_sin(angles.reshape(*angles.shape[:-2], -1))
