"""The record that every task consists of."""

import dataclasses
import re
from collections.abc import Sequence

from PIL import Image

#: What marks the place of an image in a question, for every model family.
IMAGE_MARK = "<image>"
_LEADING_MARKS = re.compile(rf"(?:\s*{IMAGE_MARK})+\s*")
TASK_FAMILIES: tuple[str, ...] = ("knowledge", "perception")


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with its images and its acceptable answers."""

    id: str
    images: Sequence[Image.Image]
    """Pillow's images, of any mode; empty for a question about text alone. A public dataset's are decoded each time
    they are read."""
    question: str
    """The text of the question, in which the hint and the choices (if any) are already written."""
    answers: tuple[str, ...]
    """All answers of the annotators with repeats, the most frequent first. ``answers[0]`` is the gold string, which
    tracing and training teacher-force."""
    choices: tuple[str, ...] | None = None
    """The choices of a multiple-choice question."""
    family: str | None = None
    """A name in :data:`TASK_FAMILIES`, where the task belongs to one."""
    task: str = ""
    gold: int | None = None
    """The index of the right choice."""
    metric: str = "exact_match"
    """The metric of the task's own benchmark: a name in :data:`eval.judging.METRICS`."""
    subtask: str | None = None
    """The benchmark's category of the question, where it has categories."""
    image_id: str | None = None
    """A name of the image, by which questions about the same image are recognised."""
    group: str | None = None
    """A name that examples share which are scored together, such as the rotations of one multiple-choice question."""
    subject: str | None = None
    """The part of the question that it is about, such as "France", written exactly once in it. None: all of the
    question."""
    prompt: str | None = None
    """The user's message, in which ``{QUESTION}`` stands for the question; None for P0's
    (:data:`vlm_jax.prompts.P0_PROMPT`)."""
    chat_template: bool = True
    """Whether the prompt is a user's turn in the model's chat template. If not, the model continues the bare text."""

    def without_images(self) -> "Example":
        """The same question without its images, for a text-only model."""
        return dataclasses.replace(self, images=(), question=self.question.replace(IMAGE_MARK, "").strip())


def without_leading_marks(text: str) -> tuple[str, int]:
    """The text without the marks of images at its beginning, and their number."""
    marks = _LEADING_MARKS.match(text)
    return (text[marks.end() :], marks[0].count(IMAGE_MARK)) if marks else (text, 0)
