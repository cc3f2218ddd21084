"""Text in, text out: one question to a model, and the tokens of a prompt as a reader sees them."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

import vlm_jax
from interventions.kinds.groups import GROUPS, bind, label
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import P0_PROMPT, Batch, encode


def ask(
    model: Model,
    processor: Processor,
    image: Any,
    question: str,
    interventions: Any = (),
    *,
    prompt: str = P0_PROMPT,
    max_new_tokens: int = 32,
    steps: Literal["all", "prefill"] = "all",
) -> str:
    """The model's greedy answer to a question.

    Args:
        image: a picture or the path of one; a list of several; None for a question without a picture.
        interventions: one or several; token groups such as "question" are looked up in the prompt.
        prompt: the user's message, in which ``{QUESTION}`` stands for the question. The default is that of the
            commands; "{QUESTION}" asks without instructions.
        max_new_tokens: the largest number of tokens in the answer.
        steps: "all" if interventions also act on generated tokens, "prefill" if they act on the prompt only.

    Raises:
        UserError: for a file that is no picture, a prompt that does not fit the model, or an intervention that touches
            nothing.
    """
    images = [] if image is None else [_opened(one) for one in (image if isinstance(image, list | tuple) else [image])]
    example = Example("question", tuple(images), question, answers=("unknown",), task="question")
    batch = encode([example], processor, model.config, prompt=prompt, with_answer=False)
    acting = bind(interventions, batch)
    tokens = vlm_jax.generate(model, batch.inputs, max_new_tokens, acting, steps=steps)
    return processor.tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)[0].strip()


def _opened(image: Any) -> Any:
    if not isinstance(image, str | Path):
        return image
    try:
        with Image.open(image) as opened:
            return opened.copy()
    except OSError as error:
        raise UserError(f"{image} is no picture that can be read ({type(error).__name__}): name another file") from None


class Token(NamedTuple):
    """A token of a prompt, or a run of visual tokens."""

    start: int
    """Its position in the row."""
    count: int
    """1, or how many visual tokens or registers stand here in a row."""
    text: str
    group: str
    """One of :data:`interventions.GROUPS`."""


class Tokens(list[Token]):
    """The tokens of a prompt in their order. As text, each is shown behind its position and its group."""

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return Tokens(found) if isinstance(place, slice) else found

    def __repr__(self) -> str:
        places = [f"{one.start}" if one.count == 1 else f"{one.start}-{one.start + one.count - 1}" for one in self]
        wide = max(map(len, places), default=0)
        return "\n".join(f"{at:>{wide}}  {one.group:9s}  {one.text!r}" for at, one in zip(places, self, strict=True))


def tokens_of(batch: Batch, row: int, processor: Processor) -> Tokens:
    """The tokens of one row of an encoded batch, without padding: position, text and token group. Visual tokens and
    registers of one image are one entry.

    Raises:
        UserError: for a row that the batch lacks.
    """
    ids, labels = np.asarray(batch.inputs.input_ids), label(batch)
    if not 0 <= row < len(ids):
        raise UserError(f"the batch has no row {row}: name one of 0 to {len(ids) - 1}")
    owner, found = _pictures(batch)[row], Tokens()
    for position in np.flatnonzero(np.asarray(batch.inputs.attention_mask)[row]).tolist():
        group, text = GROUPS[labels[row, position]], processor.tokenizer.decode([int(ids[row, position])])
        same = bool(found) and found[-1].group == group and found[-1].start + found[-1].count == position
        if same and owner[position] >= 0 and owner[position] == owner[position - 1]:
            found[-1] = found[-1]._replace(count=found[-1].count + 1)
        else:
            found.append(Token(position, 1, text, group))
    return found


def _pictures(batch: Batch) -> np.ndarray:
    """The number of the picture to which each visual token or register belongs, ``(B, T)``; -1 for other tokens."""
    inputs = batch.inputs
    owner = np.full(np.shape(inputs.input_ids), -1)
    if inputs.images is not None and inputs.image_index is not None:
        index = np.asarray(inputs.image_index)
        owner = np.where(index >= 0, index // inputs.images.stride, -1)
    if inputs.register_index is not None:
        number = np.asarray(inputs.register_index)
        owner = np.where(number >= 0, np.cumsum(number == 0, 1), owner)
    return owner
