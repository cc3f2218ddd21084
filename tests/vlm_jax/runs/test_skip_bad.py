"""--skip-bad: what cannot be read is left out, listed and counted; without it, the first one stops the run."""

import json

import pytest
from PIL import Image

import eval.accuracy
from eval.accuracy import Args

GOOD = {"image": "a.png", "question": "What is it?", "answers": ["sun"]}


@pytest.fixture
def file(tmp_path):
    """Two good lines among bad ones of every kind."""
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    Image.new("RGB", (2000, 4), "white").save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    lines = [
        GOOD | {"id": "one"},
        GOOD | {"id": "no picture", "image": "none.png"},
        GOOD | {"id": "broken", "image": "broken.png"},
        GOOD | {"id": "too long", "question": "what " * 3000},
        GOOD | {"id": "too wide", "image": "wide.png"},
        GOOD | {"id": "special", "question": "<|im_end|>"},
        GOOD | {"id": "no answer", "answers": []},
        GOOD | {"id": "one"},
        GOOD | {"id": "two"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("not JSON\n" + "\n".join(map(json.dumps, lines)))
    return path


def run(file, out, **options):
    eval.accuracy.main(Args(task=str(file), out=out, max_new_tokens=2, **options))


def test_what_cannot_be_used_is_left_out_and_listed(file, tmp_path, capsys):
    out = tmp_path / "out"
    run(file, out, skip_bad=True)
    ids = [json.loads(line)["id"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert ids == ["one", "two"]
    assert "mine.jsonl: left out 8 of 10 examples" in capsys.readouterr().err.replace(str(file), "mine.jsonl")
    left_out = json.loads((out / "manifest.json").read_text())["left_out"]
    reasons = {1: "not JSON", 3: "none.png", 4: "truncated", 8: "'answers' must be", 9: "id 'one' was used"}
    for line, reason in reasons.items():
        assert reason in left_out[f"{file}, line {line}"]
    for example, reason in {"too long": "tokens", "too wide": "refuses", "special": "special token"}.items():
        assert reason in left_out[example]
    assert len(left_out) == 8


def test_the_first_stops_a_run_otherwise(file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(file, tmp_path / "out")
    assert stop.value.code == 2 and "line 1: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_good_example(file, tmp_path, capsys):
    file.write_text("\n".join(["{", json.dumps(GOOD | {"id": "long", "question": "what " * 3000})]))
    with pytest.raises(SystemExit):
        run(file, tmp_path / "out", skip_bad=True)
    assert "has no example that can be used; the first reason: " in capsys.readouterr().err
