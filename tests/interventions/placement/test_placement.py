"""Placements: what each chooses, by hand and by enumeration; what is refused; and which model a trace is of."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

import vlm_jax
from interventions.modules import module_names
from interventions.placement import rules
from interventions.placement.rules import (
    PLACEMENTS,
    Scoring,
    choose_modules,
    closest_subset,
    find_placement,
    random_k,
    read_trace,
    top,
)
from interventions.placement.scores import SCORES
from vlm_jax.checkpoints.fingerprint import fingerprint
from vlm_jax.errors import UserError

DEPTH = 4
#: LoRA parameters per rank of Qwen3-VL-4B's and Gemma-3-4B's modules: notes of P0's counts (1.311 M and 2.359 M, 1.049
#: M and 2.458 M at r = 64).
QWEN, GEMMA = (20_480, 36_864), (16_384, 38_400)


def table(values):
    """``(L, 2)`` from a dict of module names; 0 elsewhere."""
    score = np.zeros((DEPTH, 2))
    for name, value in values.items():
        score[int(name[1]), int(name.endswith("mlp"))] = value
    return score


RR = {
    "knowledge": table({"L0-attn": 0.8, "L2-mlp": 0.6, "L3-mlp": 0.5, "L1-attn": -0.3}),
    "perception": table({"L0-attn": 0.4, "L3-attn": 0.2, "L2-mlp": 0.1}),
}
OTHER = {"knowledge": table({"L1-mlp": 3, "L3-attn": 2, "L0-mlp": 1}), "perception": table({"L2-attn": 1})}
SCORED = ("gradient_norm", "fisher", "attribution", "page", "lora_drop", "talo")


def scoring(sizes=(5, 9), **changed):
    scores = {"rr": RR} | dict.fromkeys(SCORED, OTHER)
    return dataclasses.replace(Scoring(DEPTH, np.tile(sizes, (DEPTH, 1)), scores), **changed)


# What is chosen


@pytest.mark.parametrize(
    "name, family, k, chosen",
    [
        ("all", "knowledge", 1, module_names(DEPTH)),
        ("shared", "knowledge", 2, ["L0-attn", "L2-mlp"]),
        ("shared", "perception", 2, ["L0-attn", "L3-attn"]),
        # Normalised: knowledge 1, .75, .625, -.375; perception 1, .5, .25. L0-attn is no difference at all.
        ("task_diff", "knowledge", 3, ["L3-mlp", "L2-mlp", "L0-attn"]),
        ("task_diff", "perception", 2, ["L3-attn", "L1-attn"]),
        *((name, "knowledge", 2, ["L1-mlp", "L3-attn"]) for name in SCORED),
        *((name, "perception", 3, ["L2-attn", "L0-attn", "L0-mlp"]) for name in SCORED),  # ties: the lower
        ("first", "knowledge", 3, ["L0-attn", "L0-mlp", "L1-attn"]),
        ("middle", "knowledge", 2, ["L1-mlp", "L2-attn"]),
        ("middle", "knowledge", 3, ["L1-attn", "L1-mlp", "L2-attn"]),
        ("last", "knowledge", 3, ["L2-mlp", "L3-attn", "L3-mlp"]),
        ("random", "knowledge", 2, random_k(DEPTH, 2, 0)),
    ],
)
def test_what_is_chosen(name, family, k, chosen):
    assert choose_modules(name, scoring(), family, k) == chosen


def test_every_placement_is_tested_and_shown():
    tested = {*SCORED, "all", "random", "random_matched", "random_stratified", "shared", "task_diff"}
    assert set(PLACEMENTS) == tested | {"first", "middle", "last"}
    page = (Path(__file__).parents[3] / "docs" / "placement.md").read_text()
    assert rules.placement_table() in page, (
        "docs/placement.md does not show the registry: paste rules.placement_table()"
    )


def test_every_score_that_a_placement_needs_is_registered():
    assert {entry.needs for entry in PLACEMENTS.values()} - {None, "rr"} == set(SCORES)


def test_a_placement_registers_itself_once(monkeypatch):
    monkeypatch.setattr(rules, "PLACEMENTS", dict(PLACEMENTS))

    @rules.placement("every_attention", "all attentions", needs="fisher")
    def every_attention(scoring, family, k, seed):
        return [f"L{layer}-attn" for layer in range(scoring.depth)]

    assert choose_modules("every_attention", scoring(), "knowledge", 1) == [f"L{layer}-attn" for layer in range(DEPTH)]
    assert rules.find_placement("random_matched:every_attention").needs == "fisher"
    assert "every_attention" not in PLACEMENTS
    with pytest.raises(AssertionError, match="'every_attention' already"):
        rules.placement("every_attention", "again")(every_attention)


def test_p0_task_diff_is_not_the_plain_difference():
    """Equation 7 divides by each family's highest RR; without it L0-attn would lead."""
    plain = top(RR["knowledge"] - RR["perception"], 3)
    assert plain[0] == "L2-mlp" and "L0-attn" in plain[:3]
    assert choose_modules("task_diff", scoring(), "knowledge", 2) == ["L3-mlp", "L2-mlp"]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_needs_and_seeded_are_what_they_say(name):
    """With just the score that it needs a placement works, and without it not; the seed matters where it says so."""
    entry, full = PLACEMENTS[name], scoring()
    bare = dataclasses.replace(full, scores={key: full.scores[key] for key in {entry.needs} - {None}})
    assert (
        len({tuple(choose_modules(name, bare, "knowledge", 3, seed)) for seed in range(20)}) > 1
        if entry.seeded
        else True
    )
    if not entry.seeded:
        assert choose_modules(name, bare, "knowledge", 3, 0) == choose_modules(name, bare, "knowledge", 3, 1)
    if entry.needs:
        with pytest.raises(UserError, match=entry.needs):
            choose_modules(name, dataclasses.replace(full, scores={}), "knowledge", 3)
    names = choose_modules(name, bare, "knowledge", 8 if name == "all" else 3)
    assert len(set(names)) == len(names) and set(names) <= set(module_names(DEPTH))


# Random placements


def test_random_is_uniform():
    counts = dict.fromkeys(module_names(DEPTH), 0)
    for seed in range(800):
        for name in choose_modules("random", scoring(), "knowledge", 2, seed):
            counts[name] += 1
    assert chisquare(list(counts.values())).pvalue > 1e-3
    assert choose_modules("random", scoring(), "knowledge", 2, 7) == choose_modules(
        "random", scoring(), "perception", 2, 7
    )


@pytest.mark.parametrize("target, kinds", [("task_diff", (1, 2)), ("fisher", (1, 2)), ("first", (2, 1))])
def test_stratified_has_as_many_of_each_kind(target, kinds):
    drawn = {
        tuple(choose_modules(f"random_stratified:{target}", scoring(), "knowledge", 3, seed)) for seed in range(200)
    }
    assert {tuple(sum(n.endswith(m) for n in names) for m in ("attn", "mlp")) for names in drawn} == {kinds}
    assert len(drawn) == 4 * 6  # every one of them comes up


def test_matched_is_uniform_over_the_closest():
    """By enumeration, of 3 attentions of 5 and 3 MLPs of 9; 45 is more than all of them have."""
    sizes = np.tile((5, 9), 3)
    for wanted in (23, 19, 45, 1):
        subsets = [s for s in itertools.product((False, True), repeat=len(sizes)) if any(s)]
        off = np.array([abs(sizes[list(s)].sum() - wanted) for s in subsets])
        closest = {s for s, d in zip(subsets, off, strict=True) if d == off.min()}
        counts = dict.fromkeys(closest, 0)
        rng = np.random.default_rng(0)
        for _ in range(60 * len(closest)):
            counts[tuple(closest_subset(sizes, wanted, rng).tolist())] += 1  # KeyError: one that is not closest
        assert len(closest) == 1 or chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("sizes, depth", [(QWEN, 36), (GEMMA, 34), ((896, 1344), 8), ((640, 1001), 6)])
def test_matched_has_the_parameters_of_its_target(sizes, depth):
    """Exactly: the target is itself one of the subsets."""
    rng = np.random.default_rng(1)
    rr = {family: rng.normal(size=(depth, 2)) for family in ("knowledge", "perception")}
    run = Scoring(depth, np.tile(sizes, (depth, 1)), {"rr": rr})
    off_by_count = []
    for seed in range(30):
        k = 1 + seed % (depth // 2)
        target = run.size(choose_modules("task_diff", run, "perception", k))
        matched = choose_modules("random_matched", run, "perception", k, seed)
        assert run.size(matched) == target, (k, matched)
        off_by_count.append(abs(run.size(choose_modules("random", run, "perception", k, seed)) - target))
    assert max(off_by_count) > 0, "as many modules are not as many parameters"


def test_matched_comes_near_what_no_subset_has():
    """Any wanted sum up to that of all modules is met to within one module."""
    for sizes in (QWEN, GEMMA, (640, 1001)):
        every, rng = np.tile(sizes, 6), np.random.default_rng(2)
        for wanted in rng.integers(1, every.sum(), 30):
            assert abs(every[closest_subset(every, wanted, rng)].sum() - wanted) <= max(sizes) / 2


def test_sizes_are_those_of_the_paper():
    """P0's shared selections for Qwen3-VL-4B have 22.5 M and 17.3 M parameters, whatever the paper prints."""
    run = Scoring(36, np.tile(QWEN, (36, 1)))
    knowledge = ["L24-attn", *(f"L{i}-mlp" for i in (23, 28, 29, 30, 31, 32, 33, 34, 35))]
    perception = [*(f"L{i}-attn" for i in (0, 19, 24, 29, 32, 34)), *(f"L{i}-mlp" for i in (32, 33, 34, 35))]
    assert 64 * run.size(knowledge) == 22_544_384
    assert 64 * run.size(perception) == 17_301_504
    assert 64 * run.size(module_names(36)) == 132_120_576


# Names, files, refusals


def test_a_file_is_a_placement(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('["L2-attn", "L0-mlp"]')
    assert choose_modules(str(path), scoring(), "knowledge", 1) == ["L2-attn", "L0-mlp"]
    imitated = choose_modules(f"random_stratified:{path}", scoring(), "knowledge", 1, 3)
    assert sorted(name[3:] for name in imitated) == ["attn", "mlp"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("fischer", "did you mean 'fisher'"),
        ("shared:fisher", "unknown placement 'shared:fisher'"),
        ("random_matched:fischer", "did you mean 'fisher'"),
        ("absent.json", "absent.json"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        choose_modules(name, scoring(), "knowledge", 2)
    assert (
        find_placement("random_matched:fisher").needs == "fisher"
        and find_placement("random_matched:first").needs is None
    )


@pytest.mark.parametrize(
    "change, name, family, message",
    [
        ({"scores": {"rr": {"knowledge": RR["knowledge"]}}}, "task_diff", "knowledge", "compares two families"),
        ({"scores": {"rr": {"knowledge": RR["knowledge"]}}}, "task_diff", "perception", "compares two families"),
        ({"scores": {"rr": {**RR, "third": RR["knowledge"]}}}, "task_diff", "knowledge", "two families.*third"),
        ({"scores": {"fisher": {"knowledge": RR["knowledge"]}}}, "fisher", "perception", "known only for knowledge"),
        ({"scores": {"fisher": {"knowledge": np.full((DEPTH, 2), np.nan)}}}, "fisher", "knowledge", "NaN"),
        ({"scores": {"fisher": {"knowledge": np.zeros((3, 2))}}}, "fisher", "knowledge", "4 x 2 modules"),
    ],
)
def test_scores_that_are_missing(change, name, family, message):
    with pytest.raises(UserError, match=message):
        choose_modules(name, scoring(**change), family, 2)


@pytest.mark.parametrize("k", [0, 9])
def test_k_out_of_range(k):
    for name in PLACEMENTS:
        with pytest.raises(UserError, match="8 modules"):
            choose_modules(name, scoring(), "knowledge", k)


# Which model?


@pytest.fixture(scope="module")
def model():
    return vlm_jax.load("mini-llava")[0]


def test_fingerprint_is_the_model(model, tmp_path):
    known = fingerprint(model)
    assert len(known) == 16
    vlm_jax.save(model, tmp_path)
    assert fingerprint(vlm_jax.load(tmp_path)[0]) == known
    # Another precision is another model only where it rounds.
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    assert fingerprint(rounded) != known
    assert fingerprint(rounded) == fingerprint(jax.tree.map(lambda a: a.astype(jnp.float32), rounded))


@pytest.mark.parametrize(
    "edit",
    [
        lambda a: a.at[2, 3, 5].multiply(1 + 2e-7),  # a last bit
        lambda a: a.at[0].set(a[1]).at[1].set(a[0]),  # layers change places: sums and norms stay
        lambda a: a[:, ::-1],
        lambda a: a.at[0, 1, 2].set(a[0, 2, 1]).at[0, 2, 1].set(a[0, 1, 2]),
    ],
    ids=["one bit", "two layers", "rows", "two weights"],
)
def test_fingerprint_notices(model, edit):
    def edited(path, leaf):
        return (
            edit(leaf) if "down_proj" in jax.tree_util.keystr(path) and "text" in jax.tree_util.keystr(path) else leaf
        )

    assert fingerprint(jax.tree_util.tree_map_with_path(edited, model)) != fingerprint(model)


def test_a_trace_of_another_model_is_refused(tmp_path):
    rr_mean = dict(zip(module_names(DEPTH), range(8), strict=True))
    write = tmp_path / "summary.json"
    write.write_text(json.dumps({"rr": rr_mean, "fingerprint": "abc"}))
    assert read_trace(tmp_path, "abc", 4).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match=r"another model.*abc.*abd"):
        read_trace(tmp_path, "abd", 4)
    write.write_text(json.dumps({"rr": rr_mean}))
    with pytest.raises(UserError, match="lacks rr or fingerprint"):
        read_trace(tmp_path, "abc", 4)
    write.write_text(json.dumps({"rr": {"L0-attn": 1, "L0-head3": 2}, "fingerprint": "abc"}))
    with pytest.raises(UserError, match="one RR for each module"):
        read_trace(tmp_path, "abc", 4)
    write.write_text(json.dumps({"rr": rr_mean, "fingerprint": "abc"}))
    with pytest.raises(UserError, match="one RR for each module of 3 layers"):
        read_trace(tmp_path, "abc", 3)
    for rr in (rr_mean | {"L0-attn": float("nan")}, rr_mean | {"L0-attn": "1"}):
        write.write_text(json.dumps({"rr": rr, "fingerprint": "abc"}))
        with pytest.raises(UserError, match="RR that is no finite number"):
            read_trace(tmp_path, "abc", 4)
    write.unlink()
    with pytest.raises(UserError, match=r"summary\.json"):
        read_trace(tmp_path, "abc", 4)
