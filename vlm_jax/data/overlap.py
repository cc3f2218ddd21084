"""Keeps what is trained on out of what is evaluated on."""

import hashlib
from collections.abc import Iterable

from vlm_jax.data.example import Example
from vlm_jax.errors import UserError


def check_disjoint(train: Iterable[Example], held_out: Iterable[Example]) -> None:
    """Raises a UserError that names an example of both: by its id, or by its question about the same image."""
    ids, asked = set(), {}
    for example in train:
        ids.add(example.id)
        asked[_asked(example)] = example.id
    for example in held_out:
        twin = example.id if example.id in ids else asked.get(_asked(example))
        if twin is not None:
            kind = "id" if example.id in ids else "question and image"
            raise UserError(
                f"example {example.id!r} of the evaluation has the {kind} of training example {twin!r}: "
                "take it out of one of them, or give different examples different ids"
            )


def _asked(example: Example) -> str:
    """A digest of the question and of which image it is about: its name where it has one, else its pixels."""
    digest = hashlib.sha256(example.question.encode())
    if example.image_id is not None:
        digest.update(b"\0" + example.image_id.encode())
        return digest.hexdigest()
    for image in example.images:
        digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
    return digest.hexdigest()
