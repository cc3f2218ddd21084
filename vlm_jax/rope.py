"""Rotary angles: interleaved multimodal RoPE for the decoder, 2-D RoPE for the vision tower."""

import jax
import jax.numpy as jnp
import numpy as np


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def _cos_sin(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    angles = jnp.concatenate([angles, angles], -1)
    return jnp.cos(angles), jnp.sin(angles)


def mrope(position_ids: jax.Array, theta: float, head_dim: int, sections: tuple[int, int, int]):
    """Interleaved M-RoPE (Qwen3-VL): frequency ``i`` turns by the position on axis t, h, w, t, h, w, ...

    Args:
        position_ids: ``(3, B, T)``, axes temporal, height, width.
        sections: frequencies per axis; a frequency beyond the height or width section is temporal.

    Returns:
        cos, sin: ``(B, T, head_dim)`` float32.
    """
    axis = np.zeros(head_dim // 2, np.int32)
    for dim in (1, 2):
        axis[dim : sections[dim] * 3 : 3] = dim
    positions = jnp.moveaxis(position_ids[axis], 0, -1)  # (B, T, head_dim / 2)
    return _cos_sin(positions.astype(jnp.float32) * _inverse_frequencies(theta, head_dim))


def rope_2d(grid_positions: jax.Array, theta: float, head_dim: int):
    """2-D RoPE of the vision tower: the first half of the frequencies turns by row, the second by column.

    Args:
        grid_positions: ``(I, P, 2)``, row and column of each patch.

    Returns:
        cos, sin: ``(I, P, head_dim)`` float32.
    """
    angles = grid_positions.astype(jnp.float32)[..., None] * _inverse_frequencies(theta, head_dim // 2)
    return _cos_sin(angles.reshape(*angles.shape[:-2], -1))
