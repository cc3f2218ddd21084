"""The report page: what a reader finds in it, and what it says of folders that are damaged or not finished."""

import base64
import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_reader import EVIL, ROWS, Reader, read, values
from PIL import Image
from run_folders import unlisted

from eval import page as command
from interventions.figures.base import save_figure
from interventions.figures.editing import before_and_after
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import TYPES, Artifact, Schema
from vlm_jax.runs.command import command as command_wrapper
from vlm_jax.runs.folder import Run
from vlm_jax.runs.options import DeviceOptions
from vlm_jax.runs.page import views, write_page
from vlm_jax.runs.page.views import VIEWS
from vlm_jax.runs.pictures import save_pictures
from vlm_jax.runs.token_maps import TOKEN_MAPS, TokenMap, write_token_maps
from vlm_jax.seen import Prompt


def example(number: int, question: str = "What?") -> Example:
    image = Image.new("RGB", (20 * number, 10), (number, 0, 0))
    return Example(f"t/{number}", (image,), question, ("cat",), task="t")


@pytest.fixture
def run(tmp_path):
    """A run folder with something of every kind."""
    run = Run.open(tmp_path / "run", {"model": "mini", "prompt": EVIL})
    chart = {"rows": ROWS, "titles": {"value": "RR"}}
    content = {"drawer": "a", "title": "A map", "data": {}, "chart": chart}
    run.save_json("map.json", content, Artifact("heat_map", "A map"))
    run.write("map.png", lambda path: Image.new("RGB", (4, 4)).save(path), Artifact("figure", "A map", data="map.json"))
    old = {"drawer": "a", "title": "Old", "data": {}}
    run.save_json("old.json", old, Artifact("bars", "Old"))
    picture = Artifact("figure", "An old picture", data="old.json")
    run.write("old.png", lambda path: Image.new("RGB", (4, 4)).save(path), picture)
    records = [{"id": f"t/{n}", "correct": n > 1, "prediction": EVIL, "scores": [0.5, float("nan")]} for n in range(9)]
    run.save_lines("samples.jsonl", records, Artifact("samples", "Answers"))
    save_pictures(run, [example(1, EVIL), example(2), example(20)])
    steps = [{"step": n, "loss": 1 / (n + 1), "lr": 1e-3} for n in range(3)]
    run.save_lines("training/metrics.jsonl", steps, Artifact("training", "The training"))
    run.write("rows.csv", lambda path: path.write_text("cell,rr,n,n\n007,0.50,1,2\n"), Artifact("table", "Rates"))
    run.write("rows.md", lambda path: path.write_text("| cell | the same |\n"), Artifact("table", "Rates again"))
    run.write("alone.md", lambda path: path.write_text("| of its own |\n"), Artifact("table", "A text"))
    table = pa.table({"n": list(range(3000)), "x": [float("nan")] * 3000})
    run.write("many.parquet", lambda path: pq.write_table(table, path), Artifact("table", "Many rows"))
    metrics = {"mean": 0.123456789, "nested": {"a": {"b": 1}}, "none": None}
    run.save_json("results.json", metrics, Artifact("metrics", "Scores"))
    run.save_json("placement.json", ["L0-attn", "L3-mlp"], Artifact("placement", "Where LoRA is"))
    schema = Schema("numbers", {"a": "numbers of something"})
    run.save_arrays("arrays.npz", {"a": np.zeros(2)}, Artifact("arrays", "Numbers", schema))
    return run


def test_what_a_page_shows(run):
    page = read(write_page(run.folder))
    text = " ".join(page.texts)
    for said in (
        "A map",
        "An old picture",
        "Answers",
        "Rates",
        "The training",
        "Scores",
        "0.123457",
        "L0-attn, L3-mlp",
    ):
        assert said in text
    assert "Pictures, questions" not in text  # the samples show them
    assert "| of its own |" in text and "| the same |" not in text
    specs = [script for script in page.scripts if "$schema" in script]
    assert len(specs) == 2 and any(ROWS[0].items() <= row.items() for row in next(iter(values(specs[0]))))
    tables = [script for script in page.scripts if "columns" in script]
    samples = next(table for table in tables if "prediction" in table["columns"])
    assert "scores" not in samples["columns"] and samples["rows"][0]["scores"] == [0.5, None]
    many = next(table for table in tables if table["columns"] == ["n", "x"])
    assert len(many["rows"]) == 2000 and "The first 2,000 of 3,000." in text
    pictures = next(script for script in page.scripts if "t/1" in script)
    assert pictures.keys() == {"t/1", "t/2"}  # not the third, which no table shows
    assert pictures["t/1"][0]["question"] == EVIL
    assert pictures["t/2"][0]["pictures"][0].startswith("data:image/png;base64,")
    shown = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert shown == ["A map", "An old picture"]  # below its chart, and instead of one
    rates = next(table for table in tables if "rr" in table["columns"])
    assert rates["columns"] == ["cell", "rr", "n (3)", "n (4)"]
    assert rates["rows"] == [{"cell": "007", "rr": "0.50", "n (3)": "1", "n (4)": "2"}]  # as they were written


def test_texts_cannot_become_markup(run):
    """Neither from options nor from samples; they come back as they were."""
    text = write_page(run.folder).read_text()
    assert EVIL not in text
    page = Reader(text)
    assert not [attributes for tag, attributes in page.tags if tag == "img" and attributes["src"] == "x"]
    assert any(EVIL in said for said in page.texts)
    samples = next(script for script in page.scripts if "prediction" in script.get("columns", ()))
    assert samples["rows"][0]["prediction"] == EVIL


def test_nothing_is_fetched(run):
    """Addresses are parts of the page, data, or files beside it."""
    page = read(write_page(run.folder))
    for address in page.addresses:
        assert address.startswith(("#", "data:")) or (run.folder / address).exists(), address
    assert run.folder.joinpath("page.html").stat().st_size < 3 * 2**20


def test_links_from_elsewhere(run, tmp_path):
    out = tmp_path / "deep" / "er" / "a page.html"
    page = read(write_page(run.folder, out))
    links = [address for address in page.addresses if not address.startswith(("#", "data:"))]
    assert links and all((out.parent / link).exists() for link in links)


def test_fewer_samples(run):
    page = read(write_page(run.folder, samples=4))
    samples = next(script for script in page.scripts if "prediction" in script.get("columns", ()))
    assert len(samples["rows"]) == 4 and "The first 4 of 9." in " ".join(page.texts)


def test_a_run_that_is_going_on(tmp_path):
    run = Run.open(tmp_path / "run", {"model": "mini"})
    run.begin()
    assert "has written no result" in " ".join(read(write_page(run.folder)).texts)
    with run.path("samples.jsonl").open("w") as file:
        file.write('{"id": "a"}\n{"id": "b"')  # a line that is being written
    run.add("samples.jsonl", Artifact("samples", "Answers"))
    page = read(write_page(run.folder))
    assert next(script for script in page.scripts if "columns" in script)["rows"] == [{"id": "a"}]
    run.path("samples.jsonl").write_text('{"id": "a"}\n{"id": "b"}')  # by a program that ends no last line
    assert len(next(script for script in read(write_page(run.folder)).scripts if "columns" in script)["rows"]) == 2


DAMAGE = {
    "samples.jsonl": ('{"id": 3\n', "samples.jsonl cannot be read"),
    "map.json": ('{"chart": {"rows": [{"panel": 1}], "titles": {}}}', "map.json holds something else"),
    "results.json": ("{", "results.json cannot be read"),
    "many.parquet": ("PAR1", "many.parquet cannot be read"),
    "seconds.json": ("[]", "seconds.json cannot be read"),
    "manifest.json": ("", "manifest.json cannot be read"),
    "pictures/index.json": ("nothing", "pictures/index.json cannot be read"),
    "rows.csv": ("a,b\n1\n", "rows.csv cannot be read"),
    "old.png": (None, "old.png is listed and does not exist"),
    "training/metrics.jsonl": ("[1]\n", "training/metrics.jsonl cannot be read"),
    "artifacts.json": ("{}", "artifacts.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(run, name):
    """The page tells it and shows the rest."""
    content, said = DAMAGE[name]
    if content is None:
        (run.folder / name).unlink()
    else:
        (run.folder / name).write_text(content)
    text = " ".join(read(write_page(run.folder)).texts)
    assert said in text
    assert "Where LoRA is" in text or name == "artifacts.json"


@pytest.mark.parametrize(
    "content", [[1], "text", {"a": 1}, [{"id": "t/1"}], [{"id": "t/1", "pictures": 3}], [{"id": ["t"], "pictures": []}]]
)
def test_lists_of_pictures_of_another_form(run, content):
    (run.folder / "pictures/index.json").write_text(json.dumps(content))
    assert "pictures/index.json cannot be read" in " ".join(read(write_page(run.folder)).texts)


@pytest.mark.parametrize("title", [3, None, ["a"]])
def test_titles_that_are_no_text(run, title):
    listing = json.loads((run.folder / "artifacts.json").read_text())
    for entry in listing["artifacts"]:
        entry["title"] = title
    (run.folder / "artifacts.json").write_text(json.dumps(listing))
    assert "placement.json" in " ".join(read(write_page(run.folder)).texts)


def test_charts_that_cannot_be_drawn(run):
    """Their pictures are shown."""
    content = json.loads((run.folder / "map.json").read_text())
    for titles, rows in (({"value": 3, "x": {"a": 1}}, ROWS), ({}, [])):
        (run.folder / "map.json").write_text(json.dumps(content | {"chart": {"titles": titles, "rows": rows}}))
        page = read(write_page(run.folder))
        assert [a["alt"] for tag, a in page.tags if tag == "img"] == ["A map", "An old picture"]
        assert len([script for script in page.scripts if "$schema" in script]) == 1  # the training's


def test_ids_that_two_tasks_share(tmp_path):
    run = Run.open(tmp_path / "run", {})
    one = example(1, "What is one?")
    save_pictures(run, [one, dataclasses.replace(one, task="u", question="What is two?")])
    run.save_lines("samples.jsonl", [{"id": "t/1", "task": "u", "correct": True}], Artifact("samples", "Answers"))
    kept = next(script for script in read(write_page(run.folder)).scripts if "t/1" in script)["t/1"]
    assert [(sample["task"], sample["question"]) for sample in kept] == [("t", "What is one?"), ("u", "What is two?")]


@dataclasses.dataclass(frozen=True)
class Options(DeviceOptions):
    """Of a command that writes a result."""

    out: Path = Path("runs/none")


def test_a_command_makes_its_page(tmp_path, capsys):
    """With --page, at its end; the run is the same with and without."""

    @command_wrapper(configured=False)
    def main(args: Options) -> None:
        Run.open(args.out, args).save_json("results.json", {"a": 1}, Artifact("metrics", "Scores"))

    main(Options(out=tmp_path / "run"))
    assert not (tmp_path / "run/page.html").exists()
    main(Options(out=tmp_path / "run", page=True))
    assert "Scores" in (tmp_path / "run/page.html").read_text()
    assert f"the page: {tmp_path / 'run/page.html'}" in capsys.readouterr().out
    assert "page" not in json.loads((tmp_path / "run/config.json").read_text())


def test_missing_and_unknown(run):
    (run.folder / "placement.json").unlink()
    listing = json.loads((run.folder / "artifacts.json").read_text())
    entry = next(entry for entry in listing["artifacts"] if entry["file"] == "arrays.npz")
    entry["type"], entry["title"] = "hologram", "Of a later version"
    (run.folder / "artifacts.json").write_text(json.dumps(listing))
    page = read(write_page(run.folder))
    text = " ".join(page.texts)
    assert "placement.json is listed and does not exist" in text
    assert "Of a later version" in text and "arrays.npz" in page.addresses


def test_every_type_has_a_view():
    assert VIEWS.keys() == TYPES.keys()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("none",), "is no folder: name the --out of a command"),
        ((".",), "is no run folder, because it has no config.json"),
        (("run", "run"), "is a folder: name a file such as page.html"),
        (("run", "run/config.json/page.html"), "cannot write"),
    ],
)
def test_refused(run, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / name for name in arguments]
    with pytest.raises(SystemExit):
        command.main(command.Args(paths[0], out=paths[1] if len(paths) > 1 else None))
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1


def test_the_command_tells_the_size(run, capsys):
    command.main(command.Args(run.folder))
    assert capsys.readouterr().out == f"{run.folder / 'page.html'}: {_mebibytes(run.folder / 'page.html')} MiB\n"


def _mebibytes(path) -> str:
    return f"{path.stat().st_size / 2**20:.1f}"


def test_pictures_are_kept_once(tmp_path):
    """Tasks take turns, equal pictures are one file, photographs are small."""
    run = Run.open(tmp_path / "run", {})
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8))
    examples = [example(1), dataclasses.replace(example(1), id="t/9"), example(3)]
    other = dataclasses.replace(example(2), id="u/0", images=(photograph,), task="u", answers=("dog", "cat"))
    save_pictures(run, [*examples, other], most=3)
    listed = json.loads((run.folder / "pictures/index.json").read_text())
    index = {sample["id"]: sample for sample in listed}
    assert list(index) == ["t/1", "u/0", "t/9"] and index["u/0"]["answers"] == ["dog", "cat"]
    assert index["t/1"]["pictures"] == index["t/9"]["pictures"]
    (photo,) = index["u/0"]["pictures"]
    with Image.open(run.folder / "pictures" / photo) as small:
        assert photo.endswith(".jpg") and small.size == (336, 252)
    with Image.open(run.folder / "pictures" / index["t/1"]["pictures"][0]) as drawn:
        assert drawn.convert("RGB").getpixel((0, 0)) == (1, 0, 0)
    assert photograph.size == (1200, 900)  # the example's own is as it was
    before = {path: os.stat(path).st_mtime_ns for path in (run.folder / "pictures").iterdir()}
    (run.folder / "artifacts.json").unlink()
    save_pictures(run, [example(3)])  # a later session, after one that was killed before it listed them
    assert "pictures" in json.loads((run.folder / "artifacts.json").read_text())["schemas"]
    assert {path: os.stat(path).st_mtime_ns for path in (run.folder / "pictures").iterdir()} == before


def test_a_damaged_picture(run):
    for path in (run.folder / "pictures").glob("*.png"):
        path.unlink()
    with pytest.raises(UserError):
        write_page(run.folder / "none")
    assert "cannot be read" in " ".join(read(write_page(run.folder)).texts)


def test_pictures_are_listed_whatever_is_written_first(tmp_path):
    """A study's first entry is the log of a training, a file that the training wrote."""
    run = Run.open(tmp_path / "run", {})
    run.when_begun = functools.partial(save_pictures, examples=[example(1)])
    run.path("metrics.jsonl").write_text("{}\n")
    run.add("metrics.jsonl", Artifact("training", "The training"))
    listed = json.loads((run.folder / "artifacts.json").read_text())["artifacts"]
    assert [entry["file"] for entry in listed] == ["metrics.jsonl", "pictures"]


def token_map(queries: list[int] | None = None) -> TokenMap:
    places = np.array([[-1] * 3, [0, 0, 0], [0, 0, 1], [-1] * 3])
    shape = (2, 1, 4) if queries is None else (2, 1, len(queries), 4)
    values = np.linspace(-1, 0.5, math.prod(shape)).reshape(shape)
    picture = Image.new("RGB", (8, 4), (9, 9, 9))
    prompt = Prompt(["a", "<i>", "<i>", EVIL], [picture], [(1, 2)], places)
    return TokenMap("t/1", "t", prompt, values, queries)


@pytest.mark.parametrize("queries", [None, [3]])
def test_values_of_tokens(run, queries):
    """The page has every value as it is kept."""
    one = token_map(queries)
    write = functools.partial(write_token_maps, maps=[one], value="effect", series=["all"])
    run.write("token_maps", write, Artifact("token_maps", "Effects", TOKEN_MAPS))
    assert not unlisted(run.folder)
    page = read(write_page(run.folder))
    (shown,) = [script for script in page.scripts if "series" in script]
    (sample,) = shown["samples"]
    assert sample["tokens"][3] == EVIL and sample["places"] == [None, [0, 0, 0], [0, 0, 1], None]
    assert sample["pictures"][0].startswith("data:image/png;base64,") and sample["queries"] == queries
    values = np.frombuffer(base64.b64decode(sample["values"]), "<f2").reshape(one.values.shape)
    np.testing.assert_allclose(values, one.values, rtol=1e-3)
    whole = (run.folder / "token_maps/index.json").read_text()
    for damage in ({"tokens": ["a"]}, {"array": "7"}, {"pictures": 3}, {"places": None}, {"tokens": [1, 2, 3, 4]}):
        index = json.loads(whole)
        index["samples"][0] |= damage
        (run.folder / "token_maps/index.json").write_text(json.dumps(index))
        page = read(write_page(run.folder))
        assert "token_maps holds something else" in " ".join(page.texts), damage
        assert not [script for script in page.scripts if "series" in script]
    (run.folder / "token_maps/index.json").write_text(whole)
    np.savez(run.folder / "token_maps/arrays.npz", **{"0": np.full(one.values.shape, np.nan, np.float16)})
    assert "or are not finite" in " ".join(read(write_page(run.folder)).texts)
    (run.folder / "token_maps/arrays.npz").write_bytes(b"no zip")
    assert "token_maps/arrays.npz cannot be read" in " ".join(read(write_page(run.folder)).texts)


def test_words_of_tokens(run):
    """What every token stands for in every layer, and the layers' own names; a folder of an older version has none."""
    words = [["w", "x", "y", EVIL], ["a", "b", "c", "d"]]
    one = token_map()._replace(words=words)
    write = functools.partial(write_token_maps, maps=[one], value="p", series=["all"], layers=["embeddings", "0"])
    run.write("token_maps", write, Artifact("token_maps", "Words", TOKEN_MAPS))
    (shown,) = [script for script in read(write_page(run.folder)).scripts if "series" in script]
    assert shown["samples"][0]["words"] == words and shown["layers"] == ["embeddings", "0"]
    whole = (run.folder / "token_maps/index.json").read_text()
    damages = [{"words": words[:1]}, {"words": [["a"], ["b"]]}, {"words": [[1, 2, 3, 4], words[1]]}, {"words": [3, 4]}]
    for damage, layers in [*((damage, ["a", "b"]) for damage in damages), ({}, ["a"]), ({}, 3), ({}, [1, 2])]:
        index = json.loads(whole) | {"layers": layers}
        index["samples"][0] |= damage
        (run.folder / "token_maps/index.json").write_text(json.dumps(index))
        assert "token_maps holds something else" in " ".join(read(write_page(run.folder)).texts), (damage, layers)
    index = json.loads(whole)
    del index["layers"], index["samples"][0]["words"]
    (run.folder / "token_maps/index.json").write_text(json.dumps(index))
    (shown,) = [script for script in read(write_page(run.folder)).scripts if "series" in script]
    assert shown["layers"] is None and shown["samples"][0]["words"] is None


def test_many_values_of_tokens_are_cut(run, monkeypatch):
    """At a number of bytes, which the page tells."""
    monkeypatch.setattr(views, "MAP_BYTES", 20)
    write = functools.partial(write_token_maps, maps=[token_map()] * 3, value="effect", series=["all"])
    run.write("token_maps", write, Artifact("token_maps", "Effects", TOKEN_MAPS))
    page = read(write_page(run.folder))
    (shown,) = [script for script in page.scripts if "series" in script]
    assert len(shown["samples"]) == 1 and "The first 1 of 3 samples." in " ".join(page.texts)


def test_files_of_one_name_stand_in_a_group(run):
    """If they are many; the others stand alone, and titles that are the same get their files' names."""
    for number in range(7):
        run.save_lines(f"cells/{number}/answers.jsonl", [{"id": "t/1", "correct": True}], Artifact("samples", "Cell"))
    for number in range(2):
        run.save_json(f"pair/{number}/score.json", {"a": 1}, Artifact("metrics", "Score"))
    page = read(write_page(run.folder))
    groups = [attributes["id"] for tag, attributes in page.tags if attributes.get("class") == "group"]
    assert len(groups) == 1 and f"#{groups[0]}" in page.addresses
    text = " ".join(page.texts)
    assert text.count("answers.jsonl in 7 folders") == 2  # in the list of contents, and above the group
    assert "Score (pair/0/score.json)" in text and "Score (pair/1/score.json)" in text and "Answers (" not in text
    files = [attributes["data-file"] for tag, attributes in page.tags if tag == "section"]
    assert len(files) == len(set(files)) and {f"cells/{n}/answers.jsonl" for n in range(7)} <= set(files)


def test_an_estimate_knows_the_folders_of_its_samples(run):
    """The chart has them, for the click; its tooltips do not show them."""
    one = {"mean": 0.5, "low": 0.25, "high": 0.75, "folders": ["cells/0"]}
    save_figure(run, "accuracy", before_and_after, "Scores", accuracy={"t": {"before": one, "after": one}})
    page = read(write_page(run.folder))
    (spec,) = [script for script in page.scripts if script.get("description") == "Scores"]
    (rows,) = values(spec)
    assert [row["folders"] for row in rows] == [["cells/0"]] * 2
    tips = [tip["field"] for layer in spec["layer"] for tip in layer["encoding"].get("tooltip", ())]
    assert "value" in tips and "folders" not in tips


def test_an_adapter_says_what_it_is(run):
    def write(folder):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "bias": None, "target_modules": ["q_proj"]}))

    run.write("adapter", write, Artifact("adapter", "LoRA"))
    text = " ".join(read(write_page(run.folder)).texts)
    assert "q_proj" in text and "bias" not in text
    (run.folder / "adapter/adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in " ".join(read(write_page(run.folder)).texts)
