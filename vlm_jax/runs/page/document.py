"""The page as a whole: its parts in order, its style and its scripts, all in one file."""

import collections
import functools
import html
import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vlm_jax.errors import UserError, unwritten
from vlm_jax.runs.page import charts
from vlm_jax.runs.page.comparison import NAMES, Pair, Paired, differing, maps, scores
from vlm_jax.runs.page.reading import Entry, RunFolder, script_json
from vlm_jax.runs.page.views import Options, Part, drawn, show, table, tree


def write_page(
    run: Path, out: Path | None = None, samples: int = 200, *, other: Path | None = None, paired: Paired | None = None
) -> Path:
    """Writes the page of a run folder, or of two, side by side.

    Args:
        out: the file; by default ``page.html`` in the folder, and ``compared.html`` for two.
        samples: how many samples of each file are shown.
        other: the folder of a second run.
        paired: with it, how the scores of their samples are compared, such as :func:`interventions.statistics.paired`.

    Returns:
        The file.

    Raises:
        UserError: if a folder is no run folder, or the page cannot be written.
    """
    folders = [RunFolder.open(run), *([] if other is None else [RunFolder.open(other)])]
    out = out or run / ("page.html" if other is None else "compared.html")
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file such as page.html")
    text = _document(folders, Options(out, samples), paired)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritten(out, error) from None
    return out


#: Files of one name, above this number, stand in a group that is closed at first.
_MANY = 6


class _Section(NamedTuple):
    """A part of the page under a heading."""

    title: str
    anchor: str
    file: str
    """The file that it shows, by its path in the run folder; "" if it shows none."""
    rank: int
    body: str


def _document(folders: list[RunFolder], options: Options, paired: Paired | None) -> str:
    sections: dict[str, list[tuple[int, Entry, Part]]] = {}
    for number, folder in enumerate(folders):
        for entry in folder.entries:
            if (part := show(folder, entry, options)) is not None:
                sections.setdefault(entry.file, []).append((number, entry, part))
    found = [_section(folders, shown, options) for shown in sections.values()]
    if len(folders) == 2:
        found += _compared(Pair(*folders), paired)
    found.sort(key=lambda section: section.rank)
    groups = _grouped(_told_apart(found))
    links = "".join(f'<li><a href="#{_target(group)}">{html.escape(_title(group))}</a>' for group in groups)
    parts = "".join(map(_parts, groups))
    # Before the problems, because they can find some.
    pictures = "".join(
        f'<script class="pictures" type="application/json">{script_json(folder.pictures())}</script>'
        for folder in folders
    )
    return _TEMPLATE.format(
        title=html.escape(" and ".join(f"{folder.command}: {folder.path.resolve().name}" for folder in folders)),
        policy=_POLICY,
        command=html.escape(" and ".join(dict.fromkeys(folder.command for folder in folders))),
        style=f"{_asset('page.css')}\n{_tables('css')}",
        heads=_side_by_side([(number, _head(folder)) for number, folder in enumerate(folders)], folders),
        links=links,
        parts=parts or "<p>No results yet.</p>",
        pictures=pictures,
        vega=_vega(),
        tables=script_json(_tables("js")),
        script=_asset("overlay.js") + _asset("page.js"),
    )


def _head(folder: RunFolder) -> str:
    """What a run is and how it was made."""
    facts = {name: value for name, value in folder.config.items() if name != "command"}
    about = f"<details><summary>options</summary>{tree(facts)}</details>"
    about += f"<details><summary>model, data and versions</summary>{tree(folder.manifest)}</details>"
    if folder.seconds:
        about += f"<details><summary>seconds of each stage</summary>{tree(folder.seconds)}</details>"
    problems = "".join(f"<li>{html.escape(problem)}" for problem in dict.fromkeys(folder.problems))
    said = f'<ul class="problems" role="status">{problems}</ul>' if problems else ""
    name = html.escape(folder.name)
    return f'<p>{html.escape(_subject(folder))}</p><p class="file">{name}</p>{said}<div class="about">{about}</div>'


def _side_by_side(bodies: list[tuple[int, str]], folders: list[RunFolder]) -> str:
    """What belongs to each run, under the run's name if there are two."""
    if len(folders) == 1:
        return "".join(body for _, body in bodies)
    parts = "".join(f'<div data-run="{number}"><h3>{NAMES[number]}</h3>{body}</div>' for number, body in bodies)
    return f'<div class="{"pair" if len(bodies) == 2 else "alone"}">{parts}</div>'


def _section(folders: list[RunFolder], shown: list[tuple[int, Entry, Part]], options: Options) -> _Section:
    """The views of a file, in each run that has it."""
    bodies = []
    for number, entry, part in shown:
        link = html.escape(folders[number].link(entry.file, options.page))
        body = f'{part.body}<p class="file"><a href="{link}">{html.escape(entry.file)}</a></p>'
        bodies.append((number, body))
    entry = shown[0][1]
    rank = min(part.rank for *_, part in shown)
    title = " / ".join(dict.fromkeys(entry.title for _, entry, _ in shown))
    return _Section(title, _anchor(entry), entry.file, rank, _side_by_side(bodies, folders))


def _told_apart(sections: list[_Section]) -> list[_Section]:
    """Sections that have one title get their files' names too."""
    titles = collections.Counter(one.title for one in sections)
    return [
        one._replace(title=f"{one.title} ({one.file})") if titles[one.title] > 1 and one.file else one
        for one in sections
    ]


def _grouped(sections: list[_Section]) -> list[list[_Section]]:
    """The sections of files that have one name and are many, such as those of a study's cells, in groups; every other
    section alone."""
    names = collections.Counter(Path(one.file).name for one in sections if one.file)
    groups: dict[str, list[_Section]] = {}
    for one in sections:
        name = Path(one.file).name
        groups.setdefault(name if names[name] > _MANY else one.anchor, []).append(one)
    return list(groups.values())


def _title(group: list[_Section]) -> str:
    return group[0].title if len(group) == 1 else f"{Path(group[0].file).name} in {len(group)} folders"


def _target(group: list[_Section]) -> str:
    return group[0].anchor if len(group) == 1 else f"group-{group[0].anchor}"


def _parts(group: list[_Section]) -> str:
    """The sections of a group, in a box that opens if they are several."""
    parts = "".join(
        f'<section id="{one.anchor}" data-file="{html.escape(one.file)}">'
        f"<h2>{html.escape(one.title)}</h2>{one.body}</section>"
        for one in group
    )
    if len(group) == 1:
        return parts
    return (
        f'<details class="group" id="{_target(group)}"><summary>{html.escape(_title(group))}</summary>{parts}</details>'
    )


def _compared(pair: Pair, paired: Paired | None) -> list[_Section]:
    """Where two runs differ, before everything else."""

    def attempt(what: str, make: Callable[[], str]) -> str:
        try:
            return make()
        except Exception as error:  # content of another form can raise any error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            pair.second.problems.append(f"{what} cannot be compared ({reason})")
            return "<p>They cannot be compared.</p>"

    def options() -> str:
        rows = differing(pair)
        return table(rows, len(rows)) if rows else "<p>None: options, model, data and versions are the same.</p>"

    def numbers() -> str:
        rows = [] if paired is None else scores(pair, paired)
        if not rows:
            return "<p>There is no number that both have of the same samples, with one line for each.</p>"
        note = "<p>Means over the samples that both have, and the difference with its 95 % interval (paired).</p>"
        return note + table(rows, len(rows))

    found = [
        _Section("Options that differ", "compared-options", "", -2, attempt("the options", options)),
        _Section("Differences", "compared-scores", "", -2, attempt("the samples", numbers)),
    ]
    for number, (entry, chart) in enumerate(maps(pair)):
        title = f"{entry.title}: B - A"
        body = attempt(entry.file, lambda chart=chart, title=title: drawn(charts.figure("heat_map", chart, title)))
        found.append(_Section(title, f"compared-map-{number}", "", -1, body))
    return found


def _subject(folder: RunFolder) -> str:
    """What was run, in a line."""
    config = folder.config
    values = [config[name] for name in ("model", "task", "recipe", "placement") if config.get(name)]
    return ", ".join(", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)


def _anchor(entry: Entry) -> str:
    return "part-" + "".join(character if character.isalnum() else "-" for character in entry.file)


def _asset(name: str) -> str:
    return importlib.resources.files("vlm_jax.runs.page").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    import vl_convert  # takes a second to import, so only pages pay for it

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


@functools.cache
def _tables(suffix: str) -> str:
    """DataTables, as itables packs it: a module, and its style."""
    return importlib.resources.files("itables").joinpath(f"html/dt_bundle.{suffix}").read_text(encoding="utf-8")


#: What a browser may load: what stands in the page, and nothing else. (Vega compiles expressions, hence unsafe-eval.)
_POLICY = (
    "default-src 'none'; img-src data: blob:; font-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline' 'unsafe-eval' blob:"
)
_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<button id="theme" type="button" aria-pressed="false">Dark mode</button>
<h1>{command}</h1>
{heads}
</header>
<nav aria-label="Results"><ul>{links}</ul></nav>
<main>{parts}</main>
<p id="said" role="status"></p>
{pictures}
<script>{vega}</script>
<script>const TABLES = {tables};</script>
<script type="module">{script}</script>
</body>
</html>
"""
