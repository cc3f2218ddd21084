"""Handwritten digits: the 1,797 real pictures that scikit-learn ships (Alpaydin and Kaynak 1998, CC BY 4.0), a small
stand-in for MNIST."""

import functools
import importlib.metadata
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.data.example import Example
from vlm_jax.data.images import LazyImages
from vlm_jax.data.splits import SplitRow, deal
from vlm_jax.errors import UserError, nearest

NAME = "digits"
QUESTION = "Which digit is this?"
#: Split -> size.
SPLITS = {"trace": 197, "train": 1000, "eval": 200, "test": 400}
#: The pictures have 8 x 8 pixels with values from 0 to 16. They are enlarged to the size of the miniworld's.
_LEVELS, _SIZE = 16, 64


class Digits(NamedTuple):
    """All pictures, ``(N, 8, 8)``, and the digits that they show."""

    pictures: np.ndarray
    digits: np.ndarray


def load_digits(split: str, limit: int | None) -> list[Example]:
    """The first ``limit`` examples of a split. ``subtask`` is the digit."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {NAME}{nearest(split, SPLITS)}")
    pictures, digits = _data()
    examples = []
    for number in _row_numbers()[split][:limit]:
        label, digit = f"{NAME}/{number}", str(digits[number])
        images = LazyImages([functools.partial(_png, pictures[number])], label)
        examples.append(Example(id=label, images=images, question=QUESTION, answers=(digit,), task=NAME, subtask=digit))
    return examples


def digits_source() -> dict:
    """The package's version and its number of rows, for a run's manifest."""
    version = importlib.metadata.version("scikit-learn")
    return {"dataset": f"pypi:scikit-learn=={version}", "licence": "CC BY 4.0", "rows": len(_data().digits)}


def _png(picture: np.ndarray) -> bytes:
    """White on black, enlarged smoothly."""
    grey = Image.fromarray((picture * (255 / _LEVELS)).astype(np.uint8))
    file = io.BytesIO()
    grey.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC).convert("RGB").save(file, "png")
    return file.getvalue()


@functools.cache
def _row_numbers() -> dict[str, list[int]]:
    """Split -> the numbers of its pictures."""
    names = [f"{NAME}/{number}" for number in range(len(_data().digits))]
    return deal([SplitRow(number, name, name, number) for number, name in enumerate(names)], SPLITS, {})


@functools.cache
def _data() -> Digits:
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise UserError(f"the task {NAME} needs scikit-learn: pip install 'vlm-jax[{NAME}]'") from None
    data = datasets.load_digits()
    return Digits(data.images, data.target)
