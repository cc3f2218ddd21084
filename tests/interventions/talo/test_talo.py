"""TaLo: the table against whole forward passes with zeroed weights, the choice on tables made by hand, the nulls."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from run_folders import check_run_folder

import interventions.talo.__main__ as command
import vlm_jax
from interventions import digest, load_interventions
from interventions.figures.talo import interactions
from interventions.talo.options import Args
from interventions.talo.selection import (
    BASE,
    SelectOptions,
    assess,
    gains,
    in_two,
    outside,
    permuted,
    select,
    similarity,
    stratified,
    together,
    tree,
)
from interventions.talo.tables import layer_cut, subtask, tabulate
from vlm_jax.data import load_task, miniworld
from vlm_jax.data.wordings import FACTS, words
from vlm_jax.errors import UserError
from vlm_jax.prompts import encode

# The table.

#: Cut -> the weights that are zero in transformers' terms.
ZEROED = {
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "uniform": ("self_attn.q_proj",),
    "block": ("self_attn.o_proj", "mlp.down_proj"),
}


@pytest.fixture(scope="module")
def mini():
    model, processor = vlm_jax.load("mini-qwen3-vl")
    return model, processor, load_task("perception", split="eval", limit=12)


def zeroed(model, layer, names):
    def zero(path, leaf):
        place = jax.tree_util.keystr(path)
        return leaf.at[layer].set(0) if place.startswith(".text.layers") and any(n in place for n in names) else leaf

    return jax.tree_util.tree_map_with_path(zero, model)


@jax.jit
def likeliest(model, inputs):
    return model(inputs).logits.argmax(-1)


@pytest.mark.parametrize("cut", ZEROED)
def test_table_is_that_of_zeroed_weights(mini, cut):
    """Sample by sample and layer by layer, by forward passes of the whole model without any intervention."""
    model, processor, examples = mini
    base, correct = tabulate(model, processor, examples, cut, batch=12)
    batch = encode(examples, processor, model.config, step=32)
    gold, ids = batch.spans["answer"] | batch.spans["end"], np.asarray(batch.inputs.input_ids)

    def right(model):
        found = np.asarray(likeliest(model, batch.inputs))
        return ((found[:, :-1] == ids[:, 1:]) | ~gold[:, 1:]).all(1)

    np.testing.assert_array_equal(base, right(model))
    assert 0 < base.sum() < len(base)
    depth = model.config.text.num_hidden_layers
    assert correct.shape == (depth, len(examples))
    for layer in range(depth):
        np.testing.assert_array_equal(correct[layer], right(zeroed(model, layer, ZEROED[cut])), err_msg=f"L{layer}")
    assert (correct != base).any(1).sum() > 2, "hardly any cut changes an answer"


def test_right_means_that_greedy_decoding_writes_the_gold_answer(mini):
    model, processor, examples = mini
    _, correct = tabulate(model, processor, examples, "attn", batch=12)
    prompts = encode(examples, processor, model.config, with_answer=False, step=32).inputs
    tokens = np.asarray(vlm_jax.generate(model, prompts, 8, (layer_cut(8, 2, "attn"),)))
    ended = np.isin(tokens, model.config.eos_token_ids).any(1)
    texts = [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    written = [text == e.answers[0] for text, e in zip(texts, examples, strict=True)]
    np.testing.assert_array_equal(correct[2], ended & written)


def test_cuts():
    assert layer_cut(4, 1, "mlp").sites == {"text.mlp_out"}
    with pytest.raises(UserError, match="attn, mlp, block, uniform"):
        layer_cut(4, 1, "atn")
    with pytest.raises(UserError, match="0 to 3"):
        layer_cut(4, 4, "attn")


@pytest.mark.parametrize("share, about", [(0, "by key"), (1, "by place")])
def test_subtasks(monkeypatch, share, about):
    for task in miniworld.TASKS:
        monkeypatch.setitem(miniworld.HELD_OUT_SHARE, task, share)
    assert {subtask(e) for e in load_task("mini-docvqa", limit=40)} == {f"mini-docvqa: {about}"}
    assert {subtask(e) for e in load_task("perception", limit=60)} == {
        f"{name}: {about}" for name in ("mini-docvqa", "mini-infovqa", "mini-textvqa")
    }
    facts = load_task("mini-okvqa", limit=60)
    assert {subtask(e) for e in facts} == {f"mini-okvqa: {relation}" for relation in FACTS}
    for e in facts:
        wording = FACTS[subtask(e).split(": ")[1]]
        assert any(words(t) <= words(e.question) for t in wording.familiar + wording.held_out)
    assert subtask(dataclasses.replace(facts[0], task="my-file", subtask=None)) == "my-file"


# The choice.

FEW = SelectOptions(shot=5)
COUNT, LAYERS = 60, 4  # a pool of 20
STRATA = np.array(["a", "b", "c"])[np.arange(COUNT) % 3]


def nothing():
    """A table on which no cut changes anything, and all is wrong."""
    return np.zeros(COUNT, bool), np.zeros((LAYERS, COUNT), bool)


def choose(base, correct, seed=0, **options):
    return select(base, correct, STRATA, dataclasses.replace(FEW, **options), np.random.default_rng(seed))


def first_probe():
    """The probe set that every choice with seed 0 begins with."""
    return choose(*nothing(), rounds=0).probe


@pytest.mark.parametrize(
    "layers, options, expected",
    [
        ([1, 2, 3], {"ties": "first"}, 1),
        ([1, 2, 3], {"ties": "last"}, 3),
        ([1, 2, 3], {"ties": "median"}, 2),
        ([1, 3], {"ties": "median"}, 1),
        ([1, 2, 3], {"ties": "more_samples"}, 3),
        ([0, 2, 3], {"ties": "first"}, 2),
        ([0, 2, 3], {"ties": "first", "layer_0": True}, 0),
        ([0], {"ties": "last"}, BASE),
        ([2], {"ties": "more_samples"}, 2),
    ],
)
def test_ties(layers, options, expected):
    base, correct = nothing()
    correct[layers] = True
    choice = choose(base, correct, **options)
    assert (choice.layer, choice.gain) == (expected, float(expected != BASE))
    tied = options["ties"] == "more_samples" and len(layers) > 1
    if expected != BASE:
        assert len(choice.probe) == (5 + 2 + 1 if tied else 5)


def test_more_samples_may_decide():
    """Layers 1 and 3 are equal on the probe set, and layer 1 is better outside of it."""
    base, correct = nothing()
    correct[1] = True
    correct[3, first_probe()] = True
    assert choose(base, correct, ties="last").layer == 3
    choice = choose(base, correct, ties="more_samples")
    assert (choice.layer, len(choice.probe)) == (1, 7)  # the quarter is not needed


def test_the_largest_gain_counts_and_losses_do():
    base, correct = nothing()
    probe = first_probe()
    correct[1, probe[:2]] = True
    correct[2, probe[:4]] = True
    assert choose(base, correct)[:2] == (2, 0.8)
    base[probe[4]] = True  # layer 1 keeps it, layer 2 does not
    correct[1, probe[[2, 4]]] = True
    assert choose(base, correct)[:2] == (1, 0.6)


def test_no_gain_draws_a_larger_probe_set():
    base, correct = nothing()
    probe = first_probe()
    correct[2] = True
    correct[2, probe] = False
    choice = choose(base, correct)
    assert (choice.layer, choice.gain, choice.rounds, len(choice.probe)) == (2, 1.0, 1, 6)
    assert not set(choice.probe) & set(probe) and set(choice.probe) <= set(choice.pool)
    assert choose(base, correct, rounds=0).layer == BASE


def test_no_gain_at_all_leaves_the_model_as_it_is():
    base, correct = nothing()
    choice = choose(base, correct)
    assert (choice.layer, choice.gain, choice.rounds) == (BASE, 0.0, 3)  # 5 + 6 + 7 + 2 use the pool up
    assert not gains(base, correct, choice.layer).any()


def test_a_perfect_base_draws_once_more():
    base, correct = nothing()
    probe = first_probe()
    base[probe] = True
    correct[1] = True
    choice = choose(base, correct)
    assert (choice.layer, choice.rounds, len(choice.probe)) == (1, 0, 5) and not set(choice.probe) & set(probe)
    assert choose(np.ones(COUNT, bool), correct).layer == BASE


def test_pool_and_eval_set_are_disjoint():
    rng = np.random.default_rng(1)
    for seed in range(20):
        base, correct = rng.random(COUNT) < 0.5, rng.random((LAYERS, COUNT)) < 0.5
        choice = choose(base, correct, seed, ties="more_samples")
        rows = outside(COUNT, choice)
        assert len(choice.pool) == 20 and set(choice.probe) <= set(choice.pool)
        assert sorted([*choice.pool, *rows]) == list(range(COUNT))
        # The choice depends on nothing outside of its pool.
        base[rows], correct[:, rows] = False, True
        assert choose(base, correct, seed, ties="more_samples").layer == choice.layer


def test_strata_keep_their_shares():
    strata = np.repeat(["a", "b", "c"], [50, 30, 20])
    for seed in range(20):
        drawn = stratified(np.random.default_rng(seed), np.arange(100), strata, 10)
        assert len(set(drawn)) == 10
        counts = np.array([(strata[drawn] == s).sum() for s in "abc"])
        assert (abs(counts - [5, 3, 2]) <= 1).all()
    assert sorted(stratified(np.random.default_rng(0), np.arange(7), strata, 10)) == list(range(7))


@pytest.mark.parametrize("options, says", [({"shot": 0}, "--shot is 0"), ({"shot": 21}, "at least 63")])
def test_impossible_choices(options, says):
    with pytest.raises(UserError, match=says):
        choose(*nothing(), **options)
    with pytest.raises(UserError, match="layer-0"):
        FEW.layers(1)


# Nulls.


def random_table(rng, count=200, layers=8, share=0.5):
    return rng.random(count) < share, rng.random((layers, count)) < share


def test_chance_gains_on_the_probe_set_and_nowhere_else():
    rng = np.random.default_rng(0)
    probe, held = [], []
    for _ in range(200):
        base, correct = random_table(rng)
        choice = select(base, correct, np.zeros(200), SelectOptions(), rng)
        probe.append(choice.gain)
        held.append(gains(base, correct, choice.layer)[outside(200, choice)].mean())
    assert np.mean(probe) > 0.2
    assert abs(np.mean(held)) < 3 * np.std(held) / np.sqrt(200)


def test_a_layer_that_hurts_is_found_and_trusted():
    rng = np.random.default_rng(0)
    base, correct = random_table(rng)
    correct[:] = base & (rng.random(correct.shape) < 0.9)  # all cuts harm a little,
    correct[5] = base | (rng.random(200) < 0.8)  # but this one helps
    found = assess(base, correct, np.zeros(200), SelectOptions(), 200, 0)
    assert found["chosen"].get("L5", 0) / 200 == found["stability"] > 0.9
    assert found["held_out"]["low"] > 0.2 and found["over_random"]["low"] > 0
    assert permuted(base, correct, np.arange(1, 8), 199, 0)["layer"] == 5
    assert permuted(base, correct, np.arange(1, 8), 199, 0)["p"] == 1 / 200


def test_permuted_labels_rarely_find_what_is_not_there():
    rng = np.random.default_rng(0)
    p = np.array([permuted(*random_table(rng), np.arange(8), 99, i)["p"] for i in range(300)])
    assert 0.02 < (p <= 0.05).mean() < 0.09 and 0.42 < (p <= 0.5).mean() < 0.58
    base, correct = random_table(rng)
    assert permuted(base, correct & base, np.arange(8), 99, 0)["p"] > 0.5  # cuts that only lose


def test_assess_is_deterministic():
    table = random_table(np.random.default_rng(3))
    found = [assess(*table, np.zeros(200), SelectOptions(ties="more_samples"), 50, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert sum(found[0]["chosen"].values()) == 50


# Vectors.


def test_similarity():
    vectors = np.random.default_rng(0).normal(size=(4, 9)) + 1
    np.testing.assert_allclose(similarity(vectors), np.corrcoef(vectors), atol=1e-12)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(similarity(vectors, "cosine"), unit @ unit.T, atol=1e-12)
    flat = similarity(np.array([[0.1] * 5, [0, 1, 0, 1, 0]]))
    np.testing.assert_array_equal(flat, np.eye(2))


def test_like_tasks_are_joined_first():
    rng = np.random.default_rng(0)
    means = np.repeat(rng.normal(size=(2, 6)), 3, 0)
    halves = in_two(means + 0.05 * rng.normal(size=means.shape), "pearson")
    np.testing.assert_array_equal(halves, np.kron(np.eye(2), np.ones((3, 3))) > 0)
    deltas = [m[:, None] + 0.1 * rng.normal(size=(6, 50)) for m in means]
    np.testing.assert_array_equal(together(deltas, "pearson", 50, 0), halves)
    noise = [rng.normal(size=(6, 50)) for _ in means]
    assert together(noise, "pearson", 50, 0).min() < 0.7


@pytest.mark.parametrize("count, depth", [(1, 3), (3, 40)])
def test_figure(count, depth):
    vectors = np.random.default_rng(0).normal(size=(count, depth)) / 9
    alike = similarity(vectors)
    joined = tree(alike) if count > 1 else None
    figure = interactions(list("abc")[:count], vectors, vectors > 0, alike, joined, label="pearson")
    shown = {axis.get_title() for axis in figure.axes}
    assert ("similarity (pearson)" in shown) == (count > 1) and "change in accuracy when a layer is cut" in shown


# The command.


def args(out, **options):
    settings = {"task": ("mini-docvqa", "mini-infovqa"), "limit": 15, "shot": 3, "batch": 12, "draws": 20}
    return Args(**{**settings, **options}, out=out)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"model": "mini-qwen3"}, "did you mean 'mini-qwen3-vl'"),
        ({"task": ("mini-okvq",)}, "did you mean 'mini-okvqa'"),
        ({"task": ()}, "at least one task"),
        ({"task": ("mini-okvqa", "mini-okvqa")}, "each (and each file name) once"),
        ({"limit": 8}, "mini-docvqa: 8 samples are too few"),
        ({"limit": 0}, "at least 1"),
        ({"shot": 0}, "--shot is 0"),
        ({"draws": 0}, "--draws is 0"),
        ({"batch": 0}, "--batch is 0"),
        ({"split": "tests"}, "did you mean 'test'"),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_wrong_options(tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as stop:
        command.main(args(tmp_path / "out", **options))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and says in error and "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, capsys):
    command.main(args(tmp_path / "whole"))
    printed = capsys.readouterr().out
    assert "mini-docvqa" in printed and "mini-infovqa" in printed
    asked = []

    def killed(*given, label, **options):
        if asked:
            raise KeyboardInterrupt
        asked.append(label)
        return tabulate(*given, label=label, **options)

    monkeypatch.setattr(command, "tabulate", killed)
    with pytest.raises(SystemExit) as stop:
        command.main(args(tmp_path / "cut"))
    assert stop.value.code == 130
    asked.clear()
    command.main(args(tmp_path / "cut"))
    assert asked == ["mini-infovqa"]
    check_run_folder(tmp_path / "cut", tmp_path / "redrawn")
    files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*") if p.is_file()}
    for file in files:
        one, other = (tmp_path / name / file for name in ("whole", "cut"))
        if file.suffix == ".npz":
            with np.load(one) as a, np.load(other) as b:
                assert a.files == b.files and all((a[k] == b[k]).all() for k in a.files), file
        else:
            assert one.read_bytes() == other.read_bytes(), file
    # The files say the same as each other.
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    with np.load(tmp_path / "whole" / "vectors.npz") as saved:
        vectors = dict(zip(saved["names"].tolist(), saved["delta"], strict=True))
    for label, found in results["tasks"].items():
        mine = [line for line in lines if line["task"] == label]
        base, correct = (np.array([line[key] for line in mine]) for key in ("base", "cut"))
        np.testing.assert_allclose(vectors[label], correct.mean(0) - base.mean())
        used = [line["used"] for line in mine]
        assert (used.count("eval"), len(used)) == (found["eval_samples"], 15) == (10, 15)
        file = tmp_path / "whole" / label / "cut.safetensors"
        assert file.exists() == (found["layer"] != "base")
        if file.exists():
            layer = int(found["layer"][1:])
            assert digest(load_interventions(file)) == digest((layer_cut(8, layer, "attn"),))
            rows = np.array(used) == "eval"
            assert found["eval_gain"]["mean"] == pytest.approx(correct[rows, layer].mean() - base[rows].mean())


def test_a_bare_prompt_has_no_turn_to_end(mini):
    """The word that the model would write is right, though the end of a turn is not what it would write next; under the
    chat template that would be wrong."""
    model, processor, examples = mini
    checked = 0
    for example in examples:
        bare = dataclasses.replace(example, prompt="{QUESTION} The answer is", chat_template=False)
        batch = encode([bare], processor, model.config, with_answer=False)
        last = np.flatnonzero(batch.inputs.attention_mask[0])[-1]
        word = processor.tokenizer.decode([int(np.argmax(model(batch.inputs).logits[0, last]))]).strip()
        answered = dataclasses.replace(bare, answers=(word or "x",))
        whole = encode([answered], processor, model.config)
        likeliest = np.argmax(model(whole.inputs).logits[0], -1)
        ids, at = whole.inputs.input_ids[0], np.flatnonzero(whole.spans["answer"][0])
        right = bool((likeliest[at - 1] == ids[at]).all())
        assert tabulate(model, processor, [answered])[0].tolist() == [right]
        checked += right and likeliest[at[-1]] != ids[at[-1] + 1]
    assert checked
