"""easy-VQA: a small, synthetic, published benchmark inside a Python package (PyPI ``easy-vqa``, MIT).

The package's metadata gives the paths of its data files. Its code is not imported.
"""

import functools
import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_jax.data.example import Example
from vlm_jax.data.images import LazyImages
from vlm_jax.data.splits import SplitRow, deal
from vlm_jax.errors import UserError, nearest

NAME = PACKAGE = "easy-vqa"
#: Our split -> (the package's part, size). Three splits share the train part; they are separated by image.
SPLITS = {"trace": ("train", 1000), "train": ("train", 36000), "eval": ("train", 1000), "test": ("test", 9673)}


class EasyVqaQuestion(NamedTuple):
    text: str
    answer: str
    image: int


def read_questions(part: str) -> list[EasyVqaQuestion]:
    """All questions of the package's ``train`` or ``test`` part, in its order."""
    return [EasyVqaQuestion(*record) for record in json.loads((_folder() / part / "questions.json").read_text())]


def load_easy_vqa(split: str, limit: int | None) -> list[Example]:
    """The first ``limit`` examples of a split. ``subtask`` is the type of the question: yes/no, shape or colour."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {NAME}{nearest(split, SPLITS)}")
    part = SPLITS[split][0]
    questions, folder = read_questions(part), _folder() / part / "images"
    examples = []
    for number in _row_numbers(part)[split][:limit]:
        text, answer, image = questions[number]
        label = f"{NAME}/{part}/{number}"
        examples.append(
            Example(
                id=label,
                images=LazyImages([(folder / f"{image}.png").read_bytes], label),
                question=text,
                answers=(answer,),
                family="perception",
                task=NAME,
                subtask=question_type(answer),
                image_id=f"{NAME}/{part}/{image}",
            )
        )
    return examples


def easy_vqa_source() -> dict:
    """The package's version and its numbers of rows, for a run's manifest."""
    version = importlib.metadata.version(PACKAGE)
    rows = {part: len(read_questions(part)) for part in ("train", "test")}
    return {"dataset": f"pypi:{NAME}=={version}", "licence": "MIT", "rows": rows}


def question_type(answer: str) -> str:
    """The type of a question: yes/no, shape or colour. The answer decides it."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


def question_only_baseline(examples: Sequence[Example] | None = None) -> dict[str, float]:
    """The accuracy that is possible without the image: the answer to a question is always the one that is most
    frequent for it in the train part.

    Args:
        examples: the examples to score; by default the whole test part, which gives 67.0 %.

    Returns:
        ``accuracy`` over all examples, and the accuracy of each type of question under its name.
    """
    counts: dict[str, Counter] = {}
    for text, answer, _ in read_questions("train"):
        counts.setdefault(text, Counter())[answer] += 1
    commonest = {text: counter.most_common(1)[0][0] for text, counter in counts.items()}
    scored = read_questions("test") if examples is None else [(e.question, e.answers[0], None) for e in examples]
    correct: dict[str, list[bool]] = {}
    for text, answer, _ in scored:
        for name in ("accuracy", question_type(answer)):
            correct.setdefault(name, []).append(commonest.get(text) == answer)
    return {name: sum(values) / len(values) for name, values in correct.items()}


def show_baseline(examples: Sequence[Example]) -> None:
    """Prints :func:`question_only_baseline` if all examples are from easy-VQA; otherwise prints nothing."""
    if examples and all(example.task == NAME for example in examples):
        accuracy = question_only_baseline(examples)["accuracy"]
        print(f"{NAME}: the commonest answer to the question alone, without its image, scores {accuracy:.3f}")


@functools.cache
def _row_numbers(part: str) -> dict[str, list[int]]:
    """Split -> the numbers of its questions in a part of the package."""
    rows = [
        SplitRow(number, f"{NAME}/{part}/{number}", f"{NAME}/{part}/{question.image}", number)
        for number, question in enumerate(read_questions(part))
    ]
    return deal(rows, {split: size for split, (split_part, size) in SPLITS.items() if split_part == part}, {})


@functools.cache
def _folder() -> Path:
    """The package's data folder."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the task {NAME} needs the package {NAME}: pip install 'vlm-jax[{NAME}]' "
            "(it also installs a top-level package called test)"
        ) from None
    marker = next((file for file in files if file.as_posix() == "easy_vqa/data/test/questions.json"), None)
    if marker is None or not marker.locate().is_file():
        raise UserError(f"the package {NAME} lacks its data files: install it again")
    return Path(marker.locate()).parent.parent
