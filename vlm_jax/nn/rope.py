"""Rotary angles: one-dimensional, linear and Llama-3 scaled, both layouts of multimodal RoPE, and the towers' 2-D."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import Rope


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    # As torch rounds: a unit in the last place of a frequency is a visible angle 500 tokens on.
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)


def _cos_sin(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    angles = jnp.concatenate([angles, angles], -1)
    return jnp.cos(angles), jnp.sin(angles)


def _scaled(rope: Rope, dim: int) -> np.ndarray:
    """Inverse frequencies ``(dim / 2,)`` after the scaling of ``rope.rope_type``."""
    frequencies = _inverse_frequencies(rope.rope_theta, dim)
    match rope.rope_type:
        case "linear":
            return frequencies / np.float32(rope.factor)
        case "llama3":
            # Short wavelengths stay, long ones shrink by the factor, those between are blended.
            low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
            turns = np.float32(rope.original_max_position_embeddings) / (2 * math.pi / frequencies).astype(np.float32)
            keep = np.clip((turns - low) / (high - low), 0, 1)
            return ((1 - keep) * frequencies / np.float32(rope.factor) + keep * frequencies).astype(np.float32)
    return frequencies


def _axes(rope: Rope, dim: int) -> np.ndarray:
    """Which position (0 temporal, 1 height, 2 width) turns each frequency, ``(dim / 2,)``."""
    axis = np.zeros(dim // 2, np.int32)
    if rope.mrope_section is None:
        return axis
    if not rope.mrope_interleaved:
        return np.repeat(np.arange(3, dtype=np.int32), rope.mrope_section)
    for dimension in (1, 2):  # t, h, w, t, h, w, ...; beyond the height or width section all is temporal
        axis[dimension : rope.mrope_section[dimension] * 3 : 3] = dimension
    return axis


def rotary(position_ids: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin ``(B, T, head_dim)``, float32, at ``position_ids (3, B, T)``: temporal, height, width."""
    positions = jnp.moveaxis(position_ids[_axes(rope, head_dim)], 0, -1)  # (B, T, head_dim / 2)
    return _cos_sin(positions.astype(jnp.float32) * _scaled(rope, head_dim))


def rope_2d(grid_positions: jax.Array, theta: float, head_dim: int):
    """2-D RoPE of a vision tower: the first half of the frequencies turns by row, the second by column.

    Args:
        grid_positions: ``(I, P, 2)``, row and column of each patch.

    Returns:
        cos, sin: ``(I, P, head_dim)`` float32.
    """
    angles = grid_positions.astype(jnp.float32)[..., None] * _inverse_frequencies(theta, head_dim // 2)
    return _cos_sin(angles.reshape(*angles.shape[:-2], -1))
