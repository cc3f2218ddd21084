"""Example -> tokens: the prompt, the chat template, the gold answer, and which token belongs to which span.

Spans come from the tokeniser's character offsets. The chat template is rendered around a placeholder, so where
the question begins is known by construction and no text or token id is ever searched for.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from vlm_jax.config import Config
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.families.base import Chat
from vlm_jax.inputs import LENGTH_BUCKET, Inputs, bucket
from vlm_jax.runs.processes import everywhere

#: P0, appendix C.1.
P0_PROMPT = (
    "You are a visual question answering system.\n"
    "Answer the question *only* with the final answer word or phrase.\n"
    "Do not add any explanation.\n"
    "\n"
    "Question: {QUESTION}\n"
    "Answer:"
)
#: The user's words alone.
PLAIN_PROMPT = "{QUESTION}"

#: A private-use character: stands for the question while the chat template is rendered.
_PLACEHOLDER = "\ue000"
#: Examples that are encoded together: bounds the memory their images take.
_WINDOW = 512
SPANS = ("image", "image_end", "question", "answer", "end")


class Batch(NamedTuple):
    """Inputs of ``B`` examples, their token spans, ``(B, T)`` bool each, and the most images that a row has.

    ``image``: visual tokens; ``image_end``: the token that closes an image; ``question``: what fills
    ``{QUESTION}``; ``answer``: the gold tokens; ``end``: the token that ends the answer's turn.
    """

    inputs: Inputs
    spans: dict[str, np.ndarray]
    images: int


def encode(
    examples: Sequence[Example],
    processor,
    config: Config,
    *,
    prompt: str | Sequence[str] = P0_PROMPT,
    with_answer: bool = True,
    step: int = LENGTH_BUCKET,
) -> Batch:
    """Tokens of the examples, right-padded to a bucketed length.

    Args:
        prompt: what the user says, with ``{QUESTION}`` in it; one for all examples or one each.
        with_answer: append the gold answer ``answers[0]`` and the end of its turn (teacher forcing).
        step: lengths are rounded up to a multiple of this.

    Raises:
        UserError: a question that does not fit the model's context or holds a special token.
    """
    prompts = [prompt] * len(examples) if isinstance(prompt, str) else prompt
    shown = [list(example.images) for example in examples]  # each is decoded when it is read
    sizes = [_sizes(images, processor, config) for images in shown]
    rows = _tokens(examples, prompts, sizes, processor, config, with_answer)
    images = [image for row in shown for image in row]
    with _image_errors():
        pixels = processor.image_processor(images=images, return_tensors="np") if images else {}
    total = bucket(max(len(row.ids) for row in rows), step)
    ids = np.full((len(rows), total), config.pad_token_id, np.int32)
    mask = np.zeros((len(rows), total), bool)
    spans = {name: np.zeros((len(rows), total), bool) for name in SPANS}
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, True
        for name, span in row.spans.items():
            spans[name][i, : len(row.ids)] = span
    return Batch(
        Inputs.from_hf(
            config,
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=spans["image"] if images else None,
            pixel_values=pixels.get("pixel_values"),
            image_grid_thw=pixels.get("image_grid_thw"),
        ),
        spans,
        max(len(example.images) for example in examples),
    )


def _sizes(images: Iterable[Image.Image], processor, config: Config) -> list[tuple[int, int]]:
    """Patches, padding included, and visual tokens of each image, which is not processed for it."""
    images = list(images)
    if images and config.vision is None:
        raise UserError(f"a {config.family} is a text-only model and takes no images: choose a vision-language model")
    with _image_errors():
        return [config.vision.size_of(processor.image_processor, image) for image in images]


class _Tokens(NamedTuple):
    """One example: token ids, and which of them belong to which span."""

    ids: list[int]
    spans: dict[str, np.ndarray]


def _tokens(
    examples: Sequence[Example],
    prompts: Sequence[str],
    sizes: Sequence[Sequence[tuple[int, int]]],
    processor,
    config: Config,
    with_answer: bool,
) -> list[_Tokens]:
    tokenizer, chat = processor.tokenizer, FAMILIES[config.family].chat
    texts, ranges = zip(
        *(
            _render(example, text, processor, chat, [tokens for _, tokens in own], with_answer)
            for example, text, own in zip(examples, prompts, sizes, strict=True)
        ),
        strict=True,
    )
    # Where the chat template does not write the token that begins a text, the tokeniser does.
    bos = tokenizer.bos_token
    begun = bos is not None and texts[0].startswith(bos)
    tokens = tokenizer(list(texts), add_special_tokens=not begun, return_offsets_mapping=True)
    most = min(tokenizer.model_max_length, config.text.max_position_embeddings or tokenizer.model_max_length)
    rows = []
    for i, (example, ids) in enumerate(zip(examples, tokens["input_ids"], strict=True)):
        if len(ids) > most:
            raise UserError(
                f"example {example.id!r} has {len(ids)} tokens, but the model takes {most}: "
                "shorten its question or use smaller images"
            )
        begin, end = np.array(tokens["offset_mapping"][i]).T
        spans = {name: np.zeros(len(ids), bool) for name in SPANS}
        for name, low, high in ranges[i]:
            spans[name] |= (begin < high) & (end > low)
        rows.append(_Tokens(ids, spans))
    return rows


@contextlib.contextmanager
def _image_errors() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ValueError as error:  # such as a picture that is 200 times as wide as high
        raise UserError(f"the image processor refuses an image ({error}): leave it out or change its shape") from None


def _render(example: Example, prompt: str, processor, chat: Chat, counts: list[int], with_answer: bool):
    """The whole text of one example and its spans as ``(name, first character, past the last)``."""
    tokenizer = processor.tokenizer
    # The named special tokens, and those that only the vocabulary marks as such.
    special_tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for special in sorted({*special_tokens, *tokenizer.all_special_tokens, chat.image, chat.placeholder} - {""}):
        if special in example.question or special in example.answers[0]:
            raise UserError(f"example {example.id!r} holds the special token {special!r}: remove it from the text")
    content = [{"type": "image"}] * len(example.images)
    content.append({"type": "text", "text": prompt.replace("{QUESTION}", _PLACEHOLDER)})
    try:
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        before, after = rendered.split(_PLACEHOLDER)
    except ValueError as error:
        raise UserError(
            f"the model's chat template cannot show a question ({error}): use an instruction-tuned checkpoint"
        ) from None
    ranges = []
    if len(example.images):
        first, *rest = before.split(chat.placeholder)
        if len(rest) != len(counts):
            raise UserError(f"example {example.id!r}: the chat template shows {len(rest)} of {len(counts)} images")
        before = first
        for count, text in zip(counts, rest, strict=True):
            begin = len(before) + len(chat.before)
            before += chat.before + chat.image * count
            ranges.append(("image", begin, len(before)))
            before += chat.after + text
        if chat.image_end is not None:
            ranges += [("image_end", *m.span()) for m in re.finditer(re.escape(chat.image_end), before)]
    text = before + example.question
    ranges.append(("question", len(before), len(text)))
    text += after
    if with_answer:
        # Where the prompt ends in a word, the space before the answer is its first token's, as in training data.
        answer = text + ("" if text[-1:].isspace() else " ") + example.answers[0]
        turn_end = ((tokenizer.chat_template or processor.chat_template) and chat.turn_end) or tokenizer.eos_token
        ranges += [("answer", len(text), len(answer)), ("end", len(answer), len(answer) + len(turn_end))]
        text = answer + turn_end
    return text, ranges


def batches(
    examples: Sequence[Example],
    processor,
    config: Config,
    size: int,
    *,
    align: int = 0,
    step: int = LENGTH_BUCKET,
    **how,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of ``size`` rows in which a thousand examples meet a handful of shapes.

    Args:
        align: also keep questions together that begin within the same ``align`` tokens (0: wherever they begin).
        step: lengths are rounded up to a multiple of this.
        how: passed to :func:`encode`.

    Yields:
        The examples' indices and their batch. A short batch is filled up by repeating its last row, so the batch may
        have more rows than there are indices.
    """
    most = max((len(example.images) for example in examples), default=0)
    for first in range(0, len(examples), _WINDOW):
        whole = encode(examples[first : first + _WINDOW], processor, config, step=step, **how)
        lengths, begins = whole.inputs.attention_mask.sum(1), whole.spans["question"].argmax(1)
        groups = defaultdict(list)
        for row, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
            groups[bucket(int(length), step), int(begin) // align if align else 0].append(row)
        for (length, _), rows in sorted(groups.items()):
            for at in range(0, len(rows), size):
                part = rows[at : at + size]
                filled = part + part[-1:] * (size - len(part))
                inputs = whole.inputs.take(filled, size * most).cut(length)
                spans = {name: span[filled, :length] for name, span in whole.spans.items()}
                yield [first + row for row in part], Batch(inputs, spans, most)


def shape_of(batch: Batch) -> tuple:
    """What a program is compiled for."""
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch.inputs))


class Room(NamedTuple):
    """What each of some examples fits in, so that one program serves all of them, however few are encoded at once.

    Every row has as much: where one picture is far larger than the others, the vision tower works for it in every row.
    """

    length: int
    """Tokens of a prompt with its answer, rounded up."""
    answer: int
    """Tokens of an answer with the end of its turn."""
    images: int
    """Images of an example."""
    patches: int
    """Patches of an image, padding included."""


def room_of(examples: Sequence[Example], processor, config: Config, with_answer: bool = True) -> Room:
    """The room that the examples need. Images are decoded for it, not processed. Of several processes each looks at its
    share of the examples.

    Args:
        with_answer: with the gold answer after the prompt.

    Raises:
        UserError: for an example that cannot be encoded.
    """

    def own() -> Room:
        share = examples[jax.process_index() :: jax.process_count()]
        rooms = [Room(0, 0, 0, 0)]
        for at in range(0, len(share), _WINDOW):
            part = share[at : at + _WINDOW]
            sizes = [_sizes(example.images, processor, config) for example in part]
            rows = _tokens(part, [P0_PROMPT] * len(part), sizes, processor, config, with_answer)
            rooms += (
                Room(
                    bucket(len(row.ids)),
                    int((row.spans["answer"] | row.spans["end"]).sum()),
                    len(own),
                    max((patches for patches, _ in own), default=0),
                )
                for row, own in zip(rows, sizes, strict=True)
            )
        return _largest(rooms)

    return _largest(everywhere(own))


def _largest(rooms: Iterable[Sequence[int]]) -> Room:
    return Room(*map(max, zip(*rooms, strict=True)))


def check_fit(examples: Sequence[Example], processor, config: Config, with_answer: bool = True) -> None:
    """Raises a UserError for an example that cannot be encoded, before any work is spent on the others; in all
    processes, if one of them finds it."""
    room_of(examples, processor, config, with_answer)


class Fitted(NamedTuple):
    """Rows of one shape: their inputs, and where the gold tokens and the end of their turn are: ``index``, ``valid``
    ``(B, A)``."""

    inputs: Inputs
    index: np.ndarray
    valid: np.ndarray


def fitted(examples: Sequence[Example], room: Room, processor, config: Config, at: np.ndarray | None = None) -> Fitted:
    """The examples in as much room as all of theirs need, each row with its images (:meth:`Inputs.aligned`).

    Args:
        at: which rows of a larger batch these are.
    """
    batch = encode(examples, processor, config, step=room.length)
    inputs = batch.inputs
    if room.images and inputs.images is None:  # the others of the batch have some
        blank, _ = config.vision.images(**config.vision.blank(1, 1))
        inputs = inputs.replace(images=blank, image_index=np.full(inputs.input_ids.shape, -1, np.int32))
    answers = positions(batch.spans["answer"] | batch.spans["end"], room.answer)
    return Fitted(inputs.aligned(room.images, room.patches, at), *answers)


def positions(mask: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where each row of a ``(B, T)`` mask is set: ``index``, ``valid`` ``(B, A)``, A the largest count or ``width``."""
    counts = mask.sum(1)
    width = width or int(counts.max())
    valid = np.arange(width) < counts[:, None]
    index = np.zeros(valid.shape, np.int32)
    index[valid] = np.nonzero(mask)[1]
    return index, valid
