"""Example -> tokens: the prompt, the chat template, the gold answer, and which token belongs to which span.

Spans come from the tokeniser's character offsets. The chat template is rendered around a placeholder, so where
the question begins is known by construction and no text or token id is ever searched for.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vlm_jax.config import Config
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.families.base import Chat
from vlm_jax.inputs import LENGTH_BUCKET, Inputs, bucket

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
    tokenizer = processor.tokenizer
    images = [image for example in examples for image in example.images]
    if images and config.vision is None:
        raise UserError(f"a {config.family} is a text-only model and takes no images: choose a vision-language model")
    try:
        pixels = processor.image_processor(images=images, return_tensors="np") if images else {}
    except ValueError as error:  # such as a picture that is 200 times as wide as high
        raise UserError(f"the image processor refuses an image ({error}): leave it out or change its shape") from None
    counts = iter(config.vision.token_counts(pixels) if images else ())
    chat = FAMILIES[config.family].chat
    texts, ranges = zip(
        *(
            _render(example, text, processor, chat, [next(counts) for _ in example.images], with_answer)
            for example, text in zip(examples, prompts, strict=True)
        ),
        strict=True,
    )
    # Where the chat template does not write the token that begins a text, the tokeniser does.
    bos = tokenizer.bos_token
    begun = bos is not None and texts[0].startswith(bos)
    tokens = tokenizer(list(texts), add_special_tokens=not begun, return_offsets_mapping=True)
    rows, offsets = tokens["input_ids"], tokens["offset_mapping"]
    most = min(tokenizer.model_max_length, config.text.max_position_embeddings or tokenizer.model_max_length)
    for example, row in zip(examples, rows, strict=True):
        if len(row) > most:
            raise UserError(
                f"example {example.id!r} has {len(row)} tokens, but the model takes {most}: "
                "shorten its question or use smaller images"
            )
    total = bucket(max(map(len, rows)), step)
    ids = np.full((len(rows), total), config.pad_token_id, np.int32)
    mask = np.zeros((len(rows), total), bool)
    spans = {name: np.zeros((len(rows), total), bool) for name in SPANS}
    for i, (row, places) in enumerate(zip(rows, offsets, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
        begin, end = np.array(places).T
        for name, low, high in ranges[i]:
            spans[name][i, : len(row)] |= (begin < high) & (end > low)
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


def _render(example: Example, prompt: str, processor, chat: Chat, counts: list[int], with_answer: bool):
    """The whole text of one example and its spans as ``(name, first character, past the last)``."""
    tokenizer = processor.tokenizer
    # The named special tokens, and those that only the vocabulary marks as such.
    special_tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for special in sorted({*special_tokens, *tokenizer.all_special_tokens, chat.image, chat.placeholder} - {""}):
        if special in example.question or special in example.answers[0]:
            raise UserError(f"example {example.id!r} holds the special token {special!r}: remove it from the text")
    content = [{"type": "image"} for _ in example.images]
    content.append({"type": "text", "text": prompt.replace("{QUESTION}", _PLACEHOLDER)})
    try:
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        before, after = rendered.split(_PLACEHOLDER)
    except ValueError as error:
        raise UserError(
            f"the model's chat template cannot show a question ({error}): use an instruction-tuned checkpoint"
        ) from None
    ranges = []
    if example.images:
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


def check_fit(examples: Sequence[Example], processor, config: Config) -> None:
    """Raises a UserError for the first example that cannot be encoded, before any work is spent on the others."""
    longest(examples, processor, config)


def longest(examples: Sequence[Example], processor, config: Config) -> tuple[int, int]:
    """The longest prompt with its answer, rounded up, and the longest answer with the end of its turn, in tokens: so
    that one program serves all examples, however few are encoded at once.

    Raises:
        UserError: for an example that cannot be encoded.
    """
    length = width = 0
    for first in range(0, len(examples), _WINDOW):
        batch = encode(examples[first : first + _WINDOW], processor, config)
        length = max(length, batch.inputs.input_ids.shape[1])
        width = max(width, int((batch.spans["answer"] | batch.spans["end"]).sum(1).max()))
    return length, width


def positions(mask: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where each row of a ``(B, T)`` mask is set: ``index``, ``valid`` ``(B, A)``, A the largest count or ``width``."""
    counts = mask.sum(1)
    width = width or int(counts.max())
    valid = np.arange(width) < counts[:, None]
    index = np.zeros(valid.shape, np.int32)
    index[valid] = np.nonzero(mask)[1]
    return index, valid
