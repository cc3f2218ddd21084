"""Values of single tokens, such as attention, for programs that lay them over the picture and the text of a sample."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vlm_jax.runs.artifacts import Schema
from vlm_jax.seen import Prompt

INDEX, ARRAYS = "index.json", "arrays.npz"
TOKEN_MAPS = Schema(
    "token_maps",
    {
        "value": "what the values are, with the unit",
        "series": "name of every entry of the arrays' second axis, such as a head",
        "layers": "name of every entry of the arrays' first axis; null if it is the layers, from 0",
        "samples.id": "the sample",
        "samples.task": "its task",
        "samples.tokens": "the text of every token of its prompt",
        "samples.pictures": "files of its pictures, as the model saw them",
        "samples.grids": "rows and columns of the visual tokens of each picture",
        "samples.places": "picture, row and column of every token; null where it is no visual token",
        "samples.queries": "the tokens that attend, if the values are attention; null otherwise",
        "samples.words": "the word that each token stands for in each layer, (layers, tokens); null if none is known",
        "samples.array": "name in arrays.npz: float16 (layers, series, tokens), or (layers, series, queries, tokens)",
    },
)


class TokenMap(NamedTuple):
    """The values of one sample. queries: if they are attention, the tokens that attend. words: what each token stands
    for in each layer, if that is what the values are about."""

    id: str
    task: str
    prompt: Prompt
    values: Float[np.ndarray, "layers series *queries tokens"]
    queries: Sequence[int] | None = None
    words: Sequence[Sequence[str]] | None = None


def write_token_maps(
    folder: Path, maps: Sequence[TokenMap], *, value: str, series: Sequence[str], layers: Sequence[str] | None = None
) -> None:
    """Writes values of tokens into a new folder: ``index.json`` (:data:`TOKEN_MAPS`), ``arrays.npz`` and pictures.

    Args:
        value: what the values are, with the unit.
        series: name of every entry of the second axis.
        layers: name of every entry of the first axis; None if it is the layers, from 0.
    """
    folder.mkdir()
    samples = []
    for number, one in enumerate(maps):
        files = [f"{number}-{at}.png" for at in range(len(one.prompt.pictures))]
        for file, picture in zip(files, one.prompt.pictures, strict=True):
            picture.save(folder / file)
        samples.append(
            {
                "id": one.id,
                "task": one.task,
                "tokens": list(one.prompt.tokens),
                "pictures": files,
                "grids": [list(grid) for grid in one.prompt.grids],
                "places": [place if place[0] >= 0 else None for place in one.prompt.places.tolist()],
                "queries": None if one.queries is None else [int(query) for query in one.queries],
                "words": None if one.words is None else [list(layer) for layer in one.words],
                "array": str(number),
            }
        )
    names = None if layers is None else list(layers)
    content = {"value": value, "series": list(series), "layers": names, "samples": samples}
    (folder / INDEX).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    arrays: dict[str, Any] = {str(number): one.values.astype(np.float16) for number, one in enumerate(maps)}
    np.savez_compressed(folder / ARRAYS, **arrays)
