"""Figures of what the residual stream says: the logit lens by layer and over a picture, and attributions by module and
head."""

import base64
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager, patheffects
from matplotlib.figure import Figure
from PIL import Image

from interventions.figures.base import COLOURS, drawer, estimate, subplots, with_n
from vlm_jax.runs.charts import Chart

_LINES = {"p_gold": "probability of the gold word", "is_likeliest": "share of samples in which it is the likeliest"}


#: A chart's field -> the part of an estimate.
_ENDS = {"y": "mean", "low": "low", "high": "high"}


def _by_layer_chart(tasks: Mapping[str, Mapping], samples: Mapping[str, int] | None = None) -> Chart:
    rows = []
    for task, lens in tasks.items():
        for name, title in _LINES.items():
            for point, rank in enumerate(lens["median_rank"]):
                ends = {end: lens[name][part][point] for end, part in _ENDS.items()}
                row = {"panel": task, "series": title, "x": point - 1, **ends, "median rank": rank}
                rows.append(row | _n(samples, task))
    return Chart(rows, {"x": "layer (-1: the embeddings)", "y": "probability or share", "series": "the gold word's"})


def _n(samples: Mapping[str, int] | None, task: str) -> dict[str, int]:
    """The field of a chart's row that says how many samples are behind it, if it is known."""
    return {} if samples is None else {"n": samples[task]}


@drawer(
    "curves",
    _by_layer_chart,
    dpi=110,
    tasks="task -> the lens of interventions.lens.summary.summarise",
    samples="task -> its number of samples; null if not known",
)
def by_layer(tasks: Mapping[str, Mapping], samples: Mapping[str, int] | None = None) -> Figure:
    """Per task: the probability of the gold word after every layer and how often it is the likeliest, with 95 %
    intervals, above its median rank."""
    figure, axes = subplots(2, len(tasks), size=(4.6 * len(tasks), 5.2), sharex="col", height_ratios=[2, 1])
    for (top, bottom), (task, lens) in zip(axes.T, tasks.items(), strict=True):
        points = np.arange(len(lens["median_rank"])) - 1
        for (name, title), colour in zip(_LINES.items(), COLOURS, strict=False):
            mean, low, high = (np.array(lens[name][part], float) for part in ("mean", "low", "high"))
            top.plot(points, mean, "o-", markersize=3.5, color=colour, label=title)
            top.fill_between(points, low, high, alpha=0.2, color=colour, lw=0)
        bottom.plot(points, lens["median_rank"], "o-", markersize=3.5, color=COLOURS[2])
        top.set(title=with_n(task, (samples or {}).get(task)), ylim=(-0.03, 1.03))
        bottom.set(yscale="log", xlabel="layer (emb.: the embeddings)")
        bottom.set_xticks(points[:: _step(len(points))], ["emb.", *map(str, points[1:])][:: _step(len(points))])
        bottom.invert_yaxis()  # the likeliest word on top
        for axis in (top, bottom):
            axis.grid(lw=0.4, alpha=0.5)
    axes[0, 0].set_ylabel("probability or share")
    axes[1, 0].set_ylabel("median rank")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _columns(parts: Mapping[str, Any]) -> dict[str, dict[str, list]]:
    """Name -> the estimates by layer, of the modules and then of the heads."""
    titles = {"deepstack": "DeepStack", "edits": "edits"}
    found = {titles.get(name, name): parts[name] for name in ("attn", "mlp", *titles) if name in parts}
    heads = {part: np.array(parts["heads"][part]).T.tolist() for part in ("mean", "low", "high")}
    for head in range(len(heads["mean"])):
        found[f"head {head}"] = {part: values[head] for part, values in heads.items()}
    return found


def _attribution_chart(tasks: Mapping[str, Mapping], samples: Mapping[str, int] | None = None) -> Chart:
    rows = []
    for task, parts in tasks.items():
        for name, estimates in _columns(parts).items():
            for layer in range(len(estimates["mean"])):
                of_layer = {part: estimates[part][layer] for part in ("mean", "low", "high")}
                rows.append({"panel": task, "x": name, "y": layer, **estimate(of_layer)} | _n(samples, task))
    return Chart(rows, {"x": "module or head", "y": "layer", "value": "contribution to the logit"})


@drawer(
    "heat_map",
    _attribution_chart,
    dpi=110,
    tasks="task -> the attribution of interventions.lens.summary.summarise",
    samples="task -> its number of samples; null if not known",
)
def attribution(tasks: Mapping[str, Mapping], samples: Mapping[str, int] | None = None) -> Figure:
    """Per task: the mean contribution of every module to the logit by layer, and beside it that of every head, whose
    sum over heads is that of the attention. Both have colours of their own, because heads contribute less."""
    tables = [(task, *_tables(parts)) for task, parts in tasks.items()]
    widths = [width for _, modules, heads in tables for width in (len(modules[0]), max(2.5, len(heads[0])))]
    depth = max(len(modules[1]) for _, modules, _ in tables)
    size = 1.5 * len(widths) + 0.3 * sum(widths), 1.2 + 0.3 * max(depth, 6)
    figure, axes = subplots(1, len(widths), size=size, width_ratios=widths)
    for index, (task, *panels) in enumerate(tables):
        for axis, (names, values), what in zip(axes[0, 2 * index :], panels, ("modules", "heads"), strict=False):
            limit = float(np.abs(values).max()) or 1.0
            image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
            every = _step(len(names))
            axis.set_xticks(range(0, len(names), every), names[::every], fontsize=8)
            axis.set_yticks(range(0, len(values), _step(len(values))))
            axis.set_title(f"{with_n(task, (samples or {}).get(task))}\n{what}", fontsize=9)
            figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
        axes[0, 2 * index].set_ylabel("layer")
    figure.supxlabel("mean contribution to the logit", fontsize=9)
    return figure


def _tables(parts: Mapping[str, Any]) -> tuple[tuple[list[str], np.ndarray], tuple[list[str], np.ndarray]]:
    """The names and the means ``(layers, columns)`` of the modules, and of the heads."""
    columns = {name: np.array(estimates["mean"], float) for name, estimates in _columns(parts).items()}
    modules = [name for name in columns if not name.startswith("head ")]
    heads = [name for name in columns if name.startswith("head ")]
    of_modules = np.stack([columns[name] for name in modules], 1)
    return (modules, of_modules), ([name[5:] for name in heads], np.stack([columns[name] for name in heads], 1))


def _step(count: int) -> int:
    """Of many ticks, every so many are labelled."""
    return max(1, count // 12)


def _words_chart(samples: Sequence[Mapping[str, Any]]) -> Chart:
    rows = []
    for sample in samples:
        for point in sample["points"]:
            panel, shown = f"{sample['id']}, {point['name']}", point["probability"]
            for y, x in np.ndindex(len(shown), len(shown[0])):  # rows are texts, because those stay in their order
                rows.append({"panel": panel, "x": x, "y": str(y), "value": shown[y][x], "word": point["words"][y][x]})
    return Chart(rows, {"x": "column", "y": "row", "value": "probability of the likeliest word"})


@drawer(
    "heat_map",
    _words_chart,
    dpi=110,
    samples="id; picture, a PNG in base64; points: for each shown point of the stream its name, the words of the "
    "picture's tokens (rows, columns) and their probability",
)
def words(samples: Sequence[Mapping[str, Any]]) -> Figure:
    """A line per sample: its picture, as the model saw it, and at some points of the stream the likeliest word of each
    of its tokens, on the token's place. The darker the place, the likelier the word."""
    count = max(len(sample["points"]) for sample in samples)
    figure, axes = subplots(len(samples), count + 1, size=(3.1 * (count + 1), 3.4 * len(samples)))
    readable = _readable()
    for line, sample in zip(axes, samples, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(sample["picture"])))
        line[0].imshow(picture, interpolation="nearest")
        line[0].set_title(sample["id"], fontsize=8)
        for axis in line:
            axis.set_axis_off()
        for axis, point in zip(line[1:], sample["points"], strict=False):
            rows, columns = len(point["words"]), len(point["words"][0])
            axis.imshow(picture, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest", alpha=0.55)
            shade = np.zeros((rows, columns, 4))
            shade[..., 3] = 0.75 * np.array(point["probability"], float)
            axis.imshow(shade, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest")
            axis.set_box_aspect(picture.height / picture.width)
            size = min(9.0, max(2.0, 3.1 * 72 / columns / 4.5))  # points; a cell has room for about eight letters
            for y, x in np.ndindex(rows, columns):
                said = axis.text(x + 0.5, y + 0.5, readable(point["words"][y][x]), fontsize=size, color="white")
                said.set(ha="center", va="center", parse_math=False)
                said.set_path_effects([patheffects.withStroke(linewidth=size / 5, foreground="black")])
            axis.set_title(point["name"], fontsize=8)
    return figure


def _readable() -> Callable[[str], str]:
    """A function that makes a word's spaces and ends of lines visible, cuts it to eight letters, and puts a box in
    place of each letter that the figure's font lacks."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))

    @functools.cache
    def readable(word: str) -> str:
        shown = word.strip(" ").replace("\n", "\u21b5").replace("\t", "\u21e5") or "\u2423"
        shown = shown if len(shown) <= 8 else f"{shown[:7]}\u2026"
        return "".join(letter if font.get_char_index(ord(letter)) else "\u25a1" for letter in shown)

    return readable
