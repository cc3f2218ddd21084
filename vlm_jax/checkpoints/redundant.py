"""Tensors of a checkpoint that repeat what the model has elsewhere: the head of a tied model, and buffers. They are
compared with what stands in their place."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.precision import EMBEDDINGS
from vlm_jax.config import Config
from vlm_jax.families import FAMILIES
from vlm_jax.nn.rope import rotary

#: The key table's name of the head.
HEAD = "lm_head.weight"
#: Endings of the names of buffers: numbers that the config determines. Older files contain them.
_POSITIONS = "embeddings.position_ids"
BUFFERS = ("rotary_emb.inv_freq", _POSITIONS)
#: The dtypes, in safetensors' spelling, of numbers that can be compared.
_NUMBERS = {"F64", "F32", "BF16", "F16", "I64", "I32"}
#: How many numbers of the head and of the embeddings are compared at a time.
_BLOCK = 2**24


def settle_head(config: Config, tensors: dict[str, tuple[Any, str]], folder: Path, dtype: Any) -> Config:
    """The config of the model whose head the files hold.

    A tied config says that the head is the token embedding. If the files hold another head, the model has that one, as
    in transformers 5, and its config is not tied. If they hold the head alone, ``tensors`` gets it as the embeddings.

    Args:
        tensors: the key table's name -> (open file, the tensor's name in it).
        dtype: the precision of the parameters; None for the files'.

    Warns:
        UserWarning: if the files hold another head.
    """
    (embeddings,) = (row.hf for row in FAMILIES[config.family].table if row.path == EMBEDDINGS)
    if not config.text.tie_word_embeddings or HEAD not in tensors:
        return config
    if embeddings not in tensors:
        tensors[embeddings] = tensors.pop(HEAD)
        return config
    if _equal(tensors[HEAD], tensors[embeddings], jnp.dtype(dtype or "float32")):
        return config
    warnings.warn(
        f"{folder / 'config.json'} ties {tensors[HEAD][1]} to {tensors[embeddings][1]}, but the files hold different "
        "numbers for the two: the model gets both, as in transformers; set tie_word_embeddings to false in config.json",
        stacklevel=3,
    )
    text = dataclasses.replace(config.text, tie_word_embeddings=False)
    return dataclasses.replace(config, text=text, hf=json.dumps(untied(json.loads(config.hf))))


def untied(hf: dict) -> dict:
    """A ``config.json`` that does not tie the head to the embeddings."""
    text = hf.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        hf = hf | {"text_config": text | {"tie_word_embeddings": False}}
    return hf | {"tie_word_embeddings": False}


def check_buffers(config: Config, tensors: dict[str, tuple[Any, str]], folder: Path) -> None:
    """Compares buffers with the numbers that the config determines, which the model uses, as transformers does.

    Warns:
        UserWarning: if a buffer holds other numbers.
    """
    other = [
        name for key, (file, name) in tensors.items() if key.endswith(BUFFERS) and not _as_config(config, file, name)
    ]
    if other:
        warnings.warn(
            f"{folder} holds {', '.join(sorted(other))} with other numbers than config.json determines: they are not "
            "used, as in transformers; check that config.json and the weights belong together",
            stacklevel=3,
        )


def _equal(one: tuple[Any, str], other: tuple[Any, str], dtype: Any) -> bool:
    """Whether two matrices hold the same numbers in a precision. They are read in blocks of rows."""
    a, b = (file.get_slice(name) for file, name in (one, other))
    if len(a.get_shape()) != 2 or a.get_shape() != b.get_shape() or not {a.get_dtype(), b.get_dtype()} <= _NUMBERS:
        return False
    count, width = a.get_shape()
    step = max(1, _BLOCK // max(1, width))
    blocks = (slice(start, min(start + step, count)) for start in range(0, count, step))
    return all(np.array_equal(a[rows].astype(dtype), b[rows].astype(dtype)) for rows in blocks)


def _as_config(config: Config, file: Any, name: str) -> bool:
    """Whether a buffer holds the numbers that the config determines, up to the rounding of its precision."""
    if file.get_slice(name).get_dtype() not in _NUMBERS:
        return False
    found = file.get_tensor(name).astype(np.float64).ravel()
    if name.endswith(_POSITIONS):
        return np.array_equal(found, np.arange(found.size))
    return any(
        found.size == own.size and np.allclose(np.sin(found), own, rtol=1e-2, atol=1e-7) for own in _sines(config)
    )


def _sines(config: Config) -> Iterator[np.ndarray]:
    """The sines of the rotary frequencies of every kind of layer, ``(head_dim / 2,)``: scaled, and as older files have
    them, not."""
    scaled = [rope for _, rope in config.text.rope]
    plain = [dataclasses.replace(rope, rope_type="default") for rope in scaled]
    for rope in scaled + plain:
        _, sine = rotary(np.ones((3, 1, 1), np.int32), rope, config.text.head_dim)  # at position 1
        yield np.asarray(sine).ravel()[: config.text.head_dim // 2]
