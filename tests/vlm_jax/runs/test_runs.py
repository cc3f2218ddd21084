"""Run folders: what a session that was cut off leaves and the next one adds, and what makes it another run."""

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import check_run_folder

import eval.accuracy
import vlm_jax.runs.startup
from vlm_jax.data import load_task
from vlm_jax.data.options import DataOptions
from vlm_jax.errors import UserError
from vlm_jax.runs import folder as run_folder
from vlm_jax.runs import lock
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run, digests
from vlm_jax.runs.log import Log

RESULT, RECORDS = Artifact("metrics", "A result"), Artifact("samples", "Records")
ADAPTER = Artifact("adapter", "An adapter")

#: Rows of three batches, and what is to be known of each of them.
BATCHES = [([0, 2], "first"), ([1, 3, 4], "second"), ([5], "third")]
IDS = ["a", "b", "c", "d", "e", "f"]
LINES = [b'{"id": "%s", "text": "\xc3\xa9\\n"}\n' % IDS[row].encode() for rows, _ in BATCHES for row in rows]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def opened(folder: Path) -> Log:
    return Run.open(folder, {"a": 1}).log("deep/records.jsonl", RECORDS)


def work(log: Log, stop: int | None = None) -> list[str]:
    """Does what is missing, at most ``stop`` batches of it, and returns which batches that was."""
    done = []
    for rows, content in log.missing(BATCHES, IDS):
        if len(done) == stop:
            break
        log.append([{"id": IDS[row], "text": "é\n"} for row in rows])
        done.append(content)
    return done


def test_a_link_to_nothing_and_a_url(folder):
    folder.symlink_to(folder.parent / "gone")
    for place in (folder, folder / "inside"):
        with pytest.raises(UserError, match=r"run is a link to .*gone, which does not exist: make that folder"):
            Run.open(place, {"a": 1})
    with pytest.raises(UserError, match=r"--out gs:/mine/run is a URL, not a folder"):
        Run.open(Path("gs://mine/run"), {"a": 1})
    with pytest.raises(UserError, match=r"the task https://x.org/a.jsonl is a URL: download it"):
        load_task("https://x.org/a.jsonl")
    with pytest.raises(UserError, match=r"--data-root s3:/mine is a URL: download the datasets"):
        load_task("mme", options=DataOptions(data_root=Path("s3://mine")))


def test_of_many_differences_the_first_are_shown(folder):
    opened = Run.open(folder, dict.fromkeys("abcdefg", 1))
    opened.begin()
    del opened
    with pytest.raises(UserError, match=r"a 1 there, 2 here, .*d 1 there, 2 here and 3 more\)"):
        Run.open(folder, dict.fromkeys("abcdefg", 2))


def test_records_are_appended_and_read_again(folder):
    log = opened(folder)
    assert log.records == [] and not folder.exists()
    assert work(log) == ["first", "second", "third"]
    assert (folder / "deep/records.jsonl").read_bytes() == b"".join(LINES)
    assert (folder / "config.json").is_file()
    assert "".join(record["id"] for record in log.records) == "acbdef"
    again = opened(folder)
    assert again.records == log.records and work(again) == []
    assert (folder / "deep/records.jsonl").read_bytes() == b"".join(LINES)


def test_every_batch_is_on_the_disk_before_the_next(folder):
    log, seen = opened(folder), []
    for rows, _ in log.missing(BATCHES, IDS):
        path = folder / "deep/records.jsonl"
        seen.append(len(path.read_bytes().splitlines()) if path.exists() else 0)
        log.append([{"id": IDS[row]} for row in rows])
    assert seen == [0, 2, 5]


#: Whole lines that are left, bytes of the next one -> the batches that are done again.
CUTS = {
    (0, 0): 3,
    (0, 5): 3,
    (1, 0): 3,
    (1, 9): 3,
    (2, 0): 2,
    (2, 9): 2,
    (3, 0): 2,
    (4, 9): 2,
    (5, 0): 1,
    (5, 9): 1,
    (6, 0): 0,
}


@pytest.mark.parametrize("whole, part", CUTS)
def test_whole_batches_are_kept(folder, whole, part):
    """Wherever the file ends, the one that the next session leaves is the same, and is made with the least work."""
    work(opened(folder))
    path = folder / "deep/records.jsonl"
    path.write_bytes(b"".join(LINES)[: len(b"".join(LINES[:whole])) + part])
    log = opened(folder)
    assert work(log) == ["first", "second", "third"][3 - CUTS[whole, part] :]
    assert path.read_bytes() == b"".join(LINES)
    assert "".join(record["id"] for record in log.records) == "acbdef"


def test_a_session_that_stops_again(folder):
    assert work(opened(folder), 1) == ["first"]
    assert work(opened(folder), 1) == ["second"]
    assert work(opened(folder)) == ["third"]
    assert (folder / "deep/records.jsonl").read_bytes() == b"".join(LINES)


@pytest.mark.parametrize("behind", [b"", b'{"id": "f', b'{"id": "f"}\n{"id'])
def test_what_no_batch_accounts_for_is_taken_back(folder, behind):
    """A log that is longer than the batches, by records or by part of one."""
    work(opened(folder))
    path = folder / "deep/records.jsonl"
    path.write_bytes(b"".join(LINES) + behind)
    log = opened(folder)
    assert len(log.records) == 6 + behind.count(b"\n")
    assert work(log) == [] and len(log.records) == 6
    assert path.read_bytes() == b"".join(LINES)


def test_without_a_run_records_are_in_memory():
    log = Log()
    assert work(log, 2) == ["first", "second"]
    assert work(log) == ["third"] and len(log.records) == 6


def test_records_of_another_run_are_refused(folder):
    work(opened(folder), 1)
    with pytest.raises(UserError, match="a 1 there, 2 here"):
        Run.open(folder, {"a": 2})


def test_a_disk_that_is_full(folder):
    log = opened(folder)
    work(log, 1)
    path = folder / "deep/records.jsonl"
    path.unlink()
    path.mkdir()  # what cannot be written to
    with pytest.raises(UserError, match=r"records\.jsonl .*choose another --out"):
        log.append([{"row": 9}])
    assert json.loads((folder / "config.json").read_text())["a"] == 1 and len(log.records) == 2


# Records of other samples


def appended(folder: Path, batches, ids) -> list:
    log, done = opened(folder), []
    for rows, content in log.missing(batches, ids):
        log.append([{"id": ids[row]} for row in rows])
        done.append(content)
    return done


@pytest.mark.parametrize(
    "batches, ids, says",
    [
        (BATCHES, ["a", "b", "new", "d", "e", "f"], r"record 2 is of 'c'"),  # renamed
        (BATCHES[:2], IDS[:5], r"record 6 is of 'f'"),  # one sample less
        ([BATCHES[1], BATCHES[0], BATCHES[2]], IDS, r"record 1 is of 'a'"),  # the same samples in another order
        ([([0, 1], "first"), *BATCHES[1:]], IDS, r"record 2 is of 'c'"),
    ],
)
def test_records_of_other_samples_are_refused(folder, batches, ids, says):
    work(opened(folder))
    before = (folder / "deep/records.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"records\.jsonl holds records of other samples \({says}\): the data changed"):
        appended(folder, batches, ids)
    assert (folder / "deep/records.jsonl").read_bytes() == before == b"".join(LINES)
    assert appended(folder, BATCHES, IDS) == []


def test_records_that_are_not_there_yet_are_not_compared(folder):
    """The control: what is behind the last whole batch may be of any of the samples."""
    work(opened(folder), 1)
    ids = ["a", "b", "c", "x", "y", "z"]
    assert appended(folder, BATCHES, ids) == ["second", "third"]


@pytest.mark.parametrize("log", [Log(), None])
def test_two_samples_of_one_id(folder, log):
    with pytest.raises(UserError, match="two samples have the id 'a': give every sample"):
        next((log or opened(folder)).missing(BATCHES, ["a", "b", "c", "d", "e", "a"]))
    assert not folder.exists()


# What makes it another run


def test_pinned_facts_hold_for_later_sessions(folder):
    run = Run.open(folder, {})
    run.pin("model", "one")
    run.pin("data", {"train": {"rows": (1, 2)}, "test": {"rows": [3]}})
    assert not folder.exists()
    run.save_json("result.json", 1, RESULT)
    run.pin("model of the second stage", "two")
    assert "two" not in (folder / "manifest.json").read_text(), "with the next result"
    run.save_json("result.json", 1, RESULT)
    written = (folder / "manifest.json").read_bytes()
    again = Run.open(folder, {})
    again.pin("model", "one")
    again.pin("data", {"test": {"rows": [3]}, "train": {"rows": [1, 2]}})
    again.save_json("more.json", 1, RESULT)
    assert (folder / "manifest.json").read_bytes() == written
    assert [again.manifest[name] for name in ("model", "model of the second stage")] == ["one", "two"]
    for name, value, says in (
        ("model", "other", "another model (model 'one' there, 'other' here): choose another --out or delete it"),
        ("data", {"train": {"rows": [1, 2]}, "test": {"rows": [4]}}, "data (data.test.rows [3] there, [4] here)"),
        ("data", {"train": {"rows": [1, 2]}}, "data (data.test.rows [3] there, None here)"),
        ("model of the second stage", "one", "(model of the second stage 'two' there, 'one' here)"),
    ):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(UserError) as error:
            Run.open(folder, {}).pin(name, value)
        assert says in str(error.value)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_from_before_facts_were_pinned_takes_them(folder):
    Run.open(folder, {}).save_json("result.json", 1, RESULT)
    run = Run.open(folder, {})
    run.pin("model", "one")
    run.save_json("more.json", 1, RESULT)
    with pytest.raises(UserError, match="'one' there, 'two' here"):
        Run.open(folder, {}).pin("model", "two")


@dataclasses.dataclass(frozen=True)
class Nested:
    file: Path | None = None
    by_name: dict | None = None
    several: tuple = ()
    nested: "Nested | None" = None


@pytest.mark.parametrize(
    "args",
    [
        lambda file: Nested(file),
        lambda file: Nested(by_name={"a": {"b": file}}),
        lambda file: Nested(several=(("x",), ("y", str(file)))),
        lambda file: Nested(nested=Nested(several=({"a": file},))),
    ],
)
def test_an_edited_file_makes_another_run(folder, tmp_path, args):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("one")
    other.write_text("one")
    Run.open(folder, args(file)).save_json("result.json", 1, RESULT)
    other.write_text("two")
    Run.open(folder, args(file))
    file.write_text("two")
    with pytest.raises(UserError, match=rf"files\.{file} '[0-9a-f]+' there, '[0-9a-f]+' here"):
        Run.open(folder, args(file))


def test_nested_options_are_named(folder):
    Run.open(folder, {"training": {"r": 4, "alpha": 8}}).save_json("result.json", 1, RESULT)
    with pytest.raises(UserError, match=r"another run \(training\.r 4 there, 8 here\): choose"):
        Run.open(folder, {"training": {"r": 8, "alpha": 8}})


def test_digests_of_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b").write_bytes(b"")
    assert digests(tmp_path) == {"b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}


def test_accuracy_goes_on_with_the_same_model_and_data_only(folder, tmp_path, monkeypatch, capsys):
    args = eval.accuracy.Args(task="mini-docvqa", limit=2, batch=2, max_new_tokens=2, out=folder)
    eval.accuracy.main(args)
    manifest = json.loads((folder / "manifest.json").read_text())
    check_run_folder(folder, tmp_path / "redrawn")
    assert len(manifest["model"]) == 16 and manifest["data"]["dataset"] == "miniworld"
    eval.accuracy.main(args)
    for module, name, value, says in (
        (vlm_jax.runs.startup, "fingerprint", "0" * 16, "another model"),
        (eval.accuracy, "source", {"dataset": "miniworld", "seed": -1}, "another data"),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(module, name, lambda *args, value=value, **options: value)
            eval.accuracy.main(args)
        assert says in capsys.readouterr().err


# Two processes

#: Opens a folder, writes there, says so, and waits.
PROCESS = """
import sys
from pathlib import Path
from vlm_jax.runs.artifacts import Artifact
from vlm_jax.runs.folder import Run
run = Run.open(Path(sys.argv[1]), {"a": 1})
run.save_json("result.json", 1, Artifact("metrics", "A result"))
(run.folder / ".partial").mkdir()
(run.folder / ".partial" / "growing").touch()
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(lock.fcntl is None, reason="no locks here")
def test_one_process_at_a_time(folder):
    early = Run.open(folder, {"a": 1})
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "written\n"
    try:
        for refused in (lambda: Run.open(folder, {"a": 1}), lambda: early.save_json("result.json", 2, RESULT)):
            with pytest.raises(
                UserError, match=r"another process is at work in .*: let it end or choose another --out"
            ):
                refused()
        assert (folder / ".partial/growing").exists() and json.loads((folder / "result.json").read_text()) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with pytest.raises(UserError, match=r"another process began a run in .* meanwhile"):
        early.save_json("result.json", 2, RESULT)
    assert (folder / "result.json").read_text() == "1\n"
    Run.open(folder, {"a": 1}).save_json("result.json", 3, RESULT)
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "artifacts.json",
        "config.json",
        "manifest.json",
        "result.json",
    }
    assert (folder / ".lock").read_bytes() == b""


def test_runs_of_one_process_share_a_folder(folder):
    """And without locks a folder is as good."""
    one = Run.open(folder, {"a": 1})
    one.save_json("one.json", 1, RESULT)
    other = Run.open(folder, {"a": 1})
    other.save_json("other.json", 1, RESULT)
    one.save_json("one.json", 2, RESULT)
    assert one.lock is other.lock and json.loads((folder / "one.json").read_text()) == 2


def test_where_there_are_no_locks(folder, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    assert work(opened(folder)) == ["first", "second", "third"] and work(opened(folder)) == []


def test_a_process_that_was_killed_before_its_first_result(folder):
    (folder / ".partial").mkdir(parents=True)
    (folder / ".partial" / "config.json").touch()
    (folder / ".lock").touch()
    assert work(opened(folder)) == ["first", "second", "third"]
    assert not (folder / ".partial").exists()


def test_a_folder_of_something_else_keeps_what_is_hidden_there(folder):
    (folder / ".partial").mkdir(parents=True)
    (folder / ".lock").write_text("mine")
    (folder / "thesis.txt").touch()
    with pytest.raises(UserError, match="not a run folder"):
        opened(folder)
    assert (folder / ".partial").is_dir() and (folder / ".lock").read_text() == "mine"


# Files and seconds


def test_a_folder_appears_whole_or_not_at_all(folder):
    def writer(path: Path, fail: bool) -> None:
        path.mkdir()
        (path / "a").write_text("a")
        if fail:
            raise OSError(errno.ENOSPC, "No space left on device")

    run = Run.open(folder, {})
    with pytest.raises(UserError, match=r"cannot write .*deep/adapter \(No space left on device\): free the disk"):
        run.write("deep/adapter", lambda path: writer(path, True), ADAPTER)
    assert not (folder / "deep/adapter").exists() and not (folder / ".partial").exists()
    assert run.write("deep/adapter", lambda path: writer(path, False), ADAPTER) == folder / "deep/adapter"
    assert (folder / "deep/adapter/a").read_text() == "a"
    assert (folder / "config.json").is_file() and not (folder / ".partial").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deep/stage.json", {"text": "é\n", "none": None}),
        ("deep/stage.jsonl", [{"text": "a\u2028b\u0085c"}, {"text": ""}]),  # what some would take for the ends of lines
        ("deep/stage.npz", {"a": np.arange(6.0).reshape(2, 3), "names": np.array(["x", "yy"])}),
    ],
)
def test_a_stage_is_made_once(folder, name, value):
    made = Run.open(folder, {"a": 1}).once(name, lambda: value, RESULT)
    read = Run.open(folder, {"a": 1}).once(name, lambda: pytest.fail("made again"), RESULT)
    for found in (made, read):
        if name.endswith("npz"):
            assert found.keys() == value.keys()
            for part, array in value.items():
                np.testing.assert_array_equal(found[part], array)
        else:
            assert found == value


def test_a_stage_of_no_known_kind_is_not_made(folder):
    with pytest.raises(KeyError, match=r"\.txt"):
        Run.open(folder, {"a": 1}).once("stage.txt", lambda: pytest.fail("made"), RESULT)


def test_seconds_add_up(folder, monkeypatch):
    run = Run.open(folder, {})
    for now, stage in ((10.0, "one"), (12.5, "two"), (14.0, "one")):
        monkeypatch.setattr(run_folder.time, "perf_counter", lambda now=now: now)
        run.timed(stage, 8.0)
        run = Run.open(folder, {})
    assert json.loads((folder / "seconds.json").read_text()) == {"one": 8.0, "two": 4.5}


def test_a_bucket_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gs://bucket/run", "GS://bucket/run"):
        with pytest.raises(UserError, match="is a URL, not a folder"):
            Run.open(Path(name), {})
    with pytest.raises(UserError, match="--out ~nobody/run begins with ~, which only a shell replaces"):
        Run.open(Path("~nobody/run"), {})
    assert not list(tmp_path.iterdir())


def test_results_without_the_manifest_are_refused(folder):
    """The manifest says from which model and data they come."""
    work(opened(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"lacks manifest\.json"):
        Run.open(folder, {"a": 1})
    for path in folder.iterdir():  # a session that was killed between its first two files leaves only these
        if path.name not in ("config.json", lock.LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert work(opened(folder)) == ["first", "second", "third"]


def test_a_manifest_without_its_pins_is_refused(folder):
    run = Run.open(folder, {"a": 1})
    run.pin("model", "abc")
    run.save_json("result.json", 1, RESULT)
    del run
    (folder / "manifest.json").write_text("{}")
    run = Run.open(folder, {"a": 1})
    with pytest.raises(UserError, match=r"manifest\.json does not say with which model its results were made"):
        run.pin("model", "abc", from_the_start=True)


@pytest.mark.parametrize(
    "record", [{"id": "a"}, {"id": "a", "answer": None}, {"id": "a", "answer": ["72"]}, {"answer": "x"}]
)
def test_records_without_their_text_are_named(folder, record):
    log = opened(folder)
    log.append([{"id": "b", "answer": "x"}, record])
    with pytest.raises(
        UserError, match=r"records\.jsonl, line 2 is damaged \(its id or answer is no text\): delete the file"
    ):
        log.texts("answer")


DAMAGE = [b'{"id": []}', b'{"id": 7}', b"{", b'{"id": "a"', b"[1]", b'{"id": "\\ud800"}', b"[" * 100_000, b"\xff"]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_records_are_named(folder, damage):
    """A cut-off last line is done again; a damaged one before it is not taken for a result."""
    work(opened(folder))
    file = folder / "deep/records.jsonl"
    file.write_bytes(damage + b"\n" + file.read_bytes())
    with pytest.raises(UserError, match=r"records\.jsonl, line 1 is damaged: delete the file"):
        opened(folder)


@pytest.mark.parametrize("name, value", [("a.json", {"x": 1}), ("a.jsonl", [{"x": 1}]), ("a.npz", {"x": np.zeros(3)})])
def test_damaged_results_are_named(folder, name, value):
    artifact = {"a.json": RESULT, "a.jsonl": RECORDS, "a.npz": Artifact("arrays", "Arrays")}[name]
    Run.open(folder, {}).once(name, lambda: value, artifact)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] + b"\n")
    with pytest.raises(UserError, match=rf"{name}.* is damaged"):
        Run.open(folder, {}).once(name, lambda: pytest.fail("made again"), artifact)
