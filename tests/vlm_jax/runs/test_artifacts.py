"""What a run folder says of itself: which command made it, and what each of its results is."""

import dataclasses
import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import check_run_folder, unlisted

import eval.artifacts
import interventions.flow.artifacts
import interventions.lens.artifacts
import interventions.talo.artifacts
import interventions.trace.artifacts
import train.artifacts
import train.study.artifacts
from vlm_jax.errors import UserError
from vlm_jax.runs.artifacts import TYPES, Artifact, Schema, is_internal, with_artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run

ROOT = Path(__file__).parents[3]

METRICS = Artifact("metrics", "Scores", Schema("scores", {"accuracy": "mean score"}))
ARRAYS = Artifact("arrays", "Effects", Schema("effects", {"ie": "(N, C)", "names": "(C,)"}))
SAMPLES = Artifact("samples", "Answers", Schema("answers", {"id": "the sample"}))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def listing(folder) -> dict:
    return json.loads((folder / "artifacts.json").read_text())


def write_all(run: Run) -> None:
    """One result of every form."""
    run.save_json("results.json", {"accuracy": 0.5}, METRICS)
    run.save_arrays("deep/effects.npz", {"ie": np.zeros((3, 2), np.float32), "names": np.array(["a", "bb"])}, ARRAYS)
    run.log("samples.jsonl", SAMPLES).append([{"id": "a"}])
    run.write("adapter", lambda path: path.mkdir() or (path / "weights").write_text("w"), Artifact("adapter", "LoRA"))


def test_every_result_is_listed(folder, tmp_path):
    run = Run.open(folder, {})
    write_all(run)
    run.timed("stage", 0.0)
    run.log("predictions.jsonl", None).append([{"id": "a"}])
    check_run_folder(folder, tmp_path)
    assert listing(folder) == {
        "artifacts": [
            {"file": "adapter", "type": "adapter", "title": "LoRA"},
            {
                "file": "deep/effects.npz",
                "type": "arrays",
                "title": "Effects",
                "schema": "effects",
                "layout": {"ie": "float32[3, 2]", "names": "str64[2]"},
            },
            {"file": "results.json", "type": "metrics", "title": "Scores", "schema": "scores"},
            {"file": "samples.jsonl", "type": "samples", "title": "Answers", "schema": "answers"},
        ],
        "schemas": {
            "answers": {"id": "the sample"},
            "effects": {"ie": "(N, C)", "names": "(C,)"},
            "scores": {"accuracy": "mean score"},
        },
    }


def test_the_check_of_a_folder_can_fail(folder, tmp_path):
    """The control: a file that nobody listed, one that is gone, one with a field that its schema lacks."""
    write_all(Run.open(folder, {}))
    (folder / "stray.json").write_text("{}")
    assert unlisted(folder) == ["stray.json"]
    (folder / "stray.json").unlink()
    (folder / "results.json").write_text('{"f1": 1}')
    with pytest.raises(AssertionError, match="f1"):
        check_run_folder(folder, tmp_path)
    (folder / "results.json").unlink()
    with pytest.raises(AssertionError, match=r"results\.json is listed and does not exist"):
        check_run_folder(folder, tmp_path)


def test_a_result_without_an_artifact_is_refused(folder):
    run = Run.open(folder, {})
    for write in (lambda: run.save_json("results.json", 1, None), lambda: run.log("samples.jsonl", None).append([{}])):
        with pytest.raises(ValueError, match="is a result: say with an Artifact what it is"):
            write()
    assert not folder.exists()


def test_what_is_internal():
    internal = (
        "config.json",
        "m/manifest.json",
        "seconds.json",
        "a/predictions.jsonl",
        "training/checkpoints/3/_CHECK",
    )
    assert all(map(is_internal, (*internal, "a/samples.1-of-2.jsonl", "artifacts.json")))
    assert not any(map(is_internal, ("results.json", "samples.jsonl", "model/config.json", "training/metrics.jsonl")))


def test_entries_stay_over_sessions_and_do_not_depend_on_the_order(folder, tmp_path):
    Run.open(folder, {}).save_json("results.json", {"accuracy": 0.5}, METRICS)
    write_all(Run.open(folder, {}))
    write_all(Run.open(tmp_path / "other", {}))
    assert (folder / "artifacts.json").read_bytes() == (tmp_path / "other/artifacts.json").read_bytes()


@pytest.mark.parametrize("name, artifact", [("stage.json", METRICS), ("stage.npz", ARRAYS), ("stage.jsonl", SAMPLES)])
def test_a_session_killed_before_it_listed_a_stage(folder, name, artifact):
    """The next one lists what it finds."""
    value = {"stage.json": {"accuracy": 1}, "stage.npz": {"ie": np.zeros(2)}, "stage.jsonl": [{"id": "a"}]}[name]
    Run.open(folder, {}).once(name, lambda: value, artifact)
    whole = (folder / "artifacts.json").read_bytes()
    (folder / "artifacts.json").unlink()
    Run.open(folder, {}).once(name, lambda: pytest.fail("made again"), artifact)
    assert (folder / "artifacts.json").read_bytes() == whole


def test_one_name_of_a_schema_has_one_meaning():
    one = with_artifact(None, "a.json", METRICS)
    assert with_artifact(one, "a.json", METRICS) == one
    with pytest.raises(ValueError, match=r"b\.json: the schema 'scores' is already listed with other fields"):
        with_artifact(one, "b.json", Artifact("metrics", "Others", Schema("scores", {"f1": "F1"})))


def test_a_newer_version_may_add_fields():
    """So that a run begun by an earlier version can go on."""
    one = with_artifact(None, "a.json", METRICS)
    more = Schema("scores", {**METRICS.schema.fields, "new": "of a newer version"})
    assert with_artifact(one, "a.json", Artifact("metrics", "More", more))["schemas"]["scores"] == more.fields


def test_a_schema_in_other_words_replaces_the_old_one():
    """So that a run begun by an earlier version can go on."""
    fields = dict.fromkeys(METRICS.schema.fields, "in other words")
    listing = with_artifact(
        with_artifact(None, "a.json", METRICS), "b.json", Artifact("metrics", "B", Schema("scores", fields))
    )
    assert listing["schemas"] == {"scores": fields}


def test_types_are_a_closed_set():
    with pytest.raises(ValueError, match="unknown type of artifact 'heatmap': use one of heat_map, "):
        Artifact("heatmap", "A map")


def test_types_and_schemas_are_documented():
    page = (ROOT / "docs/runs.md").read_text()
    modules = (
        eval.artifacts,
        interventions.flow.artifacts,
        interventions.lens.artifacts,
        interventions.talo.artifacts,
        interventions.trace.artifacts,
        train.artifacts,
        train.study.artifacts,
    )
    schemas = [value for module in modules for value in vars(module).values() if isinstance(value, Schema)]
    names = {schema.name for schema in schemas}
    assert len(names) > 15 and len(names) == len({id(schema) for schema in schemas}), "two schemas have one name"
    assert [name for name in names if f"`{name}`" not in page] == []
    assert [name for name, content in TYPES.items() if f"| `{name}` |" not in page] == []


def test_a_folder_is_made_once(folder):
    """A stage whose result is a folder: written whole or not at all, and what is used is what was read back."""

    def write(path, text, fail=False):
        path.mkdir()
        (path / "weights").write_text(text)
        if fail:
            raise KeyboardInterrupt

    def stage(make, **options):
        return Run.open(folder, {}).once(
            "adapter",
            make,
            Artifact("adapter", "LoRA"),
            write=lambda path, text: write(path, text, **options),
            read=lambda path: (path / "weights").read_text() + ", read",
        )

    with pytest.raises(KeyboardInterrupt):
        stage(lambda: "half", fail=True)
    assert not (folder / "adapter").exists() and not (folder / "artifacts.json").exists()
    assert stage(lambda: "made") == "made, read"
    assert stage(lambda: pytest.fail("made again")) == "made, read"
    assert [entry["file"] for entry in listing(folder)["artifacts"]] == ["adapter"]


# Commands

COMMAND = """
import dataclasses
import sys
from pathlib import Path
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.command import command
from vlm_jax.runs.folder import Run

@dataclasses.dataclass(frozen=True)
class Args:
    out: Path

@command
def main(args):
    Run.open(args.out, args).save_json("results.json", 1, Artifact("metrics", "A result"))

if __name__ == "__main__":
    main(Args(Path(sys.argv[1])))
"""


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Two commands: ``room`` (a package with a ``__main__``) and ``room.other``."""
    (tmp_path / "room").mkdir()
    for name in ("__main__", "other"):
        (tmp_path / f"room/{name}.py").write_text(COMMAND)
    (tmp_path / "room/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "room"]:
        del sys.modules[name]


def started(name: str, folder, monkeypatch) -> None:
    """``python -m name folder``, in this process."""
    monkeypatch.setattr(sys, "argv", [name, str(folder)])
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def test_the_command_is_the_same_started_or_imported(room, folder, monkeypatch, capsys):
    for name, module in (("room", "room.__main__"), ("room.other", "room.other")):
        out = folder / name
        started(name, out, monkeypatch)
        assert json.loads((out / "config.json").read_text())["command"] == name
        imported = importlib.import_module(module)
        imported.main(imported.Args(out))  # resumes
    with pytest.raises(SystemExit):
        imported.main(imported.Args(folder / "room"))
    error = capsys.readouterr().err
    assert f"{folder / 'room'} holds a run of room, not of room.other: choose another --out or delete it" in error
    with pytest.raises(UserError, match="holds a run of room, not of a program without a command"):
        Run.open(folder / "room", {})


@dataclasses.dataclass(frozen=True)
class Options:
    """A command without options."""


def test_a_command_that_fails_is_running_no_longer(folder):
    @command
    def failing(args):
        raise UserError("no")

    with pytest.raises(SystemExit):
        failing(Options())
    assert Run.open(folder, {}).config["command"] is None
