"""Which words single tokens stand for, those of the picture above all, for the result page to lay over the picture."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from interventions.kinds.groups import bind
from interventions.lens.lens import logit_lens
from interventions.lens.reading import writer_and_gold
from interventions.lens.summary import Words
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.inputs import bucket
from vlm_jax.processor import Processor
from vlm_jax.prompts import encode
from vlm_jax.runs.processes import fetch
from vlm_jax.runs.token_maps import ARRAYS, INDEX, TokenMap
from vlm_jax.seen import read_prompt
from vlm_jax.sites import Intervention

#: Numbers of tokens are rounded up to a multiple of this, so that few programs are compiled.
_STEP = 32
#: The longest side of a picture in the figure, in pixels.
_SIDE = 384


class WordMaps(NamedTuple):
    """The word of every token of some prompts at every point of the stream: its probability, and that of the gold
    word.

    Attributes:
        maps: one for each sample.
        series: the names of the two probabilities.
        layers: the names of the points.
    """

    maps: list[TokenMap]
    series: list[str]
    layers: list[str]


def word_maps(
    model: Model, processor: Processor, examples: Sequence[Example], interventions: Sequence[Intervention] = ()
) -> WordMaps:
    """The likeliest word of every token of the prompt, at the embeddings and after every layer.

    A token of text stands for the token that it predicts. Tokens of pictures were never trained to predict anything, so
    their words are a reading of the stream, and not what the model would say.

    Args:
        interventions: those that act on the model. Those that name token groups are bound to every prompt.
    """
    word, maps = Words(processor.tokenizer), []
    for example in examples:
        batch = encode([example], processor, model.config)
        (last,), gold = writer_and_gold(batch)
        mask = np.asarray(batch.inputs.attention_mask)[0] & (np.arange(batch.inputs.input_ids.shape[1]) <= last)
        at = np.flatnonzero(mask)
        padded = np.pad(at, (0, bucket(len(at), _STEP) - len(at)))
        lens = fetch(logit_lens(model, batch.inputs, padded[None], gold, k=1, interventions=bind(interventions, batch)))
        values = np.stack([lens.probability[0, :, : len(at), 0], lens.gold[0, :, : len(at)]], 1)
        words = [[word(one) for one in point] for point in lens.words[0, :, : len(at), 0]]
        prompt = read_prompt(batch.inputs, mask, model.config, processor)
        maps.append(TokenMap(example.id, example.task, prompt, values, words=words))
    depth = model.config.text.num_hidden_layers
    return WordMaps(maps, ["the likeliest word", "the gold word"], ["embeddings", *map(str, range(depth))])


def grid_of(one: TokenMap, point: int, picture: int = 0) -> list[list[str]]:
    """The words of a picture's tokens at a point of the stream (0: the embeddings, 1: after layer 0), row by row.

    Raises:
        UserError: if the sample has no such picture, or the stream no such point.
    """
    words = one.words or []
    if not 0 <= point < len(words) or not 0 <= picture < len(one.prompt.grids):
        raise UserError(
            f"{one.id!r} has {len(words)} points and {len(one.prompt.grids)} pictures, so not point {point} of picture "
            f"{picture}: count both from 0"
        )
    return _laid_out(words[point], one.prompt.places.tolist(), one.prompt.grids[picture], picture, "")


def _laid_out(
    values: Sequence[Any], places: Sequence[Sequence[int] | None], grid: Sequence[int], picture: int, empty: Any
) -> list[list[Any]]:
    """Values of tokens on the places that they have in a picture."""
    rows, columns = grid
    laid = [[empty] * columns for _ in range(rows)]
    for value, place in zip(values, places, strict=True):
        if place is not None and place[0] == picture:
            laid[place[1]][place[2]] = value
    return laid


def shown_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The layers that the figure of a picture's words shows: by default four, or all of fewer, of which the last is the
    model's last layer.

    Raises:
        UserError: for a layer that the model lacks.
    """
    if layers is None:
        return sorted({depth * part // 4 - 1 for part in range(1, 5)} - {-1})
    for layer in layers:
        if layer >= depth:
            raise UserError(f"--layers names layer {layer}, but the model has {depth}: name some from 0 to {depth - 1}")
    return list(layers)


def first_picture(folder: Path, layers: Sequence[int]) -> dict[str, Any] | None:
    """What the figure of a picture's words needs, from a folder of token maps: the first picture of the first sample
    that has one, and the words of its tokens after these layers. None if there is no picture."""
    samples = json.loads((folder / INDEX).read_text(encoding="utf-8"))["samples"]
    sample = next((sample for sample in samples if sample["pictures"]), None)
    if sample is None:
        return None
    with np.load(folder / ARRAYS) as arrays:
        probability = arrays[sample["array"]][:, 0].astype(float)
    on = sample["places"], sample["grids"][0], 0
    points = [
        {
            "name": f"after layer {layer}",
            "words": _laid_out(sample["words"][layer + 1], *on, ""),
            "probability": _laid_out(probability[layer + 1].round(4).tolist(), *on, 0.0),
        }
        for layer in layers
    ]
    with Image.open(folder / sample["pictures"][0]) as picture:
        picture.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
    return {"id": sample["id"], "picture": base64.b64encode(buffer.getvalue()).decode(), "points": points}
