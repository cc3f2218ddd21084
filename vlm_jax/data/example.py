"""The one record every task is made of."""

import dataclasses
from collections.abc import Sequence

from PIL import Image

TASK_FAMILIES = ("knowledge", "perception")


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with its images and its acceptable answers.

    ``question`` is the text asked, with the hint and the choices (if any) already written into it.
    ``answers`` are all that annotators gave, repeats kept, the commonest first: ``answers[0]`` is the gold string, the
    one that is teacher-forced.
    ``images`` are RGB, and may be empty for a question about text alone; they may be decoded only when they are read.
    ``choices`` of a multiple-choice question, of which ``choices[gold]`` is right.
    """

    id: str
    images: Sequence[Image.Image]
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    family: str | None = None
    task: str = ""
    gold: int | None = None
    metric: str = "exact_match"
    """The measure of the task's own benchmark: a name in :data:`eval.judging.METRICS`."""
    subtask: str | None = None
    """The benchmark's category of the question, where it has any."""
    image_id: str | None = None
    """Which image is shown, where several questions share one."""
    group: str | None = None
    """Examples that are scored together: the rotations of one multiple-choice question, the pair about one image."""
