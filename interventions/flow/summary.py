"""Summaries of a study of visual information flow: attention, answers and effects, with intervals."""

from collections.abc import Sequence

import numpy as np

from interventions.flow.knockout import FAILURES, Effect
from interventions.flow.shares import Reading
from interventions.kinds.groups import members
from interventions.statistics import accuracy, mean_interval


def summarise_reading(reading: Reading, seed: int = 0) -> dict:
    """Means and intervals for each layer: the share of the text's attention that goes to each group (mean over heads),
    equation 2, and the share of image tokens that get 80 and 90 % of the image's attention, if it gets any."""
    named = ("before", "image", "image_end", "register", "text")
    groups = [name for name in named if reading.tokens[:, members(name)].any()]
    summary: dict = {"samples": len(reading.tokens)}
    summary |= {f"to_{group}": mean_interval(reading.share(group).mean(2), seed) for group in groups}
    if "image_end" in groups or "register" in groups:
        summary |= {"ratio": mean_interval(reading.ratio(), seed), "ratio_if_uniform": float(reading.uniform().mean())}
    if reading.of_image:
        summary |= {f"tokens_for_{part}": mean_interval(reading.needed(part / 100), seed) for part in (80, 90)}
    return summary


def summarise_received(reading: Reading) -> dict:
    """How the image's attention is spread over its tokens, by layer, as means over samples (figures 2 and 3).

    Returns:
        ``samples``: their number. ``grid (101,)``: shares of the image tokens, the most attended tokens first.
        ``curves (L, 101)``: the share of the image's attention that these tokens get. ``needed``: the smallest share of
        the tokens that gets 80 and 90 % of the attention, as ``mean (L,)`` and standard ``deviation (L,)`` over
        samples.
    """
    grid = np.linspace(0, 1, 101)
    needed = {percent: reading.needed(percent / 100) for percent in (80, 90)}
    return {
        "samples": len(reading.tokens),
        "grid": grid,
        "curves": np.nanmean(reading.cumulative(grid), 0),
        "needed": {
            percent: {"mean": np.nanmean(shares, 0), "deviation": np.nanstd(shares, 0)}
            for percent, shares in needed.items()
        },
    }


def summarise_answers(records: list[dict]) -> list[dict]:
    """For each condition: the accuracy with its interval, and the number of failures of each kind."""
    conditions: dict[str, list[dict]] = {}
    for record in records:
        conditions.setdefault(str([record[key] for key in ("edge", "layers", "mode")]), []).append(record)
    return [
        {
            **{key: part[0][key] for key in ("edge", "layers", "mode")},
            "samples": len(part),
            "accuracy": accuracy([r["correct"] for r in part]),
            "failures": {why: sum(r["failure"] == why for r in part) for why in FAILURES},
        }
        for part in conditions.values()
    ]


def summarise_effect(effect: Effect, edges: Sequence[str], seed: int = 0) -> dict:
    """p(gold), and for each edge its change when the edge is cut in each window of layers and in all layers."""
    window, whole = effect.window - effect.base[:, None, None], effect.whole - effect.base[:, None]
    return {
        "samples": len(effect.base),
        "p_base": mean_interval(effect.base, seed),
        "change": {name: mean_interval(window[:, number], seed) for number, name in enumerate(edges)},
        "change_all_layers": {name: mean_interval(whole[:, number], seed) for number, name in enumerate(edges)},
    }
