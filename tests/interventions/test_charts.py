"""The rows of every figure: its main numbers, in the form of its type."""

import json

import matplotlib.text
import numpy as np
import pytest

from interventions.figures import redraw  # noqa: F401 (imports all drawers)
from interventions.figures.base import DRAWERS, plain_data
from vlm_jax.runs.charts import FIELDS, Chart
from vlm_jax.runs.page import charts

MEAN = {"mean": [0.2, 0.4], "low": [0.1, 0.3], "high": [0.3, 0.5]}
ONE = {"mean": 0.5, "low": 0.4, "high": 0.6}
CHANGE = {"relation": "left", "layer": 1, "latent": 7, "selection": "full", "questions": "target", "samples": 9}
RECALL = {"relation": "left", "layer": 1, "ceiling": 0.9, "best": 0.8, "features": None, "random": [0.5, 0.6]}
SIZE = {"samples": 4, "tau": ONE, "overlap": {"2": {**ONE, "chance": 0.1}}}
PAIR = {"first": "noise", "second": "swap", "pearson": 0.5, "spearman": None, "kendall": 0.25}
CONDITION = {"edge": "text:image", "layers": None, "mode": "pre_softmax", "samples": 4, "failures": {"empty": 1}}
BASE = {**CONDITION, "edge": None, "mode": None, "accuracy": ONE}
#: A PNG of one pixel.
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
#: Drawer -> its data, the number of its chart's rows, and one of them.
DATA = {
    "tracing.heatmap": (
        {"panels": {"a": [[0.1, 0.2], [0.3, -0.4]]}, "label": "RR"},
        4,
        {"panel": "a", "x": "mlp", "y": 1, "value": -0.4, "cell": "L1-mlp"},
    ),
    "tracing.position_map": (
        {
            "panels": {"attn": [[0.1, 0.2], [0.3, None]], "mlp": [[0.5, 0.6], [0.7, 0.8]]},
            "groups": ["subject", "last"],
            "label": "RR",
        },
        8,
        {"panel": "attn", "x": 1, "y": "last", "value": None, "cell": "L1-attn@last"},
    ),
    "tracing.interval_plot": (
        {
            "cells": ["L0-attn", "L1-mlp"],
            "groups": {"a": {"value": [0.1, 0.2], "low": [0.0, 0.1], "high": [0.2, 0.3]}},
            "different": [False, True],
            "label": "RR",
        },
        2,
        {"panel": "mlp", "row": "L1-mlp", "series": "a", "value": 0.2, "low": 0.1, "high": 0.3, "groups differ": True},
    ),
    "tracing.stability": (
        {"groups": {"a": [SIZE]}},
        2,
        {"panel": "overlap of the top 2", "series": "a", "x": 4, "y": 0.5, "low": 0.4, "high": 0.6},
    ),
    "tracing.correlation": ({"rows": [PAIR]}, 6, {"panel": "Spearman", "x": "swap", "y": "noise", "value": None}),
    "diff.explained": (
        {"fvu": {"text.resid_post": {"image": [[0.1, 0.2], [0.3, 0.4]]}}, "layers": {"text.resid_post": [3, 5]}},
        4,
        {"panel": "text.resid_post", "series": "image, seed 1", "x": 5, "y": 0.4},
    ),
    "diff.rotated": (
        {"cosine": {"one": [0.9, 0.1]}, "energy": {"one": [0.0, 2.0]}, "adapted": {"one": [1]}},
        2,
        {"panel": "one", "series": "adapted", "x": 0.1, "y": 2.0, "latent": 1},
    ),
    "diff.ablated": (
        {"rows": [{**CHANGE, "difference": -0.1, "low": -0.2, "high": 0.0}]},
        1,
        {"panel": "left", "row": "L1 7 (full)", "series": "target", "value": -0.1, "low": -0.2, "samples": 9},
    ),
    "diff.recalled": (
        {"records": [{**RECALL, "samples": 9}]},
        4,
        {"panel": "left", "series": "random dictionaries", "x": 1, "y": 0.6, "n": 9},
    ),
    "editing.before_and_after": (
        {"accuracy": {"task": {"before": ONE, "after": {**ONE, "mean": 0.55}}}},
        2,
        {"row": "task", "series": "after", "value": 0.55, "low": 0.4, "high": 0.6},
    ),
    "editing.conditions": (
        {"accuracy": {"editors: one: two": ONE}, "full": "full"},
        1,
        {"row": "one: two", "series": "editors", "value": 0.5},
    ),
    "flow.attention": (
        {"tasks": {"t": {"to_image": MEAN, "to_text": MEAN}}},
        4,
        {"panel": "t", "series": "text itself", "x": 1, "value": 0.4, "low": 0.3, "high": 0.5},
    ),
    "flow.cumulative": (
        {
            "tasks": {
                "t": {
                    "grid": np.linspace(0, 1, 101),
                    "curves": [np.linspace(0, 1, 101) ** 0.5],
                    "needed": {"80": {"mean": [0.5], "deviation": [0.1]}, "90": {"mean": [0.6], "deviation": [0.1]}},
                }
            }
        },
        21,
        {"panel": "t", "series": "layer 0", "x": 1.0, "y": 1.0},
    ),
    "flow.answers": (
        {"tasks": {"t": [BASE, {**CONDITION, "accuracy": ONE}, {**CONDITION, "accuracy": ONE, "layers": [1, 2]}]}},
        2,
        {"x": "text → image", "series": "pre_softmax", "value": 0.5, "low": 0.4, "no possible answer": 1, "samples": 4},
    ),
    "flow.windows": (
        {"tasks": {"t": {"p_base": ONE, "change": {"text:image": MEAN}}}},
        2,
        {"panel": "t", "series": "text → image", "x": 1, "y": 0.4, "low": 0.3, "high": 0.5},
    ),
    "study.placements": (
        {"accuracy": {"knowledge": {"task_diff": ONE}}},
        1,
        {"panel": "knowledge", "row": "task_diff", "value": 0.5, "low": 0.4, "high": 0.6},
    ),
    "lens.by_layer": (
        {"tasks": {"t": {"median_rank": [9, 1], "p_gold": MEAN, "is_likeliest": MEAN}}},
        4,
        {"panel": "t", "series": "probability of the gold word", "x": 0, "y": 0.4, "low": 0.3, "high": 0.5},
    ),
    "lens.attribution": (
        {"tasks": {"t": {"attn": MEAN, "mlp": MEAN, "heads": {part: [[v, v] for v in MEAN[part]] for part in MEAN}}}},
        8,
        {"panel": "t", "x": "head 1", "y": 1, "value": 0.4, "low": 0.3, "high": 0.5},
    ),
    "lens.words": (
        {
            "samples": [
                {
                    "id": "a",
                    "picture": PICTURE,
                    "points": [{"name": "layer 3", "words": [["red", "blue"]], "probability": [[0.5, 0.25]]}],
                }
            ]
        },
        2,
        {"panel": "a, layer 3", "x": 1, "y": "0", "value": 0.25, "word": "blue"},
    ),
    "compare.changes": (
        {
            "rows": [
                {"task": "t", "measure": "ratio", "layer": layer, "change": 0.2, "low": 0.1, "high": 0.3, "p_holm": p}
                for layer, p in enumerate((0.01, None))
            ]
        },
        2,
        {"panel": "t", "series": "ratio", "x": 1, "y": 0.2, "low": 0.1, "high": 0.3},
    ),
    "study.k_sweep": (
        {"accuracy": {"knowledge": {"task_diff": {"10": ONE, "2": ONE}}}},
        2,
        {"panel": "knowledge", "series": "task_diff", "x": 10, "y": 0.5, "low": 0.4, "high": 0.6},
    ),
    "study.alone": (
        {"rr": {"knowledge": [0.1, 0.2]}, "gains": {"knowledge": [0.0, 0.3]}, "names": ["L0-attn", "L0-mlp"]},
        2,
        {"panel": "knowledge", "series": "mlp", "x": 0.2, "y": 0.3, "module": "L0-mlp"},
    ),
    "talo.interactions": (
        {
            "names": ["a", "b"],
            "vectors": [[0.1, -0.2], [0.3, 0.4]],
            "sure": [[False, True], [False, False]],
            "similarity": [[1.0, 0.5], [0.5, 1.0]],
            "tree": [[0, 1, 0.5, 2]],
            "label": "cosine",
        },
        4,
        {"x": 1, "y": "a", "value": -0.2, "sure": True},
    ),
}


def test_every_drawer_is_here():
    assert DATA.keys() == DRAWERS.keys()


@pytest.mark.parametrize("name", DATA)
def test_rows(name):
    """Their number, and one of them; the drawer takes the same data."""
    data, count, row = DATA[name]
    data, drawer = plain_data(data), DRAWERS[name]
    chart = drawer.chart(**data)
    assert len(chart.rows) == count and chart.missing(drawer.type) is None
    assert [found for found in chart.rows if row.items() <= found.items()], chart.rows
    assert drawer.draw(**data).axes


#: Figures of samples -> where in their data the number of samples is added, beside what older data have.
NUMBERED = {
    "tracing.heatmap": ({"samples": {"a": 37}},),
    "tracing.interval_plot": ("groups", "a"),
    "diff.ablated": ("rows", 0),
    "diff.recalled": ("records", 0),
    "editing.before_and_after": ("accuracy", "task"),
    "editing.conditions": ("accuracy", "editors: one: two"),
    "flow.attention": ("tasks", "t"),
    "flow.cumulative": ("tasks", "t"),
    "flow.answers": ("tasks", "t"),
    "flow.windows": ("tasks", "t"),
    "study.placements": ("accuracy", "knowledge", "task_diff"),
    "lens.by_layer": ({"samples": {"t": 37}},),
    "lens.attribution": ({"samples": {"t": 37}},),
    "compare.changes": ("rows",),
    "study.k_sweep": ("accuracy", "knowledge", "task_diff"),
    "study.alone": ({"samples": {"knowledge": 37}},),
    "talo.interactions": ({"samples": [37, 38]},),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_figures_say_how_many_samples_they_are_of(name):
    """The picture, and the rows for the page. What has no samples is not here: latents, tokens and pairs of ranks."""
    data = json.loads(json.dumps(plain_data(DATA[name][0])))
    first, *rest = NUMBERED[name]
    if isinstance(first, dict):
        data |= first
    else:
        part = data[first]
        for key in rest:
            part = part[key]
        inner = part if isinstance(part, list) else list(part.values()) if rest and _nested(part) else [part]
        for one in inner:
            one["samples"] = 37
    drawer = DRAWERS[name]
    figure = drawer.draw(**data)
    assert "n = 37" in _said(figure), _said(figure)
    assert all(row.get("n", row.get("samples")) in (37, 38) for row in drawer.chart(**data).rows)
    plain = _said(drawer.draw(**plain_data(DATA[name][0])))
    assert "n = " not in plain or name in ("diff.ablated", "diff.recalled", "flow.answers")  # these always had it


def _nested(part: dict) -> bool:
    """Whether it has estimates inside, each with its own number."""
    return all(isinstance(one, dict) and isinstance(one.get("mean"), float) for one in part.values())


def _said(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("name", DATA)
def test_specifications(name):
    """Altair checks them against Vega-Lite's schema. Each holds the rows and says what it shows."""
    data, count, _ = DATA[name]
    drawer = DRAWERS[name]
    chart = drawer.chart(**plain_data(data))
    spec = json.loads(json.dumps(charts.figure(drawer.type, chart, "What it shows")))
    kept = [row for rows in spec["datasets"].values() for row in rows] if "datasets" in spec else _values(spec)
    assert [row for row in kept if "zero" not in row] == json.loads(json.dumps(chart.rows)) and count == len(chart.rows)
    assert spec["description"] == "What it shows"


def _values(spec) -> list:
    """The rows in a specification."""
    if isinstance(spec, list):
        return [row for part in spec for row in _values(part)]
    if not isinstance(spec, dict):
        return []
    own = spec.get("data", {}).get("values", [])
    return [*own, *(row for name, part in spec.items() if name != "data" for row in _values(part))]


def test_panels_share_their_colours():
    """Whichever series they have."""
    of = {"x": 0, "y": 1}
    rows = [{"panel": panel, "series": series, **of} for panel, series in ("ab", "ac", "bd", "bc")]
    spec = charts.figure("scatter", Chart(rows, {}), "two panels")
    scales = [part["encoding"]["color"]["scale"] for part in spec["concat"]]
    assert scales[0] == scales[1] and scales[0]["domain"] == ["b", "c", "d"] and len(set(scales[0]["range"])) == 3


def test_numbers_that_are_missing():
    """Null values are drawn as nothing, and fields may have any name."""
    for type, needed in FIELDS.items():
        row = {name: "a" if name in ("panel", "series", "row") else 0.5 for name in needed}
        odd = {'it\'s [a.b] "c"': 1, "image": "http://x", "title": "t"}
        rows = [{**row, **odd}, {**row, "low": None, "high": None, **dict.fromkeys(("value",), None)}]
        spec = json.dumps(charts.figure(type, Chart(rows, {}), "odd"))
        assert '"title": "image"' not in spec


def test_rows_without_a_field_are_refused():
    chart = DRAWERS["study.alone"].chart(**DATA["study.alone"][0])
    del chart.rows[1]["series"]
    assert chart.missing("scatter") == "series"
    assert set(FIELDS) == {drawer.type for drawer in DRAWERS.values()}
