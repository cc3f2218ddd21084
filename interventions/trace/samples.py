"""The lines of a trace's ``samples.jsonl``: each sample's question, answers and effects."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

import vlm_jax
from interventions.kinds.groups import bind
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import batches
from vlm_jax.runs.log import records_of
from vlm_jax.runs.processes import fetch
from vlm_jax.sites import Intervention

#: Largest number of tokens in a prediction, as in an evaluation by default.
_NEW_TOKENS = 12
#: Prompts are padded to a multiple of this many tokens, so that generation is compiled for few lengths.
_LENGTH_STEP = 64


def predictions(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    size: int,
    interventions: Sequence[Intervention] = (),
) -> list[str | None]:
    """The greedy answer to the clean prompt of each example. None if an intervention acts on tokens that a prompt
    without its answer does not have.

    Args:
        size: rows of a batch.
        interventions: those that act in every run.
    """
    texts: list[str | None] = [None] * len(examples)
    options = {"with_answer": False, "step": _LENGTH_STEP}
    for rows, batch in batches(examples, processor, model.config, size, **options):
        try:
            acting = bind(interventions, batch)
        except UserError:
            return [None] * len(examples)
        names = [examples[row].id for row in rows]
        tokens = fetch(vlm_jax.generate(model, batch.inputs, _NEW_TOKENS, acting, names=names))
        for row, text in zip(rows, processor.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=False):
            texts[row] = text.strip()
    return texts


def line(record: dict, example: Example, cells: Sequence[str], prediction: str | None) -> dict:
    """A record of :func:`interventions.trace.tracing.trace_batch` as a line: with the question, the scored answer, the
    prediction and TE, and with the name of each cell beside its IE."""
    by_cell = zip(*record["ie"], strict=True)
    return {
        "id": record["id"],
        "task": record["task"],
        "question": example.question,
        "answer": example.answers[0],
        "prediction": prediction,
        **{name: record[name] for name in ("correct", "p_clean", "p_corrupt")},
        "te": [record["p_clean"] - p for p in record["p_corrupt"]],
        "ie": {cell: list(values) for cell, values in zip(cells, by_cell, strict=True)},
    }


def effects(records: Sequence[dict], cells: Sequence[str]) -> Float[np.ndarray, "samples replicates cells"]:
    """IE of every line, for the cells in this order; NaN where a sample has no token of the cell's group."""
    return np.array([[record["ie"][cell] for cell in cells] for record in records], float).swapaxes(1, 2)


def read_effects(path: Path) -> tuple[Float[np.ndarray, "samples replicates"], Float[np.ndarray, "samples _ cells"]]:
    """TE and IE of a finished trace, from its ``samples.jsonl``."""
    records = records_of(path, path.read_bytes())
    check_lines(records, path)
    return np.array([record["te"] for record in records]), effects(records, list(records[0]["ie"]))


def check_lines(records: Sequence[dict], where: Path | str) -> None:
    """Raises a UserError if an older version wrote the lines, without the names of the cells."""
    if any(not isinstance(record.get("ie"), dict) for record in records):
        raise UserError(f"{where} was written by an older version, without names of cells: choose another --out")
