"""Estimates and comparisons as text, for tables and terminals."""

from collections.abc import Mapping
from typing import Any

from interventions.statistics.proportions import NOT_ENOUGH


def interval_text(found: Mapping[str, Any], value: str = "mean", sign: str = "") -> str:
    """An estimate with its interval, such as ``0.583 [0.319, 0.807]``; "not enough samples" in place of an interval
    that is None.

    Args:
        found: has ``low``, ``high``, and the estimate under the name ``value``.
        sign: "+" writes the sign of positive numbers too.
    """
    shown = f"{found[value]:{sign}.3f}"
    if found["low"] is None:
        return f"{shown} ({NOT_ENOUGH})"
    return f"{shown} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def change_text(found: Mapping[str, Any]) -> str:
    """A result of :func:`interventions.statistics.paired` as text. If no pair of scores differs, it says how large a
    difference these samples cannot exclude."""
    text = interval_text(found, "difference", "+")
    if found.get("differing") == 0 and found["excluded"] is not None:
        return f"{text}: no pair differs, less than {found['excluded']:.3f} cannot be excluded"
    return text
