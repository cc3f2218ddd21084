"""The page as a whole: its parts in order, its style and its scripts, all in one file."""

import functools
import html
import importlib.resources
from pathlib import Path

from vlm_jax.errors import UserError, unwritten
from vlm_jax.runs.page.reading import Entry, RunFolder, script_json
from vlm_jax.runs.page.views import Options, show, tree


def write_page(run: Path, out: Path | None = None, samples: int = 200) -> Path:
    """Writes the page of a run folder.

    Args:
        out: the file; by default ``page.html`` in the folder.
        samples: how many samples of each file are shown.

    Returns:
        The file.

    Raises:
        UserError: if the folder is no run folder, or the page cannot be written.
    """
    folder, out = RunFolder.open(run), out or run / "page.html"
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file such as page.html")
    text = _document(folder, Options(out, samples))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritten(out, error) from None
    return out


def _document(folder: RunFolder, options: Options) -> str:
    found = [(part, entry) for entry in folder.entries if (part := show(folder, entry, options)) is not None]
    found.sort(key=lambda pair: pair[0].rank)
    links = "".join(f'<li><a href="#{_anchor(entry)}">{html.escape(entry.title)}</a>' for _, entry in found)
    parts = "".join(_section(folder, entry, part.body, options) for part, entry in found)
    facts = {name: value for name, value in folder.config.items() if name != "command"}
    about = f"<details><summary>options</summary>{tree(facts)}</details>"
    about += f"<details><summary>model, data and versions</summary>{tree(folder.manifest)}</details>"
    if folder.seconds:
        about += f"<details><summary>seconds of each stage</summary>{tree(folder.seconds)}</details>"
    pictures = script_json(folder.pictures())  # before the problems, because it can find some
    problems = "".join(f"<li>{html.escape(problem)}" for problem in folder.problems)
    return _TEMPLATE.format(
        title=html.escape(f"{folder.command}: {folder.path.resolve().name}"),
        policy=_POLICY,
        command=html.escape(folder.command),
        name=html.escape(folder.name),
        subject=html.escape(_subject(folder)),
        style=f"{_asset('page.css')}\n{_tables('css')}",
        problems=f'<ul class="problems" role="status">{problems}</ul>' if problems else "",
        about=about,
        links=links,
        parts=parts or "<p>No results yet.</p>",
        pictures=pictures,
        vega=_vega(),
        tables=script_json(_tables("js")),
        script=_asset("page.js"),
    )


def _subject(folder: RunFolder) -> str:
    """What was run, in a line."""
    config = folder.config
    values = [config[name] for name in ("model", "task", "recipe", "placement") if config.get(name)]
    return ", ".join(", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)


def _section(folder: RunFolder, entry: Entry, body: str, options: Options) -> str:
    link = html.escape(folder.link(entry.file, options.page))
    return (
        f'<section id="{_anchor(entry)}"><h2>{html.escape(entry.title)}</h2>{body}'
        f'<p class="file"><a href="{link}">{html.escape(entry.file)}</a></p></section>'
    )


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
<p>{subject}</p>
<p class="file">{name}</p>
{problems}
<div class="about">{about}</div>
</header>
<nav aria-label="Results"><ul>{links}</ul></nav>
<main>{parts}</main>
<p id="said" role="status"></p>
<script id="pictures" type="application/json">{pictures}</script>
<script>{vega}</script>
<script>const TABLES = {tables};</script>
<script type="module">{script}</script>
</body>
</html>
"""
