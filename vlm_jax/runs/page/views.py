"""How each type of artifact is shown. A view makes the HTML of one entry; ``@view`` registers it for its types."""

import base64
import html
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.files import read_text
from vlm_jax.runs.charts import FIELDS, Chart
from vlm_jax.runs.page import charts
from vlm_jax.runs.page.reading import Entry, RunFolder, script_json
from vlm_jax.runs.token_maps import ARRAYS, INDEX

#: Rows of a table that the page holds.
TABLE_ROWS = 2000
#: Bytes of a file's token maps that the page holds, at least those of one sample.
MAP_BYTES = 6 * 2**20


class Options(NamedTuple):
    """What views need to know."""

    page: Path
    """Where the page will be written; links are relative to it."""
    samples: int
    """How many samples of a file are shown."""


class Part(NamedTuple):
    """A part of the page."""

    body: str
    """HTML."""
    rank: int = 1
    """Parts of a lower rank come first."""


View = Callable[[RunFolder, Entry, Options], Part | None]
VIEWS: dict[str, View] = {}


def view(*types: str) -> Callable[[View], View]:
    """Registers the view of artifacts of these types. It returns None for an entry that needs no part of its own, and
    its problems go to :attr:`RunFolder.problems`."""

    def register(make: View) -> View:
        VIEWS.update(dict.fromkeys(types, make))
        return make

    return register


def show(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    """The part of an entry. A type without a view, or a file that cannot be shown, gets a link."""
    make = VIEWS.get(entry.type, _linked)
    if not (folder.path / entry.file).exists():
        folder.problems.append(f"{entry.file} is listed and does not exist")
        return None
    try:
        return make(folder, entry, options)
    except Exception as error:  # content of another form can raise any error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        folder.problems.append(f"{entry.file} holds something else than its type, {entry.type}, says ({reason})")
        return Part("", 3)


@view(*FIELDS)
def _chart(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    content = folder.json(entry.file)
    if content is None:
        return None
    if not isinstance(content, dict) or "chart" not in content:  # of an older version; its picture is shown
        return None
    chart = Chart(**content["chart"])
    if not chart.rows:
        return None
    if field := chart.missing(entry.type):
        raise ValueError(f"its rows lack {field}")
    body = drawn(charts.figure(entry.type, chart, entry.title))
    folder.drawn.add(entry.file)
    pictures = [one.file for one in folder.entries if one.data == entry.file and one.file.endswith(".png")]
    for source in filter(None, map(folder.embedded, pictures)):
        body += f"<details><summary>the figure as it was drawn</summary>{_image(source, entry.title)}</details>"
    return Part(body, 0)


@view("figure")
def _picture(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    """A figure that is not shown as a chart is shown as its picture. Its data file is listed before it."""
    if Path(entry.file).suffix != ".png" or entry.data in folder.drawn:
        return None
    source = folder.embedded(entry.file)
    return None if source is None else Part(_image(source, entry.title), 0)


@view("table")
def _table(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    """CSV and Parquet, and Markdown as it is. The same table in Markdown or LaTeX needs no part of its own."""
    file = Path(entry.file)
    if file.suffix == ".md" and not (folder.path / file.with_suffix(".csv")).is_file():
        text = folder.attempt(entry.file, read_text)
        return None if text is None else Part(f"<pre>{html.escape(text)}</pre>")
    if file.suffix not in (".csv", ".parquet"):
        return None
    rows = folder.table(entry.file, TABLE_ROWS)
    return None if rows is None else Part(table(rows.records, rows.count))


@view("samples")
def _samples(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    if Path(entry.file).suffix == ".json":
        records = folder.json(entry.file)
        lines = None if records is None else (records[: options.samples], len(records))
    else:
        lines = folder.lines(entry.file, options.samples)
    if lines is None:
        return None
    records, count = lines
    folder.shown.update(str(record.get("id")) for record in records)
    return Part(table(records, count, samples=True))


@view("pictures")
def _pictures(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    """No part of its own: the samples show them."""
    return None


@view("token_maps")
def _token_maps(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    content = folder.json(f"{entry.file}/{INDEX}")
    arrays = folder.attempt(f"{entry.file}/{ARRAYS}", _arrays)
    if content is None or arrays is None:
        return None
    samples, size, layers = [], 0, content.get("layers")  # an older version has none, and no words
    for sample in content["samples"][: options.samples]:
        values = arrays[sample["array"]].astype("<f2")
        count, queries = len(sample["tokens"]), sample["queries"]
        axes = [len(content["series"]), *([] if queries is None else [len(queries)]), count]
        if values.ndim != len(axes) + 1 or list(values.shape[1:]) != axes or not np.isfinite(values).all():
            raise ValueError(f"the values of {sample['id']} have shape {values.shape} or are not finite")
        if len(sample["places"]) != count or not all(isinstance(token, str) for token in sample["tokens"]):
            raise ValueError(f"the tokens of {sample['id']} are no texts with a place each")
        if layers is not None and not _are_texts(layers, len(values)):
            raise ValueError(f"its {len(values)} layers have other names")
        words = sample.get("words")
        if words is not None and not (len(words) == len(values) and all(_are_texts(one, count) for one in words)):
            raise ValueError(f"the words of {sample['id']} are not one for each layer and token")
        size += values.nbytes + sum(len(word) for one in words or () for word in one)
        if samples and size > MAP_BYTES:
            break
        kept = {name: sample[name] for name in ("id", "task", "tokens", "grids", "places", "queries")}
        kept["pictures"] = [folder.embedded(f"{entry.file}/{file}") for file in sample["pictures"]]
        kept |= {"words": words, "layers": len(values), "values": base64.b64encode(values.tobytes()).decode()}
        samples.append(kept)
    if not samples:
        return None
    note = ""
    if len(samples) < len(content["samples"]):
        note = f"<p>The first {len(samples)} of {len(content['samples'])} samples.</p>"
    shown = {"value": content["value"], "series": content["series"], "layers": layers, "samples": samples}
    return Part(f'{note}<div class="tokens">{_data(shown)}</div>', 0)


def _are_texts(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(value, str) for value in values)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@view("training")
def _training(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    lines = folder.lines(entry.file)
    if lines is None or not lines.records:
        return None
    numbers = ("loss", "grad_norm", "lr", "tokens_per_second", "peak_memory_gib")
    shown = [name for name in numbers if any(isinstance(record.get(name), int | float) for record in lines.records)]
    every = -(-len(lines.records) // TABLE_ROWS)  # of a long log, every so many lines
    return Part(drawn(charts.training(lines.records[::every], shown)), 2)


@view("metrics")
def _metrics(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    content = folder.json(entry.file)
    return None if content is None else Part(tree(content))


@view("placement")
def _placement(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    names = folder.json(entry.file)
    return None if names is None else Part(f"<p>{html.escape(', '.join(map(str, names)))}</p>")


@view("adapter")
def _adapter(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    """What a PEFT folder says of its adapter, without what is empty."""
    config = folder.json(f"{entry.file}/adapter_config.json")
    facts = {name: value for name, value in (config or {}).items() if value is not None and value not in ([], {}, "")}
    linked = _linked(folder, entry, options)
    assert linked is not None, "every entry has a link"
    return Part(f"<details><summary>its configuration</summary>{tree(facts)}</details>{linked.body}", linked.rank)


@view("arrays", "model", "intervention", "dictionaries")
def _linked(folder: RunFolder, entry: Entry, options: Options) -> Part | None:
    path = folder.path / entry.file
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    fields = folder.schemas.get(entry.schema or "", {})
    rows = "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(str(text))}" for name, text in fields.items())
    described = f"<details><summary>fields</summary><table>{rows}</table></details>" if rows else ""
    return Part(f"<p>{size / 2**20:,.2f} MiB</p>{described}", 3)


def _image(source: str, title: str) -> str:
    return f'<img class="figure" src="{source}" alt="{html.escape(title)}">'


def drawn(spec: dict) -> str:
    """The place of a chart."""
    return f'<div class="chart">{_data(spec)}</div>'


def _data(value: Any) -> str:
    """Data for the page's script."""
    return f'<script type="application/json">{script_json(value)}</script>'


def table(records: list[dict], count: int, *, samples: bool = False) -> str:
    """A table that can be sorted, searched and copied. Lists and objects of a record are shown when it is opened."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    short = [name for name in columns if not any(isinstance(record.get(name), list | dict) for record in records)]
    note = f"<p>The first {len(records):,} of {count:,}.</p>" if len(records) < count else ""
    content = {"columns": short, "rows": records}
    kind = "samples" if samples else "rows"
    return f'{note}<div class="{kind}">{_data(content)}</div>'


def tree(value: Any, depth: int = 0) -> str:
    """A JSON value as nested lists, the deeper ones closed."""
    if isinstance(value, list) and len(value) > 2 and all(isinstance(part, dict) for part in value):
        return table(value[:TABLE_ROWS], len(value))
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        if all(not isinstance(part, list | dict) for part in value):
            text = ", ".join(map(_plain, value))
            return html.escape(text if len(text) < 400 else f"{text[:400]} ... ({len(value)} values)")
        items = enumerate(value)
    else:
        return html.escape(_plain(value))
    rows = []
    for name, part in items:
        label, nested = html.escape(str(name)), isinstance(part, dict) or (isinstance(part, list) and len(part) > 8)
        inner = tree(part, depth + 1)
        if nested and depth:
            inner = f"<details><summary>{len(part)} entries</summary>{inner}</details>"
        rows.append(f"<tr><th scope='row'>{label}<td>{inner}")
    return f"<table class='tree'>{''.join(rows)}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)
