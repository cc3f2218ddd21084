"""Interactive charts of figures' rows (:mod:`vlm_jax.runs.charts`), one function for each type of artifact."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt

from vlm_jax.runs.charts import FIELDS, Chart

#: Columns of panels, and the size of a panel in pixels.
_COLUMNS, _WIDTH, _HEIGHT = 3, 260, 200
#: Colours after Okabe and Ito, which people with any kind of colour vision can tell apart, on white and on black.
COLOURS = ("#2a88c9", "#d55e00", "#009e73", "#c06a98", "#b8860b", "#8a63d2", "#7f7f7f")

Rows = Sequence[dict[str, Any]]
#: What the pointer chooses: the cell on which it rests, or, by a click on a name in the legend, one series.
_CELL = alt.selection_point("cell", fields=["x", "y"], on="pointerover", empty=False)
_SERIES = alt.selection_point("chosen", fields=["series"], bind="legend")
_FADED = alt.condition(_SERIES, alt.value(0.9), alt.value(0.12))
_CHOICES = {"heat_map": _CELL, "curves": _SERIES, "scatter": _SERIES}


def figure(type: str, chart: Chart, title: str) -> dict:
    """The Vega-Lite specification of a figure.

    Args:
        type: the type of artifact, one of :data:`vlm_jax.runs.charts.FIELDS`.
        title: what it shows; it becomes the text for people who do not see it.
    """
    panels: dict[str, list[dict]] = {}
    for row in chart.rows:
        panels.setdefault(str(row["panel"]), []).append(row)
    # All panels have the same colours, whichever series they show.
    colour = _colour(list(dict.fromkeys(str(row.get("series")) for row in chart.rows)), chart.titles)
    plots = [_DRAW[type](rows, chart.titles, colour).properties(title=name) for name, rows in panels.items()]
    with warnings.catch_warnings():  # that panels share what the pointer chooses, as they should
        warnings.filterwarnings("ignore", "Automatically deduplicated", UserWarning)
        joined = plots[0]
        if len(plots) > 1:
            joined = alt.concat(*plots, columns=_COLUMNS).resolve_scale(color="shared")
        if type in _CHOICES:
            joined = joined.add_params(_CHOICES[type])
        return _plain(joined, title)


def training(records: Rows, fields: Sequence[str]) -> dict:
    """The specification of a training's log: a panel for each of these fields, over the steps."""
    plots = []
    for field in fields:
        data = alt.Data(values=[{"step": r["step"], field: r[field]} for r in records if r.get(field) is not None])
        plots.append(
            alt.Chart(data)
            .mark_line(color=COLOURS[0], point=len(records) < 60)
            .encode(x=alt.X("step:Q"), y=alt.Y(f"{_escaped(field)}:Q", title=field), tooltip=_tips(["step", field]))
            .properties(width=_WIDTH, height=_HEIGHT * 2 // 3, title=field)
        )
    return _plain(alt.concat(*plots, columns=_COLUMNS), "The log of a training, by step")


def _plain(chart: Any, title: str) -> dict:
    """The specification of a chart without frames and background. ``title`` is its text for people who do not see
    it."""
    described = chart.properties(description=title, background="transparent")
    return described.configure_view(stroke=None).configure_axis(labelLimit=220).to_dict()


def _heat_map(rows: Rows, titles: dict[str, str], colour: alt.Color) -> alt.TopLevelMixin:
    limit = max((abs(row["value"]) for row in rows if row["value"] is not None), default=0) or 1
    scale = alt.Color("value:Q", title=titles.get("value", "value")).scale(scheme="blueorange", domain=[-limit, limit])
    edge = alt.condition(_CELL, alt.value("#7f7f7f"), alt.value(None))
    columns, lines = (len({str(row[axis]) for row in rows}) for axis in ("x", "y"))
    size = {"width": max(80, min(28 * columns, 560)), "height": max(60, min(18 * lines, 560))}
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("x:O", title=titles.get("x", "x"), sort=None),
        y=alt.Y("y:O", title=titles.get("y", "y"), sort="descending" if _numbers(rows, "y") else None),
    )
    return base.mark_rect().encode(color=scale, stroke=edge, tooltip=_tips(rows[0])).properties(**size)


def _curves(rows: Rows, titles: dict[str, str], colour: alt.Color) -> alt.TopLevelMixin:
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("x:Q", title=titles.get("x", "x")).scale(zero=False),
        color=colour,
    )
    line = base.mark_line(point=True).encode(
        y=alt.Y("y:Q", title=titles.get("y", "y")), tooltip=_tips(rows[0]), opacity=_FADED
    )
    if "low" in rows[0]:
        band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=titles.get("y", "y")), y2="high:Q")
        return alt.layer(band, line).properties(width=_WIDTH, height=_HEIGHT)
    return line.properties(width=_WIDTH, height=_HEIGHT)


def _intervals(rows: Rows, titles: dict[str, str], colour: alt.Color) -> alt.TopLevelMixin:
    series = len({row["series"] for row in rows})
    base = alt.Chart().encode(
        y=alt.Y("row:N", title=titles.get("row", "row"), sort=None),
        yOffset=alt.YOffset("series:N", sort=None),
        color=colour,
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=titles.get("value", "value")), x2="high:Q")
    points = base.mark_point(filled=True, size=45).encode(x="value:Q", tooltip=_tips(rows[0]))
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeDash=[2, 2], opacity=0.5).encode(x="zero:Q")
    least = min((row["low"] for row in rows if row["low"] is not None), default=0)
    layers = [bars, points] if least > 0 else [zero, bars, points]
    lines = len({row["row"] for row in rows})
    joined = alt.layer(*layers, data=alt.Data(values=list(rows)))
    return joined.properties(width=_WIDTH, height=lines * max(14, 9 * series + 6))


def _bars(rows: Rows, titles: dict[str, str], colour: alt.Color) -> alt.TopLevelMixin:
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("x:N", title=titles.get("x", "x"), sort=None),
        xOffset=alt.XOffset("series:N", sort=None),
    )
    bars = base.mark_bar().encode(
        y=alt.Y("value:Q", title=titles.get("value", "value")), color=colour, tooltip=_tips(rows[0])
    )
    width = {"width": max(_WIDTH, 10 * len(rows)), "height": _HEIGHT}
    if "low" not in rows[0]:
        return bars.properties(**width)
    ends = base.mark_rule().encode(y=alt.Y("low:Q", title=titles.get("value", "value")), y2="high:Q")
    return alt.layer(bars, ends).properties(**width)


def _scatter(rows: Rows, titles: dict[str, str], colour: alt.Color) -> alt.TopLevelMixin:
    points = alt.Chart(alt.Data(values=list(rows))).mark_circle(size=36)
    return points.encode(
        x=alt.X("x:Q", title=titles.get("x", "x")).scale(zero=False),
        y=alt.Y("y:Q", title=titles.get("y", "y")).scale(zero=False),
        color=colour,
        opacity=_FADED,
        tooltip=_tips(rows[0]),
    ).properties(width=_WIDTH, height=_HEIGHT)


_DRAW: dict[str, Callable[[Rows, dict[str, str], alt.Color], Any]] = {
    "heat_map": _heat_map,
    "curves": _curves,
    "intervals": _intervals,
    "bars": _bars,
    "scatter": _scatter,
}
assert _DRAW.keys() == FIELDS.keys(), "each type of chart has its function"


def _colour(names: Sequence[str], titles: dict[str, str]) -> alt.Color:
    """The colour of each series."""
    title = titles.get("series", "series")
    if len(names) > len(COLOURS):
        return alt.Color("series:N", title=title, sort=names).scale(domain=names, scheme="viridis")
    return alt.Color("series:N", title=title).scale(domain=names, range=list(COLOURS[: len(names)]))


def _tips(fields: Any) -> list[alt.Tooltip]:
    """What is told of a mark on which the pointer rests: every field but the folders, which a click opens."""
    # The tooltip would show fields with these two names as a picture and as a heading.
    titles = {"image": "image ", "title": "title "}
    names = [name for name in map(str, fields) if name != "folders"]
    return [alt.Tooltip(field=_escaped(name), title=titles.get(name, name)) for name in names]


def _escaped(field: str) -> str:
    """Vega reads dots, brackets and quotes in a field's name as a path."""
    for character in "\\.[]'\"":
        field = field.replace(character, f"\\{character}")
    return field


def _numbers(rows: Rows, field: str) -> bool:
    return all(isinstance(row[field], int | float) for row in rows)
