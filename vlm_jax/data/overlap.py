"""Checks that no example is both trained on and evaluated on."""

import hashlib
from collections.abc import Iterable

from vlm_jax.data.example import Example
from vlm_jax.errors import UserError


def check_disjoint(train: Iterable[Example], held_out: Iterable[Example]) -> None:
    """Raises a UserError if a held-out example is also a training example.

    Two examples are the same if their ids are equal, or their question and image.
    """
    ids, id_by_content = set(), {}
    for example in train:
        ids.add(example.id)
        id_by_content[_content_digest(example)] = example.id
    for example in held_out:
        twin = example.id if example.id in ids else id_by_content.get(_content_digest(example))
        if twin is not None:
            shared = "id" if example.id in ids else "question and image"
            raise UserError(
                f"example {example.id!r} of the evaluation has the {shared} of training example {twin!r}: "
                "take it out of one of them, or give different examples different ids"
            )


def _content_digest(example: Example) -> str:
    """A digest of the question and of the image: of its name where it has one, else of its pixels."""
    digest = hashlib.sha256(example.question.encode())
    if example.image_id is not None:
        digest.update(b"\0" + example.image_id.encode())
        return digest.hexdigest()
    for image in example.images:
        digest.update(repr((image.mode, image.size)).encode() + image.tobytes())
    return digest.hexdigest()
