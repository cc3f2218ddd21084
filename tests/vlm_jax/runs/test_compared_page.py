"""The report page of two runs: what differs, and what is not compared."""

import json
from pathlib import Path

import pytest
from page_reader import EVIL, ROWS, Reader, read, values
from PIL import Image
from run_folders import unlisted

from eval import page as command
from interventions.statistics import paired
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
from vlm_jax.runs.page import write_page
from vlm_jax.runs.pictures import save_pictures


def written(folder: Path, options: dict, right: list[bool], colour: int = 0, values: tuple = (0.25, 0.5)) -> Run:
    """A run with answers to five questions, of which the last two show one picture, and a heat map of two cells."""
    run = Run.open(folder, options)
    numbers = [1, 2, 3, 4, 4]
    picture = [Image.new("RGB", (8, 8), (number, colour, 0)) for number in numbers]
    examples = [Example(f"t/{n}", (picture[n],), f"What is {n}?", ("cat",), task="t") for n in range(5)]
    save_pictures(run, examples)
    records = [
        {"id": f"t/{n}", "task": "t", "question": f"What is {n}?", "correct": answer, "p": [0.5, answer], "note": EVIL}
        for n, answer in enumerate(right)
    ]
    run.save_lines("samples.jsonl", [*records, {"id": f"t/{folder.name}", "correct": True}], Artifact("samples", "All"))
    cells = [{**ROWS[0], "x": x, "value": value} for x, value in zip(("attn", "mlp"), values, strict=False)]
    content = {"drawer": "a", "title": "Map", "data": {}, "chart": {"rows": cells, "titles": {"value": "RR"}}}
    run.save_json("map.json", content, Artifact("heat_map", "Map"))
    return run


def compared(one: Run, other: Run, paired=paired) -> Reader:
    return read(write_page(one.folder, other=other.folder, paired=paired))


def test_two_runs(tmp_path):
    """Side by side, after the options that differ, the paired difference of their scores, and that of their maps."""
    one = written(tmp_path / "one", {"seed": 0, "model": "m", "deep": {"x": 1}}, [True, False, True, False, False])
    other = written(
        tmp_path / "other", {"seed": 0, "model": EVIL, "deep": {"x": 2}}, [True, True, True, True, True], values=(0.5,)
    )
    page = compared(one, other)
    tables = {tuple(script["columns"]): script["rows"] for script in page.scripts if "columns" in script}
    options = {row["what"]: (row["A"], row["B"]) for row in tables["what", "A", "B"]}
    assert options == {"model": ("m", EVIL), "deep.x": ("1", "2")}
    row, replicates = next(rows for columns, rows in tables.items() if "B - A" in columns)
    want = paired([1, 1, 1, 1, 1], [1, 0, 1, 0, 0], clusters=[0, 1, 2, 3, 3])
    assert row == {
        "file": "samples.jsonl", "number": "correct", "samples": 5, "A": 0.4, "B": 1.0, "B - A": 0.6,
        "low": want["low"], "high": want["high"], "clusters": "pictures",
    }  # fmt: skip  # each run has a sixth sample, which the other has not
    assert (replicates["number"], replicates["A"], replicates["B"]) == ("p", 0.45, 0.75)
    alone = paired([1, 1, 1, 1, 1], [1, 0, 1, 0, 0])
    assert want["low"] != alone["low"]  # two samples show one picture
    (change,) = [spec for spec in page.scripts if "B - A" in str(spec.get("description"))]
    (cells,) = values(change)
    assert cells == [{"panel": "p", "x": "attn", "y": 0, "cell": "L0-attn", "value": 0.25, "A": 0.25, "B": 0.5}]
    runs = [attributes["data-run"] for _, attributes in page.tags if "data-run" in attributes]
    assert runs[:2] == ["0", "1"] and len(runs) >= 6
    assert len([script for script in page.scripts if "t/1" in script]) == 2  # the pictures of each
    assert not [attributes for tag, attributes in page.tags if tag == "img" and attributes["src"] == "x"]
    assert (one.folder / "compared.html").exists() and not unlisted(one.folder)


def test_samples_of_one_name_that_are_not_the_same(tmp_path):
    """The control: with another picture or question nothing is compared."""
    one = written(tmp_path / "one", {}, [True] * 5)
    assert "no number that both have" in " ".join(
        compared(one, written(tmp_path / "b", {}, [False] * 5, colour=9)).texts
    )
    asked = written(tmp_path / "d", {}, [False] * 5)
    index = (asked.folder / "pictures/index.json").read_text().replace("What is 1", "Who is 1")
    (asked.folder / "pictures/index.json").write_text(index)
    row, _ = next(s["rows"] for s in compared(one, asked).scripts if "B - A" in s.get("columns", ()))
    assert row["samples"] == 4
    third = written(tmp_path / "c", {}, [False] * 5)
    text = (third.folder / "samples.jsonl").read_text()
    (third.folder / "samples.jsonl").write_text(text.replace("What is 1", "Who is 1"))
    row, _ = next(s["rows"] for s in compared(one, third).scripts if "B - A" in s.get("columns", ()))
    assert row["samples"] == 4 and row["B - A"] == -1
    (third.folder / "samples.jsonl").write_text(text + text)  # which of two is meant is not known
    assert "no number that both have" in " ".join(compared(one, third).texts)


def test_one_sample_has_no_interval(tmp_path):
    one, other = (written(tmp_path / name, {}, [name == "one"]) for name in ("one", "other"))
    row, _ = next(s["rows"] for s in compared(one, other).scripts if "B - A" in s.get("columns", ()))
    assert (row["samples"], row["B - A"], row["low"], row["high"]) == (1, -1, None, None)


def test_a_second_run_that_is_damaged(tmp_path, capsys):
    """Its problems are told beside its name; what is no run is refused."""
    run, second = (written(tmp_path / name, {}, [True] * 5) for name in ("first", "second"))
    (second.folder / "samples.jsonl").write_text("{")
    (second.folder / "pictures/index.json").write_text("[3]")
    (second.folder / "config.json").write_text("{")
    for chart in (
        {"rows": [3], "titles": {}},
        {"lines": []},
        {"rows": [{**ROWS[0], "panel": [1]}], "titles": {}},
        {"rows": ROWS, "titles": None},
    ):
        (second.folder / "map.json").write_text(json.dumps({"chart": chart}))
        assert "map.json" in " ".join(compared(run, second).texts)
    texts = " ".join(compared(run, second).texts)
    huge = json.dumps({"id": "t/1", "task": "t", "correct": 10**400}) + "\n"
    (second.folder / "samples.jsonl").write_text(huge)
    assert "no number that both have" in " ".join(compared(second, second).texts)
    (second.folder / "samples.jsonl").write_text("{")
    assert texts.count("pictures/index.json cannot be read") == 1 and "Map" in texts
    with pytest.raises(UserError, match="is no run folder"):
        write_page(run.folder, other=tmp_path)
    command.main(command.Args(run.folder, second.folder))
    assert "compared.html" in capsys.readouterr().out
