"""A figure is data plus a drawer.

The data are plain JSON, in a file beside the picture; a drawer makes a figure of them and needs nothing else. So every
figure of a run folder can be drawn again, by :func:`interventions.figures.redraw.redraw`, or by other code from the
same data.
"""

import base64
import dataclasses
import html
import inspect
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vlm_jax.runs.artifacts import Artifact, Schema
from vlm_jax.runs.charts import Chart
from vlm_jax.runs.folder import Run

COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2")


@dataclasses.dataclass(frozen=True)
class Drawer:
    """How figures of one sort are drawn.

    Attributes:
        name: how data files refer to the drawer, such as ``tracing.heatmap``.
        type: the type of artifact that a data file of it is.
        fields: what the data are, by name: the keyword arguments of ``draw`` and ``chart``.
        draw: makes a figure of the data.
        chart: makes rows of the data, for programs that draw them in their own way.
        dpi: dots per inch of a PNG.
    """

    name: str
    type: str
    fields: Mapping[str, str]
    draw: Callable[..., Figure]
    chart: Callable[..., Chart]
    dpi: int

    def write(self, path: Path, data: Mapping[str, Any]) -> None:
        """Draws to a file in the format of its suffix. Equal data give equal bytes: no format gets a date, and names in
        an SVG are not random."""
        date = {".pdf": "CreationDate", ".svg": "Date"}.get(path.suffix)
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self.draw(**data).savefig(path, dpi=self.dpi, metadata={date: None} if date else None)


#: Name -> drawer. A drawer registers itself with :func:`drawer`.
DRAWERS: dict[str, Drawer] = {}


def drawer(
    type: str, chart: Callable[..., Chart], /, *, dpi: int = 150, **fields: str
) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Registers a function that draws a figure, under its module's and its own name.

    Args:
        type: the type of its data file (:data:`vlm_jax.runs.artifacts.TYPES`).
        chart: a function of the same data that returns their rows (:data:`vlm_jax.runs.charts.FIELDS`).
        fields: a description of every argument of the function.
    """

    def register(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        name = f"{draw.__module__.rpartition('.')[2]}.{draw.__name__}"
        if fields.keys() != inspect.signature(draw).parameters.keys():
            raise TypeError(f"drawer {name} describes {', '.join(fields)}: describe each of its arguments")
        DRAWERS[name] = Drawer(name, type, fields, draw, chart, dpi)
        return draw

    return register


def save_figure(
    run: Run, name: str, draw: Callable[..., Figure], title: str, *, pdf: bool = False, **data: Any
) -> None:
    """Writes a figure into a run folder: ``name.json``, its data, and ``name.png``, drawn from that; also in the
    run's other formats, and with ``pdf`` in PDF.

    Args:
        draw: a function that :func:`drawer` registered.
        title: one line that says what the figure shows, for ``artifacts.json``.
        data: the arguments of ``draw``: anything that JSON has, or arrays.
    """
    registered = next(one for one in DRAWERS.values() if one.draw is draw)
    arguments = inspect.signature(draw).bind(**data)
    arguments.apply_defaults()  # a default that changes later does not change old figures
    # The figure is drawn from what the file will hold, so that no drawer can use anything else.
    data = plain_data(arguments.arguments)
    chart = registered.chart(**data)
    assert (field := chart.missing(registered.type)) is None, f"the chart of {registered.name} has rows without {field}"
    plain = {"drawer": registered.name, "title": title, "data": data, "chart": plain_data(chart._asdict())}
    content = json.loads(json.dumps(plain))
    fields = {"drawer": "name of the drawer", "title": "what the figure shows"}
    fields |= {
        "chart.rows": "the data as rows, in the form of their type",
        "chart.titles": "titles of the rows' fields",
    }
    fields |= {f"data.{field}": meaning for field, meaning in registered.fields.items()}
    schema = Schema(registered.name, fields)
    run.save_json(f"{name}.json", content, Artifact(registered.type, title, schema))
    for suffix in dict.fromkeys(["png", *(["pdf"] if pdf else []), *run.formats]):
        artifact = Artifact("figure", title, data=f"{name}.json")
        run.write(f"{name}.{suffix}", lambda path: registered.write(path, content["data"]), artifact)


def picture_html(figure: Figure, title: str) -> str:
    """A figure as HTML for a notebook; ``title`` is its text for people who do not see it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return (
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


def plain_data(value: Any) -> Any:
    """Nested data with arrays as lists and NaN, which JSON lacks, as None."""
    if isinstance(value, Mapping):
        return {str(key): plain_data(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain_data(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_data(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def estimate(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chart's row for an estimate with ``mean``, ``low``, ``high``; and the number of ``samples`` and
    their ``folders`` if it has them."""
    behind = {"folders": found["folders"]} if "folders" in found else {}
    behind |= {"n": found["samples"]} if "samples" in found else {}
    return {"value": found["mean"], "low": found["low"], "high": found["high"], **behind}


def with_n(name: str, samples: int | str | None, join: str = " ") -> str:
    """A name in a figure with the number of samples behind it; without it if data of an older version lack it."""
    return name if samples is None else f"{name}{join}(n = {samples})"


def one_n(estimates: Iterable[Mapping[str, Any]]) -> int | None:
    """The number of samples that all estimates share; None if they differ or are not known."""
    numbers = {found.get("samples") for found in estimates}
    return numbers.pop() if len(numbers) == 1 else None


def subplots(rows: int, columns: int, *, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure of ``size`` inches and its axes ``(rows, columns)``. It is not one of pyplot's, so a notebook's own
    figures and backend stay as they are."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)
