"""Two runs of one command on two states of a model: paired changes, against SciPy's bootstrap on the same files."""

import importlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
from run_folders import check_run_folder

from interventions import compare
from interventions.kinds.groups import GROUPS
from interventions.statistics import holm
from vlm_jax.errors import UserError

command = importlib.import_module("interventions.compare.__main__")  # the attribute of that name is the function
CELLS = ["L0-attn", "L0-mlp", "L1-attn", "L1-mlp"]
OPTIONS = {"task": "t", "split": "trace", "min_te": 0.01, "eps": 1e-8, "statistic": "mean_of_ratios", "seed": 0}


def write(folder, name, *, lines=None, value=None, arrays=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if lines is not None:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif value is not None:
        path.write_text(json.dumps(value))
    else:
        np.savez(path, **arrays)


def begun(folder, of, options=OPTIONS, data="samples", prompt_text="P0", **changes):
    write(folder, "config.json", value={"command": of, "model": "mini", "adapter": [], **options, **changes})
    write(folder, "manifest.json", value={"data": data, "prompt": prompt_text, "model": "fingerprint"})
    return folder


def numbers(seed, count=30):
    """p_clean, TE ``(N, 1)`` and IE ``(N, 1, C)``."""
    rng = np.random.default_rng(seed)
    clean, te = rng.uniform(0.5, 0.9, count), rng.uniform(0.1, 0.5, (count, 1))
    return clean, te, te[..., None] * rng.uniform(0, 1, (count, 1, len(CELLS)))


def traced(folder, clean, te, ie, ids=None, **changes):
    begun(folder, "interventions.trace", **changes)
    lines = [
        {
            "id": str(row) if ids is None else ids[row],
            "correct": bool(clean[row] > 0.7),
            "p_clean": clean[row],
            "p_corrupt": (clean[row] - te[row]).tolist(),
            "te": te[row].tolist(),
            "ie": {cell: ie[row, :, number].tolist() for number, cell in enumerate(CELLS)},
        }
        for row in range(len(clean))
    ]
    write(folder, "samples.jsonl", lines=lines)
    write(folder, "summary.json", value={"task": "t", "rr": dict.fromkeys(CELLS, 0.0)})
    return folder


@pytest.fixture
def traces(tmp_path):
    clean, te, ie = numbers(0)
    moved = ie.copy()
    moved[..., 2] += 0.2 * te
    return traced(tmp_path / "a", clean, te, ie), traced(tmp_path / "b", clean, te, moved, adapter=["lora"])


def test_restoration_rates(traces):
    """SciPy's paired bootstrap of the same difference gives the same interval; only the moved cell changed."""
    found = compare(*traces)
    rates = {row["of"]: row for row in found.changes if row["measure"] == "RR"}
    (clean, te, ie), n = numbers(0), 30
    moved = ie[..., 2] + 0.2 * te
    change = (moved - ie[..., 2])[:, 0] / te[:, 0]

    def mean(rows):
        return change[rows].mean()

    rng = np.random.default_rng(0)
    draws = np.array([mean(rng.integers(0, n, n)) for _ in range(10_000)])
    row = rates["L1-attn"]
    assert list(rates) == CELLS and row["layer"] == 1 and row["samples"] == n
    assert row["change"] == pytest.approx(0.2, abs=1e-6)
    np.testing.assert_allclose([row["low"], row["high"]], np.percentile(draws, [2.5, 97.5]), atol=1e-6)
    assert row["p_holm"] < 0.01
    assert all(rates[cell]["change"] == 0 and rates[cell]["p_holm"] == 1 for cell in CELLS if cell != "L1-attn")
    assert row["first"] == pytest.approx((ie[:, 0, 2] / te[:, 0]).mean(), abs=1e-6)
    other = {row["measure"]: row for row in found.changes if row["of"] == "all samples"}
    assert other["p_clean"]["first"] == pytest.approx(clean.mean()) and other["TE"]["change"] == 0
    assert found.names == ("mini", "mini + lora")


def test_samples_are_paired_by_their_ids(traces, tmp_path):
    """In another order and with one sample more, the changes are the same; paired by row they would not be."""
    clean, te, ie = numbers(0)
    moved = ie.copy()
    moved[..., 2] += 0.2 * te
    order = np.random.default_rng(1).permutation(30)
    parts = [np.concatenate([part[order], part[:1]]) for part in (clean, te, moved)]
    shuffled = traced(tmp_path / "c", *parts, ids=[*map(str, order), "more"])
    found, want = compare(traces[0], shuffled), compare(*traces)
    assert found.left_out == 1 and found.samples == 30
    for one, other in zip(found.changes, want.changes, strict=True):
        assert one["change"] == pytest.approx(other["change"], abs=1e-9)
        assert one["low"] == pytest.approx(other["low"], abs=1e-9)


def test_too_few_samples_have_no_interval(tmp_path):
    clean, te, ie = numbers(0, 4)
    folders = traced(tmp_path / "a", clean, te, ie), traced(tmp_path / "b", clean, te, 0.5 * ie)
    found = compare(*folders)
    row = found.changes[0]
    assert row["measure"] == "RR" and row["change"] < 0
    assert row["low"] is None and row["p"] is None and "not enough samples" in repr(found)


def test_cells_that_samples_lack(tmp_path):
    """A cell that few samples have has no interval and its own number of samples; one that none has is left out, and
    does not count in Holm's adjustment."""
    clean, te, ie = numbers(0)
    moved = ie + 0.2 * te[..., None]
    for part in (ie, moved):
        part[2:, :, 1], part[:, :, 3] = np.nan, np.nan
    folders = traced(tmp_path / "a", clean, te, ie), traced(tmp_path / "b", clean, te, moved)
    rates = {row["of"]: row for row in compare(*folders).changes if row["measure"] == "RR"}
    assert list(rates) == ["L0-attn", "L0-mlp", "L1-attn"]
    assert [row["samples"] for row in rates.values()] == [30, 2, 30]
    assert rates["L0-mlp"]["low"] is rates["L0-mlp"]["p"] is None and rates["L0-mlp"]["change"] == pytest.approx(0.2)
    assert rates["L0-attn"]["p_holm"] == pytest.approx(2 * rates["L0-attn"]["p"])


def test_many_cells_can_differ(tmp_path, monkeypatch):
    """With 80 cells a clear change is still significant after Holm's adjustment."""
    cells = [f"L{layer}-{kind}" for layer in range(40) for kind in ("attn", "mlp")]
    monkeypatch.setitem(globals(), "CELLS", cells)
    rng = np.random.default_rng(0)
    clean, te = rng.uniform(0.5, 0.9, 20), rng.uniform(0.1, 0.5, (20, 1))
    ie = te[..., None] * rng.uniform(0, 1, (20, 1, 80))
    moved = ie.copy()
    moved[..., 7] += 0.5 * te
    rows = compare(traced(tmp_path / "a", clean, te, ie), traced(tmp_path / "b", clean, te, moved)).changes
    assert [row["of"] for row in rows if row["measure"] == "RR" and row["p_holm"] < 0.05] == ["L3-mlp"]


def scored(folder, scores, clusters, **changes):
    begun(folder, "eval.accuracy", **changes)
    lines = [
        {"id": str(row), "task": "ab"[row % 2], "score": score, "cluster": int(cluster)}
        for row, (score, cluster) in enumerate(zip(scores, clusters, strict=True))
    ]
    write(folder, "samples.jsonl", lines=lines)
    return folder


def test_accuracies(tmp_path):
    """By task and for all; pictures that several questions share are resampled together."""
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 2, (2, 60)).astype(float)
    folders = {}
    for name, clusters in (("alone", np.arange(60)), ("shared", np.arange(60) // 6)):
        folders[name] = [scored(tmp_path / name / side, s, clusters) for side, s in (("a", one), ("b", other))]
    rows = {name: compare(*pair).changes for name, pair in folders.items()}
    assert [row["task"] for row in rows["alone"]] == ["a", "b", "all"]
    whole, grouped = rows["alone"][-1], rows["shared"][-1]
    assert whole["change"] == grouped["change"] == pytest.approx((other - one).mean())
    mean = scipy.stats.bootstrap(
        ((other - one),), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    np.testing.assert_allclose([whole["low"], whole["high"]], mean, atol=1e-6)
    assert (grouped["low"], grouped["high"]) != (whole["low"], whole["high"])


def flowing(folder, seed, shift=0.0):
    begun(folder, "interventions.flow")
    rng = np.random.default_rng(seed)
    count, layers, heads = 12, 3, 2
    mass = rng.uniform(0, 1, (count, layers, heads, len(GROUPS)))
    mass[:, 1, :, GROUPS.index("image")] += shift
    tokens = np.full((count, len(GROUPS)), 2)
    write(folder, "t/attention.npz", arrays={"mass": mass, "tokens": tokens, "received": np.ones((count, layers, 4))})
    lines = [
        {"id": str(row), "edge": edge, "layers": None, "mode": mode, "correct": bool(rng.integers(2))}
        for edge, mode in ((None, None), ("text:image", "post_softmax"))
        for row in range(count)
    ]
    write(folder, "t/samples.jsonl", lines=lines)
    base = np.full(count, 0.5)
    window = base[:, None, None] - rng.uniform(0, 0.1, (count, 1, layers))
    write(folder, "t/windows.npz", arrays={"base": base, "window": window, "whole": window.mean(2)})
    write(folder, "results.json", value={"t": {"windows": {"change": {"text:image": {}}}}})
    return folder


def test_attention(tmp_path):
    """The share of the image in one layer; other layers keep theirs."""
    found = compare(flowing(tmp_path / "a", 0), flowing(tmp_path / "b", 0, shift=0.8))
    shares = [row for row in found.changes if row["measure"] == "attention to image"]
    assert [row["layer"] for row in shares] == [0, 1, 2]
    text = 2 * 4  # tokens of the groups after, question, last and answer
    assert shares[1]["change"] == pytest.approx(0.8 / text) and shares[1]["p_holm"] < 0.01
    assert shares[0]["change"] == shares[2]["change"] == 0
    measures = list(dict.fromkeys(row["measure"] for row in found.changes))
    assert measures[-4:] == ["ratio", "accuracy", "p(gold)", "change of p(gold) without text:image"]
    accuracies = [row for row in found.changes if row["measure"] == "accuracy"]
    assert [row["of"] for row in accuracies] == ["nothing cut", "without text:image (post_softmax)"]
    assert [row["p_holm"] for row in accuracies] == holm([row["p"] for row in accuracies]).tolist()


@pytest.mark.parametrize("kind", ["trace", "flow", "accuracy"])
def test_command(tmp_path, traces, kind, capsys):
    rng = np.random.default_rng(0)
    pairs = {
        "trace": lambda: traces,
        "flow": lambda: (flowing(tmp_path / "fa", 0), flowing(tmp_path / "fb", 1)),
        "accuracy": lambda: [
            scored(tmp_path / side, rng.integers(0, 2, 20).astype(float), np.arange(20)) for side in ("sa", "sb")
        ],
    }
    first, second = pairs[kind]()
    command.main(command.Args(first=first, second=second, out=tmp_path / "out"))
    check_run_folder(tmp_path / "out", tmp_path / "scratch")
    rows = pq.read_table(tmp_path / "out" / "changes.parquet").to_pylist()
    assert rows == compare(first, second).changes
    assert f"samples of {json.loads((first / 'config.json').read_text())['command']}" in capsys.readouterr().out


def test_refused(tmp_path, traces):
    clean, te, ie = numbers(0)
    other = {
        "no_such": (tmp_path / "missing", "is not a finished run"),
        "options": (traced(tmp_path / "o", clean, te, ie, noise_scale=3.0), "made with other options"),
        "data": (traced(tmp_path / "d", clean, te, ie, data="others"), "read other samples"),
        "command": (scored(tmp_path / "s", [1.0, 0.0], [0, 1]), "is of interventions.trace and"),
        "ids": (traced(tmp_path / "i", clean, te, ie, ids=[f"x{n}" for n in range(30)]), "have 0 samples"),
        "talo": (begun(tmp_path / "t", "interventions.talo"), None),
        "prompt": (traced(tmp_path / "p", clean, te, ie, prompt_text="other"), "read other samples"),
        "limit": (traced(tmp_path / "l", clean, te, ie, limit=31), "made with other options"),
        "te": (traced(tmp_path / "z", clean, 0 * te, 0 * ie), "no sample has TE"),
    }
    for folder, says in other.values():
        if says is not None:
            with pytest.raises(UserError, match=says):
                compare(traces[0], folder)
    edges = flowing(tmp_path / "ea", 0), flowing(tmp_path / "eb", 1)
    write(edges[1], "results.json", value={"t": {"windows": {"change": {"text:register": {}}}}})
    with pytest.raises(UserError, match="cut other edges in windows"):
        compare(*edges)
    with pytest.raises(UserError, match=r"runs of interventions.talo cannot be compared"):
        compare(other["talo"][0], other["talo"][0])
    (traces[1] / "samples.jsonl").unlink()
    with pytest.raises(UserError, match="was stopped early"):
        compare(*traces)
