"""Scores of predictions against gold answers."""

import re
from collections.abc import Sequence


def normalise(text: str) -> str:
    """What exact match compares: lower case, white space collapsed, and neither quotes nor ``.,;:!?`` around it."""
    return re.sub(r"\s+", " ", text).strip().strip("\"'.,;:!? ").lower()


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction equals any of the normalised gold answers (P0's measure)."""
    return normalise(prediction) in {normalise(answer) for answer in answers}
