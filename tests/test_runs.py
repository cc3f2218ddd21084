"""The append-only records of a run: what is left of them by a session that was cut off, and what the next one adds."""

import json
from pathlib import Path

import pytest

from vlm_jax.errors import UserError
from vlm_jax.runs import Log, Run

#: Rows of three batches, and what is to be known of each of them.
BATCHES = [([0, 2], "first"), ([1, 3, 4], "second"), ([5], "third")]
LINES = [b'{"row": %d, "text": "\xc3\xa9\\n"}\n' % row for rows, _ in BATCHES for row in rows]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def opened(folder: Path) -> Log:
    return Run.open(folder, {"a": 1}).log("deep/records.jsonl")


def work(log: Log, stop: int | None = None) -> list[str]:
    """Does what is missing, at most ``stop`` batches of it, and returns which batches that was."""
    done = []
    for rows, content in log.missing(BATCHES):
        if len(done) == stop:
            break
        log.append([{"row": row, "text": "é\n"} for row in rows])
        done.append(content)
    return done


def test_records_are_appended_and_read_again(folder):
    log = opened(folder)
    assert log.records == [] and not folder.exists()
    assert work(log) == ["first", "second", "third"]
    assert (folder / "deep/records.jsonl").read_bytes() == b"".join(LINES)
    assert (folder / "config.json").is_file()
    assert [record["row"] for record in log.records] == [0, 2, 1, 3, 4, 5]
    again = opened(folder)
    assert again.records == log.records and work(again) == []
    assert (folder / "deep/records.jsonl").read_bytes() == b"".join(LINES)


def test_every_batch_is_on_the_disk_before_the_next(folder):
    log, seen = opened(folder), []
    for rows, _ in log.missing(BATCHES):
        path = folder / "deep/records.jsonl"
        seen.append(len(path.read_bytes().splitlines()) if path.exists() else 0)
        log.append([{"row": row} for row in rows])
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
    assert [record["row"] for record in log.records] == [0, 2, 1, 3, 4, 5]


def test_a_session_that_stops_again(folder):
    assert work(opened(folder), 1) == ["first"]
    assert work(opened(folder), 1) == ["second"]
    assert work(opened(folder)) == ["third"]
    assert (folder / "deep/records.jsonl").read_bytes() == b"".join(LINES)


@pytest.mark.parametrize("behind", [b"", b'{"row": 7', b'{"row": 7}\n{"row'])
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
