"""The one record every task is made of."""

import dataclasses

from PIL import Image

FAMILIES = ("knowledge", "perception")


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with its images and its acceptable answers.

    ``question`` is the text asked, with the hint and the choices (if any) already written into it.
    ``answers[0]`` is the gold string: the one that is teacher-forced.
    ``images`` are RGB, and may be empty for a question about text alone.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    family: str | None = None
    task: str = ""
