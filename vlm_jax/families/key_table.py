"""The rows of key tables: which Hugging Face tensor is which of our arrays, and how their layouts differ."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import Config


class Op(NamedTuple):
    """An invertible change of layout.

    read: ``(tensor, slices of our array) -> that part of our array``. The tensor is a lazily read safetensors slice.
    to_hf: ``(our array, config) -> the tensor``. hf_shape: ``(shape of our array, config) -> shape of the tensor``.
    """

    read: Callable[[Any, tuple[slice, ...]], np.ndarray]
    to_hf: Callable[[np.ndarray, Config], np.ndarray]
    hf_shape: Callable[[tuple[int, ...], Config], tuple[int, ...]]


class Row(NamedTuple):
    """One row of a key table.

    hf: name of the tensor. ``{}`` in it stands for the index along the leading axis of our array, that of the layers.
    path: of our array. op: how the layouts differ.
    """

    hf: str
    path: str
    op: Op

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf


def _conv_shape(shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    assert config.vision is not None, "a text-only model has no convolution"
    return (shape[1], *config.vision.conv_shape)


KEEP = Op(lambda tensor, where: tensor[where], lambda a, _: a, lambda shape, _: shape)
TRANSPOSE = Op(lambda tensor, where: tensor[where[::-1]].T, lambda a, _: a.T, lambda shape, _: shape[::-1])
#: A convolution whose stride is the size of its kernel is a matmul of flattened patches.
CONV = Op(
    lambda tensor, where: tensor[:].reshape(tensor.get_shape()[0], -1).T[where],
    lambda a, config: a.T.reshape(_conv_shape(a.shape, config)),
    _conv_shape,
)


def linear(hf: str, ours: str) -> tuple[Row, Row]:
    """The two rows of a linear map with a bias."""
    return Row(f"{hf}.weight", f"{ours}.kernel", TRANSPOSE), Row(f"{hf}.bias", f"{ours}.bias", KEEP)


def norm(hf: str, ours: str) -> tuple[Row, Row]:
    """The two rows of a layer norm."""
    return Row(f"{hf}.weight", f"{ours}.weight", KEEP), Row(f"{hf}.bias", f"{ours}.bias", KEEP)
