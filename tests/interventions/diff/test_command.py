"""`python -m interventions.diff` on dictionaries whose features are made up: what it finds, what it writes."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from kind_cases import one_sentence
from run_folders import check_run_folder

import vlm_jax
from interventions.dictionary import Dictionary
from interventions.diff import __main__ as diff
from interventions.diff.dictionaries import load_dictionaries, save_dictionary
from interventions.diff.options import Args
from interventions.diff.place import Place
from interventions.diff.selection import by_relation, choose, clusters, filtered, halves, large_enough
from vlm_jax import UserError
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.data import load_task
from vlm_jax.prompts import encode

MODEL = "mini-qwen3-vl"
PLACES = [Place("text.resid_post", 2), Place("text.resid_post", 5)]
LATENTS = 48


def random_dictionaries(seed):
    rng = np.random.default_rng(seed)
    found = {}
    for place in PLACES:
        decoder = rng.standard_normal((LATENTS, 128), np.float32)
        decoder /= np.linalg.norm(decoder, axis=-1, keepdims=True)
        bias = np.zeros(LATENTS, np.float32)
        found[place] = Dictionary(decoder.T.copy(), bias, decoder, np.zeros(128, np.float32), architecture="topk", k=6)
    return found


def turned(dictionaries, latents):
    """Other decoder rows for some latents."""
    rng, found = np.random.default_rng(9), {}
    for place, one in dictionaries.items():
        decoder = np.array(one.W_dec)
        decoder[latents] = rng.standard_normal((len(latents), 128))
        found[place] = one.replace(W_dec=decoder)
    return found


def written(folder, dictionaries, model):
    for place, one in dictionaries.items():
        save_dictionary(folder / "dictionaries" / str(place), one, place, model=model, model_name="mini")
    return folder


@pytest.fixture(scope="module")
def model():
    return vlm_jax.load(MODEL)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    """The command's arguments; latents 0 to 23 turned."""
    folder = tmp_path_factory.mktemp("diff")
    base = random_dictionaries(0)
    name = fingerprint(model)
    args = Args(
        model=MODEL,
        base=written(folder / "base", base, "text"),
        adapted=written(folder / "adapted", turned(base, list(range(24))), name),
        data_only=written(folder / "data", turned(base, [0, 1]), "text"),
        limit=48,
        percentile=50.0,
        least_energy=1e-9,
        least_ratio=1.01,
        least_difference=0.0,
        level=0.99,
        neutral_prompts=("Describe the picture.",),
        features=2,
        head_limit=2,
        activation_batch=8,
        out=folder / "run",
    )
    diff.main(args)
    return args


def test_the_run_folder(run, tmp_path, capsys):
    check_run_folder(run.out, tmp_path)
    before = {path: path.read_bytes() for path in run.out.glob("*.*") if path.name != "seconds.json"}
    diff.main(run)  # nothing is left to do
    assert {path: path.read_bytes() for path in before} == before
    assert "change of accuracy" in capsys.readouterr().out


def test_features(run):
    rows = pq.read_table(run.out / "features.parquet").to_pylist()
    assert len(rows) == 2 * LATENTS
    for row in rows:
        assert (row["cosine"] > 0.999) == (row["latent"] >= 24)
        assert row["nearest"] == row["latent"] or row["latent"] < 24
        # Half of the latents have the smallest cosines; of the others none can be adapted.
        assert row["adapted"] <= (row["latent"] < 24 and row["energy"] > 1e-9)
        chosen = row["adapted"] and row["lexical"] and row["spatial.odds_ratio"] >= 1.01 and row["spatial.q"] <= 0.99
        assert row["spatial.chosen"] == (chosen and row["spatial.rate"] >= row["neutral_rate"])
    assert any(row["spatial.chosen"] for row in rows)


def test_survivors_and_the_control(run):
    results = json.loads((run.out / "results.json").read_text())
    counts = results["survivors"]["spatial"]
    assert list(counts) == ["all", "adapted", "odds_ratio", "difference", "q", "lexical"]
    assert list(counts.values()) == sorted(counts.values(), reverse=True) and counts["all"] == 2 * LATENTS
    control = results["data_only"]["spatial"]
    # Of the control only two latents turned; within the limits of the real adaptation no others pass.
    assert control["all"] == counts["all"] and control["adapted"] <= 4 < counts["adapted"]


def test_ablations_are_of_the_other_half(run):
    rows = pq.read_table(run.out / "ablations.parquet").to_pylist()
    measuring, neutral = (halves(load_task(task, split="test", limit=48))[1] for task in ("mini-vsr", "mini-vqa"))
    for row in rows:
        target = sum(example.subtask == row["relation"] for example in measuring)
        wanted = {"target": target, "others": len(measuring) - target, "neutral": len(neutral)}
        assert row["samples"] == wanted[row["questions"]]
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert (row["p_holm"] is not None) == (row["questions"] == "target")
    assert {row["selection"] for row in rows} >= {"full", "random", "energy"}


def test_heads(run):
    rows = pq.read_table(run.out / "heads.parquet").to_pylist()
    agreement = json.loads((run.out / "results.json").read_text())["agreement"]
    assert len(rows) == sum(4 * (one["layer"] + 1) for one in agreement)
    assert {"signed", "absolute", "exact", "head", "head_layer", "latent", "relation"} <= rows[0].keys()
    assert all(-1 <= one["rank"] <= 1 and 0 <= one["first_five"] <= 1 for one in agreement)


def test_samples_in_which_features_are_active(run, model):
    """Each feature's activation in every token is that of its dictionary; another feature's is not (the control)."""
    index = json.loads((run.out / "token_maps/index.json").read_text())
    rows = pq.read_table(run.out / "ablations.parquet").to_pylist()
    full = [row for row in rows if row["selection"] == "full"]
    places = [Place(row["site"], row["layer"], row["seed"]) for row in full]
    names = {f"{r['relation']}: latent {r['latent']} of {place}" for r, place in zip(full, places, strict=True)}
    assert names == set(index["series"])
    processor = vlm_jax.load(MODEL)[1]
    examples = {e.id: e for e in load_task(run.task, split="test", limit=run.limit)}
    with np.load(run.out / "token_maps/arrays.npz") as arrays:
        for sample in index["samples"][:2]:
            batch = encode([examples[sample["id"]]], processor, model.config, with_answer=False)
            x = model(batch.inputs, taps=("text.resid_post",)).taps["text.resid_post"][:, 0, : len(sample["tokens"])]
            shown, others = [], []
            for name in index["series"]:
                latent, place = int(name.split()[-3]), name.split()[-1]
                one = load_dictionaries(run.adapted)[next(p for p in PLACES if str(p) == place)].dictionary
                codes = np.asarray(one.codes(x[int(place.split(".")[2])]))
                shown.append(codes[:, latent])
                others.append(codes[:, latent - 1])
            values = arrays[sample["array"]]
            assert values.shape == (1, len(index["series"]), len(sample["tokens"])) and values.max() > 0
            np.testing.assert_allclose(values[0], shown, rtol=2e-3, atol=2e-3)
            assert np.abs(values[0].astype(float) - others).max() > 0.1


def test_halves_keep_twins_together():
    """And are alike: every relation has about as many questions in both."""
    examples = load_task("mini-vsr", split="test", limit=120)
    first, second = halves(examples)
    assert len(first) + len(second) == 120 and not {e.id for e in first} & {e.id for e in second}
    for half in (first, second):
        assert all(a.question == b.question for a, b in zip(half[::2], half[1::2], strict=True))
    of = [by_relation(half) for half in (first, second)]
    assert all(abs(len(of[0][name]) - len(of[1][name])) <= 2 for name in of[0])


def test_a_picture_is_in_one_half_and_one_cluster():
    """Public data ask several things about a picture, and not one after the other."""
    examples = [
        dataclasses.replace(e, image_id=f"picture {i % 5}", subtask=("left of", "above")[i % 2])
        for i, e in enumerate(load_task("mini-vsr", split="test", limit=20))
    ]
    first, second = ({e.image_id for e in half} for half in halves(examples))
    assert first and second and not first & second
    assert clusters(examples) == [i % 5 for i in range(20)]
    assert len(set(clusters(load_task("mini-vsr", split="test", limit=20)))) == 10


def test_relations_with_too_few_questions_are_left_out(capsys):
    examples = load_task("mini-vsr", split="test", limit=60)
    rare = next(e for e in examples if e.subtask == "above")
    rest = [e for e in examples if e.subtask != "above"]
    kept = large_enough([rare, *rest])
    assert "above" not in {e.subtask for e in kept} and "left out: above" in capsys.readouterr().out
    with pytest.raises(UserError, match="no relation has questions in both halves"):
        large_enough([rare])


def test_nulls_are_as_many_and_others(run, model):
    """Random features are active ones; those that fail the lexical filter pass the others."""
    del model
    rows = pq.read_table(run.out / "ablations.parquet").to_pylist()
    features = {(r["relation"], r["selection"], r["layer"], r["latent"]) for r in rows}
    for relation in by_relation(load_task("mini-vsr", split="test", limit=48)):
        of = {s: {f[2:] for f in features if f[:2] == (relation, s)} for s in ("full", "energy", "random")}
        assert len(of["random"]) == len(of["energy"]) == 2 and len(of["full"]) <= 2


BAD = {
    "base": ({"base": None}, "--base is missing"),
    "energy": ({"energy": "ratio"}, "--energy ratio compares with the text model"),
    "prompts": ({"neutral_prompts": ()}, "--neutral-prompts is empty"),
    "group": ({"tokens": "words"}, "unknown token group 'words'"),
    "relations": ({"task": "mini-docvqa"}, "ablations need questions with yes or no"),
    "part": ({"tokens": "first4:question"}, "is a part of a group"),
    "folder": ({"adapted": "nowhere"}, "holds no dictionaries"),
    "model": ({"model": "mini-llava"}, "was trained on another model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(run, tmp_path, name, capsys):
    from pathlib import Path

    changes, words = BAD[name]
    changes = {key: Path(value) if key == "adapted" else value for key, value in changes.items()}
    with pytest.raises(SystemExit):
        diff.main(dataclasses.replace(run, out=tmp_path / "bad", **changes))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and one_sentence(error.removeprefix("error: ").replace(".", " ").strip())
    assert not (tmp_path / "bad").exists() or not list((tmp_path / "bad").glob("*.parquet"))


def test_a_control_that_is_none(run, tmp_path, capsys):
    """The adapted dictionaries themselves as the control; and dictionaries of a site beside the residual stream."""
    with pytest.raises(SystemExit):
        diff.main(dataclasses.replace(run, data_only=run.adapted, out=tmp_path / "bad"))
    assert "--data-only was trained on text.resid_post.2 of this very model" in capsys.readouterr().err
    other = {Place("text.self_attn.q_proj", 2): random_dictionaries(0)[PLACES[0]]}
    folders = {name: written(tmp_path / name, other, name) for name in ("base", "adapted")}
    with pytest.raises(SystemExit):
        diff.main(dataclasses.replace(run, **folders, data_only=None, out=tmp_path / "bad"))
    assert "is not of the residual stream" in capsys.readouterr().err


def test_a_folder_with_the_name_of_another_place(tmp_path):
    base = written(tmp_path / "base", random_dictionaries(0), "text")
    (base / "dictionaries/text.resid_post.5").rename(base / "dictionaries/text.resid_post.6")
    with pytest.raises(UserError, match=r"holds the dictionary of text\.resid_post\.5"):
        load_dictionaries(base)


def test_dictionaries_of_other_layers(run, tmp_path, capsys):
    other = {PLACES[0]: random_dictionaries(0)[PLACES[0]]}
    base = written(tmp_path / "base", other, "text")
    with pytest.raises(SystemExit):
        diff.main(dataclasses.replace(run, base=base, out=tmp_path / "bad"))
    assert "other sites, layers or seeds" in capsys.readouterr().err


def test_examples_without_relations():
    with pytest.raises(UserError, match="no subtask"):
        by_relation([dataclasses.replace(example, subtask=None) for example in load_task("mini-vsr", limit=1)])


def test_filters_and_choice_from_numbers():
    """The feature that passes everything is chosen; with a stricter filter it is not."""
    from interventions.diff.features import Rotation
    from interventions.diff.quality import Sums
    from interventions.diff.selection import Measured

    def sums(active, count):
        active = np.asarray(active, float)
        return Sums(np.float64(count), np.zeros(2), np.float64(1), np.float64(0), active, active)

    cosine = np.array([0.1, 0.1, 0.9, 0.1])
    rotation = Rotation(cosine, np.arange(4), cosine)
    one = Measured(
        rotation,
        {"left of": sums([50, 50, 50, 0], 100), "above": sums([1, 1, 1, 1], 100)},
        sums([1, 1, 1, 50], 100),
        None,
        np.array([1.0, 0.0, 1.0, 1.0]),
    )
    options = dataclasses.replace(Args(), percentile=80.0, least_energy=1e-3)
    passed = filtered({PLACES[0]: one}, options)
    assert np.flatnonzero(passed[PLACES[0]].chosen("left of")).tolist() == [0]
    assert passed[PLACES[0]].survivors("left of") == {
        "all": 4,
        "adapted": 3,
        "odds_ratio": 2,
        "difference": 2,
        "q": 2,
        "lexical": 1,
    }
    features = choose({PLACES[0]: one}, passed, options, 2, 0)
    of = [
        (f.selection, f.latent) for f in features if f.relation == "left of" and f.selection in ("full", "no lexical")
    ]
    assert of == [("full", 0), ("no lexical", 1)]
    hardly = {PLACES[0]: one._replace(rotation=Rotation(cosine + 0.85, np.arange(4), cosine))}
    control = filtered(hardly, options, limits_of={PLACES[0]: one})
    assert not control[PLACES[0]].adapted.any() and passed[PLACES[0]].adapted.any()
    strict = filtered({PLACES[0]: one}, dataclasses.replace(options, least_difference=0.6))
    assert not strict[PLACES[0]].chosen("left of").any()
