"""The options about data that all commands with a task share."""

import dataclasses
from pathlib import Path
from typing import Literal

from vlm_jax.data.example import Example
from vlm_jax.errors import UserError
from vlm_jax.files import read_text

#: What stands for the question in a prompt.
QUESTION = "{QUESTION}"


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How examples are read and shown to the model."""

    data_root: Path | None = None
    """Folder with local copies of datasets from the Hugging Face hub, as ROOT/OWNER/NAME or ROOT/NAME. By default
    datasets are read from the hub."""
    choices: Literal["listed", "lettered", "hidden"] = "listed"
    """How a multiple-choice question shows its choices. listed: as a list of texts, and the answer is a text; lettered:
    as lines with letters, and the answer is a letter; hidden: no choice is shown, and the answer is a text. P0 does not
    specify this."""
    stream: bool = False
    """Read a dataset over the network instead of storing it on the disk first. This is faster if only a few samples of
    a large dataset are needed."""
    skip_bad: bool = False
    """Leave out examples that cannot be read, or that do not fit the model, instead of stopping. How many these are is
    printed; manifest.json lists them with the reasons (left_out)."""
    prompt: str | None = None
    """The user's message, in which {QUESTION} stands for the question; or a file that holds it. By default P0's prompt
    for visual question answering."""
    chat_template: bool = True
    """Write the prompt as a user's turn in the model's chat template. Without it the model continues the bare prompt,
    as a base model does."""
    family: Literal["knowledge", "perception"] | None = None
    """The family of the examples of a file or folder that name none."""

    def shown(self, examples: list[Example]) -> list[Example]:
        """The examples with these options' prompt and chat template.

        Raises:
            UserError: if the prompt has not one place for the question, or its file cannot be read.
        """
        if self.prompt is None and self.chat_template:
            return examples
        prompt = None if self.prompt is None else read_prompt(self.prompt)
        return [dataclasses.replace(e, prompt=prompt, chat_template=self.chat_template) for e in examples]


def read_prompt(text_or_file: str) -> str:
    """A prompt, given as its text or as the path of its file. A text that lacks ``{QUESTION}`` is a path. The ends of
    line behind a file's last word are not part of the prompt.

    Raises:
        UserError: if the prompt has not one ``{QUESTION}``, or the file cannot be read.
    """
    prompt, where = text_or_file, f"--prompt {text_or_file[:60]!r}"
    if QUESTION not in prompt:
        if not _is_file(prompt):
            raise UserError(f"{where} is no file and has no {QUESTION}: put {QUESTION} where the question goes")
        prompt = read_text(Path(prompt)).rstrip("\r\n")
    if prompt.count(QUESTION) != 1:
        raise UserError(f"{where} has {QUESTION} {prompt.count(QUESTION)} times: write it once")
    return prompt


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # it is too long for a name, or holds a null character
        return False
