"""Summaries of readings of the residual stream, and records of single samples in words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from interventions.lens.reading import Reading
from interventions.statistics import mean_interval
from vlm_jax.data import Example


def summarise(reading: Reading, seed: int = 0) -> dict[str, Any]:
    """By point of the stream: the gold word's probability and how often it is the likeliest, with intervals, and its
    median rank. By part of the model: what it contributes to the logit, with intervals."""
    parts = ("logit", "embeddings", "attn", "heads", "attn_rest", "mlp", "deepstack", "edits")
    return {
        "samples": len(reading.gold),
        "lens": {
            "p_gold": mean_interval(reading.p_gold, seed),
            "is_likeliest": mean_interval(reading.rank == 1, seed),
            "median_rank": np.median(reading.rank, 0).tolist(),
        },
        "attribution": {
            part: mean_interval(getattr(reading, part), seed)
            for part in parts
            if np.any(getattr(reading, part)) or part in ("logit", "attn", "mlp")
        },
    }


def settled(rank: Int[np.ndarray, "points"]) -> int | None:
    """The first point from which on the gold word is the likeliest; None if it is not at the end."""
    others = np.flatnonzero(rank != 1)
    first = 0 if not len(others) else int(others[-1]) + 1
    return first if first < len(rank) else None


def records(reading: Reading, examples: Sequence[Example], tokenizer: Any) -> list[dict[str, Any]]:
    """A record for each sample, with words in place of ids."""
    word = Words(tokenizer)
    made = []
    for number, example in enumerate(examples):
        own = Reading(*(values[number] for values in reading))
        made.append(
            {
                "id": example.id,
                "answers": list(example.answers),
                "gold": word(own.gold),
                "foil": None if own.foil < 0 else word(own.foil),
                "said": word(own.words[-1, 0]),
                "correct": bool(own.rank[-1] == 1),
                "settled": settled(own.rank),
                "logit": float(own.logit),
                "embeddings": float(own.embeddings),
                "attn": _rounded(own.attn),
                "mlp": _rounded(own.mlp),
                "p_gold": _rounded(own.p_gold),
                "rank": own.rank.tolist(),
                "words": [[word(one) for one in point] for point in own.words],
                "probability": [_rounded(point) for point in own.probability],
            }
        )
    return made


class Words:
    """The text of tokens, each decoded once."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: Any) -> str:
        token = int(token)
        if token not in self._known:
            self._known[token] = self._tokenizer.decode([token])
        return self._known[token]


def _rounded(values: np.ndarray) -> list[float]:
    """Five digits, which are enough to read; the arrays have all."""
    return [float(f"{value:.5g}") for value in values]
