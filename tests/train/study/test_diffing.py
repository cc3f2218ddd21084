"""P2's study: recall from numbers, and the whole of it in small."""

import dataclasses
import json

import numpy as np
import pytest
from kind_cases import dictionary, one_sentence
from run_folders import check_run_folder
from scipy.stats import rankdata

from train.study import __main__ as command
from train.study.diffing.options import Args
from train.study.diffing.recall import Half, Rows, auroc, best_of, random_dictionary, supervised
from vlm_jax import UserError

RNG = np.random.default_rng(0)


def test_auroc():
    holds = RNG.random(40) < 0.5
    scores = np.round(RNG.standard_normal(40), 1)  # some are equal
    ranks = rankdata(scores)
    want = (ranks[holds].sum() - holds.sum() * (holds.sum() + 1) / 2) / (holds.sum() * (~holds).sum())
    assert auroc(scores, holds) == pytest.approx(want)
    assert auroc(-scores, holds) == pytest.approx(1 - want)


def planted(samples=400, width=12):
    holds = RNG.random(samples) < 0.5
    x = RNG.standard_normal((samples, width)) * 3 + 5
    x[:, 4] += 4.0 * holds
    return Half(x, holds)


def test_supervision_finds_the_planted_direction():
    first, second = planted(), planted()
    direction = supervised(first)
    assert np.abs(direction).argmax() == 4
    assert auroc(second.x @ direction, second.holds) > 0.78
    shuffled = Half(first.x, RNG.permutation(first.holds))
    assert abs(auroc(second.x @ supervised(shuffled), second.holds) - 0.5) < 0.2


def test_the_best_latent_is_chosen_on_the_other_half():
    """By size, whichever sign; a latent that is never active is no candidate."""
    first, second = planted(), planted()
    codes = [np.stack([h.x[:, 0], -h.x[:, 4], np.zeros(len(h.x)), h.x[:, 7]], 1) for h in (first, second)]
    assert best_of(tuple(codes), first, second) == pytest.approx(auroc(second.x[:, 4], second.holds))
    assert best_of(tuple(codes), first, second, [0, 3]) == pytest.approx(0.5, abs=0.12)
    assert best_of(tuple(codes), first, second, [2]) is None and best_of(tuple(codes), first, second, []) is None


def test_means_over_examples():
    one = dictionary(RNG, members=1).member(0)
    x = RNG.standard_normal((2, 9, 64)).astype(np.float32)
    rows = Rows(x, np.array([0, 0, 1, 1, 1, 2, 2, 2, 2], np.int32), 3)
    want = np.stack([x[1][rows.example == i].mean(0) for i in range(3)])
    np.testing.assert_allclose(rows.mean(rows.x[1]), want, atol=1e-6)
    codes = np.asarray(one.codes(x[1]))
    want = np.stack([codes[rows.example == i].mean(0) for i in range(3)])
    np.testing.assert_allclose(rows.mean_codes(one, 1), want, atol=1e-5)


def test_random_dictionaries_have_the_shape():
    one = dictionary(RNG, members=1).member(0)
    mean = RNG.standard_normal(64).astype(np.float32)
    a, b = (random_dictionary(one, mean, seed) for seed in (0, 1))
    assert np.abs(a.W_dec - b.W_dec).max() > 0.1 and a.k == one.k
    x = mean + RNG.standard_normal((50, 64)).astype(np.float32)
    assert (np.asarray(a.codes(x)) > 0).sum(1).max() == one.k


@pytest.mark.parametrize(
    "changes, words", [({"layers": ()}, "--layers is empty"), ({"seeds": (1, 1)}, "--seeds is 1 1")]
)
def test_bad_options(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        Args(**changes).check_study()
    assert one_sentence(caught.value)


@pytest.mark.release
def test_the_study_in_small(tmp_path, capsys):
    args = Args(
        stages=("mini-llava-half",),
        layers=(2, 5),
        latents=64,
        k=4,
        limit=60,
        eval_limit=60,
        epochs=1,
        batch=256,
        features=1,
        head_limit=2,
        random=2,
        least_energy=1e-9,
        least_ratio=1.01,
        least_difference=0.0,
        level=0.99,
        percentile=90.0,
        neutral_prompts=("Describe the picture.",),
        activation_batch=16,
        out=tmp_path / "study",
    )
    command.main(args)
    check_run_folder(args.out, tmp_path)
    summary = json.loads((args.out / "study.json").read_text())
    rows = {row["condition"]: row for row in summary["dictionaries"]}
    assert set(rows) == {
        "base",
        "adapted",
        "data only",
        "from scratch",
        "adapted, image tokens",
        "adapted, text tokens",
        "adapted to mini-llava-half",
    }
    assert "fvu image" not in rows["base"] and "fvu image" in rows["adapted"]
    assert rows["adapted"]["published fvu text"] < rows["adapted"]["fvu text"]
    assert 0.5 < rows["adapted"]["cosine"] < rows["data only"]["cosine"] <= 1
    assert len(summary["recall"]) == 12 and all(len(record["random"]) == 2 for record in summary["recall"])
    assert all(0 <= record["as_good"] <= 1 for record in summary["recall"])
    assert summary["between_seeds"].keys() == {"2", "5"}
    for other in ("second_seed", "from_scratch"):
        assert summary["compared"][other].keys() == summary["compared"]["survivors"].keys()
    crosscoders = summary["crosscoders"]
    assert [record["layer"] for record in crosscoders] == [2, 5]
    assert all(sum(record["latents"].values()) == 64 and len(record["auroc"]) == 6 for record in crosscoders)
    tables = (args.out / "study.md").read_text().strip().split("\n\n")
    assert len(tables) == 5 and all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    before = {p: p.read_bytes() for p in args.out.rglob("*.json") if p.name != "seconds.json"}
    command.main(args)  # nothing is left to do
    assert {p: p.read_bytes() for p in before} == before
    with pytest.raises(SystemExit):
        command.main(dataclasses.replace(args, k=5))
    assert "another run" in capsys.readouterr().err
