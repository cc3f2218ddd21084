"""Keeps the pictures of a run's samples, for programs that show results, such as the report page."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlm_jax.data.example import Example
from vlm_jax.data.images import as_rgb
from vlm_jax.runs.artifacts import Artifact, Schema
from vlm_jax.runs.folder import Run

#: The folder of the pictures, the file in it that lists them, and the longest side of a picture in pixels.
FOLDER, INDEX, SIDE = "pictures", "index.json", 336
#: How many samples of a run have their pictures kept.
MOST = 200
PICTURES = Schema(
    "pictures",
    {
        "": "a list with an object for each sample",
        "id": "the sample",
        "task": "its task",
        "pictures": "files of its pictures, at most 336 pixels wide and high",
        "question": "its question",
        "answers": "its gold answers, the most frequent first",
        "choices": "its choices; null if it is no multiple-choice question",
    },
)


def save_pictures(run: Run, examples: Sequence[Example], most: int = MOST) -> None:
    """Writes pictures of a run's examples into its folder ``pictures``, with their questions and answers in
    ``index.json``. A picture that several examples share is written once. Only the first process calls it.

    Args:
        most: the number of examples; every task gets an equal share of it.
    """
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    turns = itertools.chain(*itertools.zip_longest(*tasks.values()))
    chosen = list(itertools.islice((example for example in turns if example is not None), most))

    def write(folder: Path) -> None:
        folder.mkdir()
        index = []
        for example in chosen:
            files = [_save(folder, as_rgb(image)) for image in example.images]
            said = {"question": example.question, "answers": example.answers, "choices": example.choices}
            index.append({"id": example.id, "task": example.task, "pictures": files, **said})
        (folder / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    artifact = Artifact("pictures", "Pictures, questions and answers of the samples", PICTURES)
    if (run.folder / FOLDER).exists():
        run.add_locally(FOLDER, artifact)  # an earlier session may have been killed before this line
    else:
        run.write_locally(FOLDER, write, artifact)


def _save(folder: Path, image: Image.Image) -> str:
    """Writes a picture under a name that its content gives, and returns the name."""
    image.thumbnail((SIDE, SIDE))
    name = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
    small = image.width * image.height <= 128 * 128  # JPEG would blur the few pixels of a drawing
    file = f"{name}.png" if small else f"{name}.jpg"
    if not (folder / file).exists():
        image.save(folder / file, quality=88) if not small else image.save(folder / file)
    return file
