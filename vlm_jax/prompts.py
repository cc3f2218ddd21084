"""Turns examples into tokens by the prompt and the chat template, and finds the tokens of the image, question and
answer.

:mod:`vlm_jax.rendering` writes the text and says where they are in it. The tokeniser's character offsets then give
their tokens.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from vlm_jax.config import Config
from vlm_jax.data import Example
from vlm_jax.data.images import as_rgb
from vlm_jax.errors import UserError
from vlm_jax.families import FAMILIES
from vlm_jax.inputs import LENGTH_BUCKET, Inputs, bucket
from vlm_jax.mesh.sharding import shards
from vlm_jax.processor import Processor
from vlm_jax.registers import Registers, image_ends, place
from vlm_jax.rendering import Renderer
from vlm_jax.runs.processes import everywhere
from vlm_jax.showing import shown
from vlm_jax.typing import ArrayLike

#: P0, appendix C.1.
P0_PROMPT = (
    "You are a visual question answering system.\n"
    "Answer the question *only* with the final answer word or phrase.\n"
    "Do not add any explanation.\n"
    "\n"
    "Question: {QUESTION}\n"
    "Answer:"
)
#: The question without any instruction.
PLAIN_PROMPT = "{QUESTION}"

#: Number of examples that are encoded together. It limits the memory that their images need.
_WINDOW = 512
SPANS = ("image", "image_end", "register", "question", "subject", "answer", "end")


@shown
class Batch(NamedTuple):
    """``B`` encoded examples."""

    inputs: Inputs
    spans: dict[str, Bool[np.ndarray, "batch tokens"]]
    """Name of a span -> its tokens ``(B, T)``. ``image``: visual tokens; ``image_end``: the token that closes an image,
    unless it is a register; ``register``: the registers behind images (:class:`vlm_jax.registers.Registers`);
    ``question``: the tokens in place of ``{QUESTION}``; ``subject``: those of the part that the example names as its
    subject, or else the question's; ``answer``: the gold tokens; ``end``: the token that ends the
    answer's turn."""
    images: int
    """The largest number of images in an example."""


def encode(
    examples: Sequence[Example],
    processor: Processor,
    config: Config,
    *,
    prompt: str | Sequence[str] | None = None,
    with_answer: bool = True,
    step: int = LENGTH_BUCKET,
) -> Batch:
    """Encodes examples, right-padded to a common length.

    Args:
        processor: the model's processor, as :func:`vlm_jax.load` returns it.
        prompt: the user's message, in which ``{QUESTION}`` stands for the question; one for all examples, or a list
            with one for each. None: the examples' own (:func:`prompt_of`).
        with_answer: append the gold answer ``answers[0]`` and the end of its turn (teacher forcing).
        step: the length is rounded up to a multiple of this.

    Raises:
        UserError: if a question does not fit the model's context or contains a special token; if it marks places for
            images (``<image>``), but not one for each; if the chat template changes it; if a text-only model gets
            images; if the processor refuses an image.
    """
    prompts = [prompt] * len(examples) if isinstance(prompt, str) else prompt or list(map(prompt_of, examples))
    images_of = [_images(example) for example in examples]  # decodes every image once
    sizes = [_sizes(images, processor, config) for images in images_of]
    rows = _tokens(examples, prompts, sizes, processor, config, with_answer)
    images = [image for row in images_of for image in row]
    with _image_errors():
        pixels = processor.image_processor(images=images, return_tensors="np") if images else {}
    total = bucket(max(len(row.ids) for row in rows), step)
    ids = np.full((len(rows), total), config.pad_token_id, np.int32)
    mask = np.zeros((len(rows), total), bool)
    number = np.full((len(rows), total), -1, np.int32)
    spans = {name: np.zeros((len(rows), total), bool) for name in SPANS}
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], mask[i, : len(row.ids)], number[i, : len(row.ids)] = row.ids, True, row.number
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
            register_index=number if config.text.registers is not None else None,
        ).replace(answered=with_answer),
        spans,
        max(len(example.images) for example in examples),
    )


def prompt_of(example: Example) -> str:
    """The user's message of an example, with ``{QUESTION}``: its own, or else P0's."""
    return P0_PROMPT if example.prompt is None else example.prompt


def _images(example: Example) -> list[Image.Image]:
    """The images as a viewer shows them, in RGB, whatever kind of image a program gave."""
    shown = []
    for number, image in enumerate(example.images, 1):
        try:
            shown.append(as_rgb(image))
        except UserError as error:
            raise UserError(f"example {example.id!r}, image {number}: {error}") from None
        except Exception as error:  # a file that Pillow opened may be cut short or closed; an array is no image
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(
                f"example {example.id!r}, image {number} cannot be shown ({reason}): give a whole Pillow image"
            ) from None
        if not all(shown[-1].size):
            raise UserError(f"example {example.id!r}, image {number} has no pixels: leave it out")
    return shown


def _sizes(images: Iterable[Image.Image], processor: Processor, config: Config) -> list[tuple[int, int]]:
    """(Number of patches with padding, number of visual tokens) of each image. The images are not processed."""
    images = list(images)
    if not images:
        return []
    if config.vision is None:
        raise UserError(f"a {config.family} is a text-only model and takes no images: choose a vision-language model")
    with _image_errors():
        return [config.vision.size_of(processor.image_processor, image) for image in images]


class _Tokens(NamedTuple):
    """The token ids of one example; span -> which of the tokens belong to it, ``(T,)`` bool; and each register's number
    within its image, -1 for other tokens."""

    ids: Sequence[int] | np.ndarray
    spans: dict[str, np.ndarray]
    number: np.ndarray


def _tokens(
    examples: Sequence[Example],
    prompts: Sequence[str],
    sizes: Sequence[Sequence[tuple[int, int]]],
    processor: Processor,
    config: Config,
    with_answer: bool,
) -> list[_Tokens]:
    tokenizer, render = processor.tokenizer, Renderer(processor, FAMILIES[config.family].chat)
    rendered = [
        render(example, prompt, [tokens for _, tokens in image_sizes], with_answer)
        for example, prompt, image_sizes in zip(examples, prompts, sizes, strict=True)
    ]
    texts = [text for text, _ in rendered]
    # The tokeniser adds the token that begins a text, unless the chat template has written it.
    bos = tokenizer.bos_token
    has_bos = bos is not None and texts[0].startswith(bos)
    tokens = tokenizer(texts, add_special_tokens=not has_bos, return_offsets_mapping=True)
    context = min(tokenizer.model_max_length, config.text.max_position_embeddings or tokenizer.model_max_length)
    rows = []
    for i, (example, ids) in enumerate(zip(examples, tokens["input_ids"], strict=True)):
        begin, end = np.array(tokens["offset_mapping"][i]).T
        spans = {name: np.zeros(len(ids), bool) for name in SPANS}
        for name, low, high in rendered[i].spans:
            spans[name] |= (begin < high) & (end > low)
        row = _Tokens(ids, spans, np.full(len(ids), -1))
        if config.text.registers is not None:
            row = _with_registers(row, [tokens for _, tokens in sizes[i]], config.text.registers)
        if len(row.ids) > context:
            count = (row.number >= 0).sum()
            raise UserError(
                f"example {example.id!r} has {len(row.ids)} tokens{f', {count} of them registers' if count else ''}, "
                f"but the model takes {context}: "
                + ("use fewer registers" if len(ids) <= context else "shorten its question or use smaller images")
            )
        rows.append(row)
    return rows


def _with_registers(row: _Tokens, counts: list[int], registers: Registers) -> _Tokens:
    """The tokens with registers behind each image; ``counts`` are the images' numbers of visual tokens."""
    ids = np.asarray(row.ids)
    placed = place(ids, image_ends(row.spans["image"], counts), registers)
    spans = {name: placed.kept(span) for name, span in row.spans.items()}
    spans["register"] = placed.number >= 0
    return _Tokens(placed.ids(ids, registers), spans, placed.number)


@contextlib.contextmanager
def _image_errors() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ValueError as error:  # such as a picture that is 200 times as wide as high
        raise UserError(f"the image processor refuses an image ({error}): leave it out or change its shape") from None


def batches(
    examples: Sequence[Example],
    processor: Processor,
    config: Config,
    size: int,
    *,
    align: int = 0,
    step: int = LENGTH_BUCKET,
    **options,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of ``size`` rows of similar length. There are few different shapes, of prompts and of pictures, so few
    programs are compiled. A very large picture makes the vision tower do more work in its own batch only.

    Args:
        align: if not 0, a batch has only questions that begin within the same ``align`` tokens.
        step: lengths are rounded up to a multiple of this.
        options: passed to :func:`encode`.

    Yields:
        The examples' indices and their batch. A short batch is filled up by repeating its last row, so it can have more
        rows than indices: up to ``size`` if another batch of its length has as many, or else to a power of two.
    """
    image_count = max((len(example.images) for example in examples), default=0)
    largest: Counter[int] = Counter()  # length -> how many of its examples could be in one batch, in any window so far
    for first in range(0, len(examples), _WINDOW):
        window = encode(examples[first : first + _WINDOW], processor, config, step=step, **options)
        lengths, begins = window.inputs.attention_mask.sum(1), window.spans["question"].argmax(1)
        groups = defaultdict(list)
        for row, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
            groups[bucket(int(length), step), int(begin) // align if align else 0].append(row)
        for (length, _), group in groups.items():
            largest[length] = max(largest[length], len(group))
        for (length, _), group in sorted(groups.items()):
            count = _row_count(largest[length], size)
            for start in range(0, len(group), count):
                rows = group[start : start + count]
                filled = rows + rows[-1:] * (count - len(rows))
                inputs = window.inputs.take(filled, count * image_count).cut(length).trimmed()
                spans = {name: span[filled, :length] for name, span in window.spans.items()}
                yield [first + row for row in rows], Batch(inputs, spans, image_count)


def _row_count(largest: int, size: int) -> int:
    """How many rows the batches of a length have, if the largest group of its examples has ``largest``: at most
    ``size``, and a multiple of the devices among which ``size`` rows are split. Few examples need not compute ``size``
    rows. A power of two keeps the number of programs small."""
    devices = shards("batch", size)
    return min(size, -(-(1 << (largest - 1).bit_length()) // devices) * devices)


def shape_of(batch: Batch) -> tuple:
    """The shapes of a batch's arrays. Batches with equal shapes use the same compiled program."""
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch.inputs))


class Room(NamedTuple):
    """A shape that is large enough for each of some examples, so that they can all use one compiled program.

    Every row gets this shape. One very large picture therefore makes the vision tower do more work in every row.
    """

    length: int
    """Number of tokens in a prompt with its answer, rounded up."""
    answer: int
    """Number of tokens in an answer, with the token that ends its turn."""
    images: int
    """Number of images in an example."""
    patches: int
    """Number of patches in an image, with padding."""


def room_of(examples: Sequence[Example], processor: Processor, config: Config, with_answer: bool = True) -> Room:
    """The room that the examples need. Their images are decoded, but not processed. Several processes divide the
    examples among them.

    Args:
        with_answer: whether the gold answer comes after the prompt.

    Raises:
        UserError: for an example that cannot be encoded; raised in all processes.
    """

    def room_of_share() -> Room:
        share = examples[jax.process_index() :: jax.process_count()]
        rooms = [Room(0, 0, 0, 0)]
        for start in range(0, len(share), _WINDOW):
            window = share[start : start + _WINDOW]
            sizes = [_sizes(_images(example), processor, config) for example in window]
            rows = _tokens(window, list(map(prompt_of, window)), sizes, processor, config, with_answer)
            rooms += (
                Room(
                    bucket(len(row.ids)),
                    int((row.spans["answer"] | row.spans["end"]).sum()),
                    len(image_sizes),
                    max((patches for patches, _ in image_sizes), default=0),
                )
                for row, image_sizes in zip(rows, sizes, strict=True)
            )
        return _largest(rooms)

    return _largest(everywhere(room_of_share))


def _largest(rooms: Iterable[Sequence[int]]) -> Room:
    return Room(*map(max, zip(*rooms, strict=True)))


def check_fit(examples: Sequence[Example], processor: Processor, config: Config, with_answer: bool = True) -> None:
    """Raises a UserError, in all processes, if an example cannot be encoded. Call it before any long computation."""
    room_of(examples, processor, config, with_answer)


@shown
class Fitted(NamedTuple):
    """Encoded examples in the shape of a :class:`Room`."""

    inputs: Inputs
    index: Int[ArrayLike, "batch answer"]
    """The positions of the gold tokens and of the token that ends their turn."""
    valid: Bool[ArrayLike, "batch answer"]
    """Which entries of ``index`` are not padding."""
    where: dict[str, Bool[ArrayLike, "batch tokens"]] | None = None
    """Name -> tokens that a training marks (``mark`` of :func:`fitted`)."""


def fitted(
    examples: Sequence[Example],
    room: Room,
    processor: Processor,
    config: Config,
    at: np.ndarray | None = None,
    mark: Callable[[Batch], dict[str, np.ndarray]] | None = None,
) -> Fitted:
    """Encodes examples with their answers in the shape ``room``, each row with its own images
    (:meth:`Inputs.aligned`).

    Args:
        at: the numbers of these rows in a larger batch.
        mark: a function that marks tokens of the encoded batch, name -> ``(B, T)`` bool.
    """
    batch = encode(examples, processor, config, step=room.length)
    inputs = batch.inputs
    if room.images and inputs.images is None:  # other rows of the batch have images, so these need blank ones
        assert config.vision is not None, "a text-only model has no images"
        blank, _ = config.vision.images(**config.vision.blank(1, 1))
        none = np.full(inputs.input_ids.shape, -1, np.int32)
        registers = None if config.text.registers is None else none
        inputs = inputs.replace(images=blank, image_index=none, register_index=registers)
    answers = positions(batch.spans["answer"] | batch.spans["end"], room.answer)
    return Fitted(inputs.aligned(room.images, room.patches, at), *answers, None if mark is None else mark(batch))


def positions(
    mask: Bool[np.ndarray, "batch tokens"], width: int | None = None
) -> tuple[Int[np.ndarray, "batch answer"], Bool[np.ndarray, "batch answer"]]:
    """The positions at which each row of a mask is set.

    Returns:
        The positions, and which of them are not padding. Each row has ``width`` entries, by default the largest number
        of set positions in a row.
    """
    counts = mask.sum(1)
    width = width or int(counts.max())
    valid = np.arange(width) < counts[:, None]
    index = np.zeros(valid.shape, np.int32)
    index[valid] = np.nonzero(mask)[1]
    return index, valid
