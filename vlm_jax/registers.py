"""Register tokens (P1, section 4): copies of one token behind every image. Text then reads the pictures only through
them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vlm_jax.errors import UserError, nearest

#: Mask -> pairs (class of token, class that it does not see). Registers follow their image, so they see it in every
#: mask. The classes: "image"; "register"; "before", the text before the first registers; "text", all other text.
#: register: P1's. mitre: as register, and images do not see registers, and the registers of an image see each other in
#: both directions (Qu et al. 2025). gist: as register, and text does not see the text before the first registers (Mu et
#: al. 2023; VoCo-LLaMA).
#: none, blind: controls, in which text sees everything, or neither images nor registers.
MASKS: dict[str, tuple[tuple[str, str], ...]] = {
    "register": (("text", "image"),),
    "mitre": (("text", "image"), ("image", "register")),
    "gist": (("text", "image"), ("text", "before")),
    "none": (),
    "blind": (("text", "image"), ("text", "register")),
}
Mask = Literal["register", "mitre", "gist", "none", "blind"]
Positions = Literal["text", "first"]


@dataclasses.dataclass(frozen=True)
class Registers:
    """The registers of a model.

    count: N, the number of registers behind every image. If the image is followed by the token ``token_id`` already,
    as in Qwen and Gemma, that token is the first of them.
    token_id: the token that is repeated.
    mask: who sees whom (:data:`MASKS`).
    positions: "text": registers have positions of their own, as any text behind an image, because that is what the
    model knows repeated tokens to be; "first": all have the position of the first, so the text behind them keeps the
    position that it has with one register.
    trained: registers have embeddings of their own, ``text.register_embeddings``, instead of the token's.

    Raises:
        UserError: for a count below 1, or an unknown mask or positions.
    """

    count: int
    token_id: int
    mask: Mask = "register"
    positions: Positions = "text"
    trained: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise UserError(f"the number of registers is {self.count!r}: give at least 1")
        if self.mask not in MASKS:
            raise UserError(f"unknown mask {self.mask!r}{nearest(str(self.mask), MASKS)}")
        if self.positions not in ("text", "first"):
            raise UserError(f"unknown positions {self.positions!r} of registers: use 'text' or 'first'")

    @property
    def hides_images(self) -> bool:
        """Whether no text behind an image sees it."""
        return ("text", "image") in MASKS[self.mask]

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Registers":
        """Registers from the content of a ``registers.json``.

        Args:
            where: name of the file, for errors.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or not {"count", "token_id"} <= value.keys() <= fields:
            raise UserError(f"{where} must have count and token_id, and nothing but {', '.join(sorted(fields))}")
        texts = [value.get(name, "") for name in ("mask", "positions")]
        if type(value["token_id"]) is not int or not isinstance(value.get("trained", False), bool):
            raise UserError(f"{where}: token_id must be a number and trained true or false")
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: mask and positions must be text")
        return cls(**value)


class Placed(NamedTuple):
    """Where the tokens of a prompt with registers come from.

    source: for each token, its index in the prompt without registers; for a register, that of the token before it.
    number: the number of a register within its image, from 0; -1 for other tokens.
    """

    source: Int[np.ndarray, " tokens"]
    number: Int[np.ndarray, " tokens"]

    def ids(self, ids: Int[np.ndarray, " before"], registers: Registers) -> Int[np.ndarray, " tokens"]:
        """The token ids of the prompt with registers."""
        return np.where(self.number >= 0, registers.token_id, ids[self.source])

    def kept(self, marked: Bool[np.ndarray, " before"]) -> Bool[np.ndarray, " tokens"]:
        """The tokens that were marked and are not registers."""
        return marked[self.source] & (self.number < 0)


def place(ids: Int[np.ndarray, " before"], ends: Sequence[int], registers: Registers) -> Placed:
    """Puts registers into one prompt.

    Args:
        ids: its tokens, without padding.
        ends: the index of each image's last visual token.
    """
    source, number = np.arange(len(ids)), np.full(len(ids), -1)
    for end in sorted(ends, reverse=True):  # from the last image on, so that earlier indices keep their meaning
        taken = int(end + 1 < len(ids) and ids[end + 1] == registers.token_id)
        number[end + 1 : end + 1 + taken] = 0
        source = np.insert(source, end + 1 + taken, np.full(registers.count - taken, end + taken))
        number = np.insert(number, end + 1 + taken, np.arange(taken, registers.count))
    return Placed(source, number)


def image_ends(visual: Bool[np.ndarray, " before"], counts: Sequence[int]) -> list[int]:
    """The index of each image's last visual token in one prompt, from the numbers of visual tokens of its images."""
    return [int(i) for i in np.flatnonzero(visual)[np.cumsum(counts, dtype=int) - 1]] if len(counts) else []
