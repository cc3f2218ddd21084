"""The vocabulary of key tables: how a Hugging Face tensor and one of ours relate, in both directions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.config import Config


class Op(NamedTuple):
    """An invertible change of layout. ``read`` gives a slice of ours, from a file's lazily read tensor; ``to_hf`` and
    ``hf_shape`` also get the config."""

    read: Callable[[Any, tuple[slice, ...]], np.ndarray]
    to_hf: Callable[[np.ndarray, Config], np.ndarray]
    hf_shape: Callable[[tuple[int, ...], Config], tuple[int, ...]]


class Row(NamedTuple):
    """One row of a key table. ``{}`` in ``hf`` runs over the leading (stacked) axis of our array."""

    hf: str
    path: str
    op: Op

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf


def _conv_shape(shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    return (shape[1], *config.vision.conv_shape)


KEEP = Op(lambda tensor, where: tensor[where], lambda a, _: a, lambda shape, _: shape)
TRANSPOSE = Op(lambda tensor, where: tensor[where[::-1]].T, lambda a, _: a.T, lambda shape, _: shape[::-1])
#: A convolution whose stride is its kernel is a matmul on flattened patches.
CONV = Op(
    lambda tensor, where: tensor[:].reshape(tensor.get_shape()[0], -1).T[where],
    lambda a, config: a.T.reshape(_conv_shape(a.shape, config)),
    _conv_shape,
)


def linear(hf: str, ours: str) -> tuple[Row, Row]:
    """A linear map with a bias."""
    return Row(f"{hf}.weight", f"{ours}.kernel", TRANSPOSE), Row(f"{hf}.bias", f"{ours}.bias", KEEP)


def norm(hf: str, ours: str) -> tuple[Row, Row]:
    """A layer norm."""
    return Row(f"{hf}.weight", f"{ours}.weight", KEEP), Row(f"{hf}.bias", f"{ours}.bias", KEEP)
