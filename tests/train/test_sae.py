"""The command that trains dictionaries: losses against NumPy and PyTorch, members, resuming, what it writes."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from kind_cases import dictionary, one_sentence
from run_folders import check_run_folder

import vlm_jax
from interventions.dictionary import scattered
from interventions.diff.activations import Index, Shuffled
from interventions.diff.dictionaries import load_dictionaries, load_dictionary
from interventions.diff.place import Place
from train import dictionaries as training
from train import sae
from train.dictionaries import (
    DictionaryLoss,
    DictionaryOptions,
    active,
    decoded,
    jump,
    train_dictionaries,
    with_unit_decoder,
)
from train.sae import Args
from vlm_jax import UserError
from vlm_jax.data import load_task
from vlm_jax.prompts import encode

PLACES = [Place("text.resid_post", 2), Place("text.resid_post", 5)]


class Planted:
    """Activations of two layers: sums of a few of 24 directions, and their index as one block after the other."""

    def __init__(self, rows=4096, blocks=8, broken=None):
        rng = np.random.default_rng(0)
        self.directions = rng.standard_normal((2, 24, 16))
        self.directions /= np.linalg.norm(self.directions, axis=-1, keepdims=True)
        codes = (rng.random((2, rows, 24)) < 0.1) * (1 + rng.random((2, rows, 24)))
        self.values = (codes @ self.directions * 5 + 3).astype(np.float32)
        if broken is not None:
            self.values[broken] = np.nan
        block = np.repeat(np.arange(blocks), rows // blocks).astype(np.int32)
        self.index = training_index(block)

    def read(self, block):
        return {"text.resid_post": self.values[:, self.index.block == block]}


def training_index(block):
    return Index(block, block, block, np.full(len(block), 2, np.int32), block)


def trained(options, source=None, **how):
    read = Shuffled(source or Planted(), options.batch, buffer=2)
    return train_dictionaries(read, PLACES, options, **how)


OPTIONS = DictionaryOptions(latents=64, k=4, batch=256, epochs=20, lr=0.01, seeds=(0, 1), dead_after=2000)


@pytest.fixture(scope="module")
def found():
    return trained(OPTIONS)


def best_cosines(one, directions):
    """Of every planted direction, with the nearest decoder row."""
    return (directions @ np.asarray(one.W_dec).T).max(1)


def test_planted_directions_are_found(found):
    """In raw activations, whose scale and mean the training folds in. Untrained dictionaries do not have them."""
    source = Planted()
    assert set(found.dictionaries) == {place._replace(seed=seed) for place in PLACES for seed in (0, 1)}
    begun = trained(dataclasses.replace(OPTIONS, lr=1e-12, epochs=1))
    for place, one in found.dictionaries.items():
        layer = PLACES.index(place._replace(seed=None))
        x = source.values[layer]
        fvu = ((x - np.asarray(one(x))) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert fvu < 0.2 and (best_cosines(one, source.directions[layer]) > 0.8).mean() > 0.8
        np.testing.assert_allclose(np.linalg.norm(one.W_dec, axis=-1), 1, atol=1e-5)
        assert (best_cosines(begun.dictionaries[place], source.directions[layer]) > 0.8).mean() < 0.2
    assert all(found.alive.values())


def test_seeds_and_layers_differ(found):
    weights = [np.asarray(one.W_dec) for one in found.dictionaries.values()]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(weights) for b in weights[:i])


def test_a_seed_gives_the_same_dictionary_in_any_place():
    """Seed 0 too, which is no number like the others."""
    options = dataclasses.replace(OPTIONS, epochs=1, lr=1e-12)
    one, other = (trained(dataclasses.replace(options, seeds=seeds)).dictionaries for seeds in ((0, 1), (1, 0)))
    assert one.keys() == other.keys()
    for place in one:
        np.testing.assert_allclose(one[place].W_dec, other[place].W_dec, atol=1e-6)
    assert np.abs(one[PLACES[0]._replace(seed=0)].W_dec - one[PLACES[0]._replace(seed=1)].W_dec).max() > 0.1


def test_a_member_that_breaks_off_does_not_end_the_others(found, capsys):
    outcome = trained(OPTIONS, Planted(broken=1))
    for place, alive in outcome.alive.items():
        assert alive == (place.layer == 2)
        if alive:
            np.testing.assert_array_equal(outcome.dictionaries[place].W_dec, found.dictionaries[place].W_dec)


def test_a_stopped_training_goes_on(tmp_path, found, monkeypatch):
    """Bit for bit, with its counters."""
    options = dataclasses.replace(OPTIONS, save_every=10)

    class Stopped(Exception):
        pass

    real, calls = training._step_batch, []

    def stopping(read, step):
        calls.append(step)
        if len(calls) == 120:
            raise Stopped
        return real(read, step)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "_step_batch", stopping)
        trained(options, folder=tmp_path)
    resumed = trained(options, folder=tmp_path)
    for place, one in found.dictionaries.items():
        for a, b in zip(*map(jax.tree.leaves, (one, resumed.dictionaries[place])), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(found.sparsity[place], resumed.sparsity[place])


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_other_activations(activation):
    """They reach about the wanted number of active latents, and read with thresholds."""
    outcome = trained(dataclasses.replace(OPTIONS, activation=activation, seeds=(0,), epochs=40, lr=3e-3))
    source = Planted()
    for layer, place in enumerate(PLACES):
        one, x = outcome.dictionaries[place], source.values[layer]
        assert one.architecture == "jumprelu" and (np.asarray(one.threshold) >= 0).all()
        codes = np.asarray(one.codes(x))
        assert (codes > 0).sum(1).mean() == pytest.approx(4, abs=1.5)
        assert ((x - np.asarray(one(x))) ** 2).sum() / ((x - x.mean(0)) ** 2).sum() < 0.25


def test_warm_start_begins_with_the_same_function():
    """In raw activations. A step later it is another."""
    start = {place: dictionary(np.random.default_rng(place.layer), 1, 64, 5).member(0) for place in PLACES}
    start = {
        place: one.replace(W_enc=one.W_enc[:16], W_dec=one.W_dec[:, :16], b_dec=one.b_dec[:16])
        for place, one in start.items()
    }
    options = DictionaryOptions(batch=256, lr=1e-12, aux_k=0)
    same, moved = (trained(o, start=start) for o in (options, dataclasses.replace(options, lr=1e-2)))
    for layer, place in enumerate(PLACES):
        unit = with_unit_decoder(start[place])
        x = Planted().values[layer]
        assert same.dictionaries[place].k == 5
        np.testing.assert_allclose(same.dictionaries[place](x), unit(x), rtol=1e-3, atol=1e-3)
        assert np.abs(np.asarray(moved.dictionaries[place](x)) - np.asarray(unit(x))).max() > 0.1


def test_thresholds_do_not_say_how_many_are_active():
    """A base with thresholds needs --k; one that broke off cannot be adapted."""
    one = dictionary(np.random.default_rng(0), 1, 64, 5).member(0)
    one = one.replace(W_enc=one.W_enc[:16], W_dec=one.W_dec[:, :16], b_dec=one.b_dec[:16])
    jumps = one.replace(architecture="jumprelu", k=None, threshold=np.full(64, 0.1, np.float32))
    with pytest.raises(UserError, match="no number of active latents: give --k"):
        trained(DictionaryOptions(batch=256), start=dict.fromkeys(PLACES, jumps))
    outcome = trained(DictionaryOptions(batch=256, k=3), start=dict.fromkeys(PLACES, jumps))
    assert outcome.dictionaries[PLACES[0]].k == 3
    with pytest.raises(UserError, match=r"no dictionary of text\.resid_post\.5 to begin with"):
        trained(DictionaryOptions(batch=256), start={PLACES[0]: one})


def loss_of(one, x, activation="topk", idle=None, images=None, **how):
    options = {"k": 4, "aux_k": 0, "dead_after": 50, "bandwidth": 0.5} | how
    counters = {
        "idle": jnp.zeros(96, jnp.int32) if idle is None else jnp.asarray(idle, jnp.int32),
        "fired": jnp.zeros(96),
        "steps": jnp.int32(0),
        "threshold": jnp.float32(0),
    }
    images = None if images is None else jnp.asarray(images)
    return DictionaryLoss(activation, **options).of_member(one, jnp.asarray(x), counters, images)


@pytest.fixture
def one():
    return jax.tree.map(jnp.asarray, dictionary(np.random.default_rng(3), members=1, k=4).member(0))


X = np.random.default_rng(4).standard_normal((30, 64), np.float32)


def test_loss_and_gradients_equal_pytorch(one):
    """TopK with AuxK, some latents dead, against autograd."""
    idle = np.where(np.arange(96) % 3, 0, 100)
    loss, metrics, counters = loss_of(one, X, idle=idle, aux_k=6)
    gradient = jax.grad(lambda d: loss_of(d, X, idle=idle, aux_k=6)[0])(one)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    t = {name: torch.tensor(np.asarray(getattr(one, name)), requires_grad=True) for name in names}
    x = torch.from_numpy(X)
    before = x @ t["W_enc"] + t["b_enc"]
    kept = before.topk(4, -1)
    codes = torch.zeros_like(before).scatter(-1, kept.indices, kept.values.relu())
    guess = codes @ t["W_dec"] + t["b_dec"]

    def fvu(x, guess):
        return ((x - guess) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()

    fires = (codes > 0).any(0)
    dead = torch.from_numpy(idle > 0) & ~fires
    assert int(dead.sum()) > 0 and int(dead.sum()) >= 6
    aux = before.masked_fill(~dead, -torch.inf).topk(6, -1)
    aux_codes = torch.zeros_like(before).scatter(-1, aux.indices, aux.values.relu())
    want = fvu(x, guess) + fvu((x - guess).detach(), aux_codes @ t["W_dec"]) / 32
    want.backward()
    assert loss == pytest.approx(float(want.detach()), rel=1e-5) and float(loss) > float(metrics["fvu"])
    for name, tensor in t.items():
        np.testing.assert_allclose(getattr(gradient, name), tensor.grad, atol=1e-6, rtol=1e-4, err_msg=name)
    np.testing.assert_array_equal(counters["idle"] == 0, fires)
    without = jax.grad(lambda d: loss_of(d, X, idle=idle)[0])(one)
    assert np.abs(np.asarray(without.W_enc) - np.asarray(gradient.W_enc)).max() > 1e-5  # the control


def test_sparse_products_equal_dense_ones():
    """Values and gradients of the fast path, and of the product with an array of all codes."""
    rng = np.random.default_rng(5)
    index = jnp.asarray(np.stack([rng.permutation(96)[:4] for _ in range(37)]))
    values, W_dec, weight = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((37, 4), (96, 64), (37, 64)))

    def dense(values, index, W_dec):
        return scattered(values, index, 96) @ W_dec

    found, expected = (
        jax.value_and_grad(lambda v, w, fn=fn: (fn(v, index, w) * weight).sum(), (0, 1))(values, W_dec)
        for fn in (decoded, dense)
    )
    np.testing.assert_allclose(decoded(values, index, W_dec), dense(values, index, W_dec), atol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_metrics_by_token_group(one):
    """Of the visual tokens and of the others, as if each were a batch of its own."""
    images = np.arange(30) % 3 == 0
    _, whole, _ = loss_of(one, X, images=images)
    assert {"fvu", "fvu_image", "fvu_text", "l0", "l0_image", "l0_text"} <= whole.keys()
    for name, rows in (("image", images), ("text", ~images)):
        _, part, _ = loss_of(one, X[rows])
        for metric in ("fvu", "l0"):
            np.testing.assert_allclose(whole[f"{metric}_{name}"], part[metric], rtol=1e-5)
    assert abs(float(whole["fvu_image"]) - float(whole["fvu_text"])) > 1e-3


def test_no_dead_latents_no_auxiliary_loss(one):
    plain, with_aux = loss_of(one, X)[0], loss_of(one, X, aux_k=6)[0]
    assert (
        float(plain) == float(with_aux) and np.isfinite(jax.grad(lambda d: loss_of(d, X, aux_k=6)[0])(one).W_enc).all()
    )


def test_batchtopk_keeps_k_on_average(one):
    _, metrics, counters = loss_of(one, X, "batchtopk")
    before = np.maximum(X @ np.asarray(one.W_enc) + np.asarray(one.b_enc), 0)
    assert float(metrics["l0"]) == pytest.approx(4)
    assert float(counters["threshold"]) == pytest.approx(np.sort(before.ravel())[-4 * len(X)], rel=1e-5)
    per_row = (before >= np.sort(before.ravel())[-4 * len(X)]).sum(1)
    assert per_row.min() < 4 < per_row.max()


def test_thresholds_get_straight_through_gradients():
    """Only values within half a bandwidth of the threshold move it."""
    before, threshold = jnp.array([[0.2, 0.9, 1.1, 3.0]]).T, jnp.array([1.0])
    grad = jax.grad(lambda t: (jump(before, t, 0.5) * jnp.arange(1.0, 5)[:, None]).sum())(threshold)
    assert float(grad[0]) == pytest.approx(-1.0 / 0.5 * (2 + 3))  # the second and third of four
    counted = jax.grad(lambda t: active(before, t, 0.5).sum())(threshold)
    assert float(counted[0]) == pytest.approx(-2 / 0.5)
    passed = jax.grad(lambda b: jump(b, threshold, 0.5).sum())(before)
    np.testing.assert_array_equal(passed.ravel(), [0, 0, 1, 1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's arguments, and its run folder."""
    out = tmp_path_factory.mktemp("sae") / "run"
    args = Args(
        task=("mini-okvqa",),
        limit=12,
        eval_limit=6,
        layers=(2, 5),
        latents=64,
        k=4,
        batch=64,
        seeds=(0, 7),
        activation_batch=6,
        store="float32",
        out=out,
    )
    sae.main(args)
    return args


def test_the_run_folder(run, tmp_path, capsys):
    results = json.loads((run.out / "results.json").read_text())
    names = [f"text.resid_post.{layer}.seed-{seed}" for layer in (2, 5) for seed in (0, 7)]
    assert sorted(results["dictionaries"]) == names and results["broke_off"] == []
    for one in results["dictionaries"].values():
        assert set(one["fvu"]) == {"all", "image", "text", "question"} and one["l0"]["all"] == pytest.approx(4, abs=0.5)
        assert one["published_fvu"]["all"] == pytest.approx(one["fvu"]["all"], rel=1e-3)
        assert one["published_fvu"]["text"] < one["fvu"]["text"] * 0.9  # the image's tokens add to the variance
        assert one["loss"]["zeroed"] != one["loss"]["clean"] != one["loss"]["spliced"]
    check_run_folder(run.out, tmp_path)
    before = {path: path.read_bytes() for path in (run.out / "dictionaries").rglob("*") if path.is_file()}
    sae.main(run)  # nothing is left to do
    assert {path: path.read_bytes() for path in before} == before
    assert names[0] in capsys.readouterr().out


def test_streamed_activations_give_the_same_dictionaries(run, tmp_path):
    sae.main(dataclasses.replace(run, store="no", out=tmp_path / "streamed"))
    for path in (run.out / "dictionaries").rglob("*.safetensors"):
        other = tmp_path / "streamed/dictionaries" / path.relative_to(run.out / "dictionaries")
        assert path.read_bytes() == other.read_bytes()


def test_a_dictionary_of_patches(run, tmp_path):
    """Of the vision tower, whose patches include LLaVA's class token. FVU as NumPy computes it from taps."""
    sites = ("visual.resid_post",)
    args = dataclasses.replace(
        run, model="mini-llava", sites=sites, layers=(1,), seeds=(0,), epochs=3, store="float32", out=tmp_path / "run"
    )
    sae.main(args)
    (one,) = json.loads((args.out / "results.json").read_text())["dictionaries"].values()
    assert set(one["fvu"]) == {"all", "image"} and one["fvu"]["all"] == one["fvu"]["image"]
    loss = one["loss"]
    assert loss["clean"] != loss["spliced"] != loss["zeroed"] and one["recovered"] is not None
    stored = load_dictionary(args.out / "dictionaries/visual.resid_post.1").dictionary
    model, processor = vlm_jax.load("mini-llava")
    batch = encode(load_task("mini-okvqa", split="test", limit=args.eval_limit), processor, model.config)
    tap = np.asarray(model(batch.inputs, taps={sites[0]: [1]}).taps[sites[0]], np.float64)[0]
    assert tap.shape[1] == 1 + batch.inputs.images.patch_mask.shape[1]
    x = tap.reshape(-1, tap.shape[-1])
    error = ((x - np.asarray(stored(x.astype(np.float32)))) ** 2).sum()
    assert one["fvu"]["all"] == pytest.approx(error / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
    check_run_folder(args.out, tmp_path)


def test_adaptation(run, tmp_path):
    """Each seed goes on from its own dictionary; sizes come from there."""
    args = dataclasses.replace(
        run,
        init=str(run.out),
        latents=None,
        k=None,
        images=False,
        store="no",
        lr=1e-12,
        aux_k=0,
        out=tmp_path / "adapted",
    )
    sae.main(args)
    adapted = load_dictionaries(args.out)
    for place, begun in load_dictionaries(run.out).items():
        np.testing.assert_allclose(adapted[place].dictionary.W_dec, begun.dictionary.W_dec, atol=1e-5)
        assert adapted[place].dictionary.k == 4
    results = json.loads((args.out / "results.json").read_text())
    assert "image" not in next(iter(results["dictionaries"].values()))["fvu"]  # the model saw no pictures


BAD = {
    "k": ({"k": 65}, "--k is 65, but a dictionary has 64 latents"),
    "seeds": ({"seeds": (1, 1)}, "--seeds is 1 1"),
    "init": ({"init": "nowhere"}, "--init nowhere holds no dictionaries"),
    "widths": ({"sites": ("text.resid_post", "text.mlp.down_proj", "text.mlp.up_proj")}, "train each width by itself"),
    "batch": ({"batch": 10**6}, "give more examples or a smaller --batch"),
    "group": ({"tokens": "register"}, "no example has a token of the group"),
    "same": ({"task": ("mini-okvqa", "mini-okvqa")}, "once"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(run, tmp_path, name, capsys):
    changes, words = BAD[name]
    with pytest.raises(SystemExit):
        sae.main(dataclasses.replace(run, store="no", out=tmp_path / "bad", **changes))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and one_sentence(error.removeprefix("error: ").replace(".", " ").strip())


def test_other_examples_than_those_of_the_training(run):
    """The command measures on other examples than it trains on."""
    train, test = ({e.id for e in load_task("mini-okvqa", split=split, limit=12)} for split in ("train", "test"))
    assert not train & test


def test_two_seeds_from_one_dictionary(run, tmp_path, capsys):
    """They would stay equal."""
    for layer in (2, 5):
        name = f"text.resid_post.{layer}"
        shutil.copytree(run.out / f"dictionaries/{name}.seed-0", tmp_path / f"one/dictionaries/{name}")
    sizes = {"latents": None, "k": None}
    with pytest.raises(SystemExit):
        sae.main(dataclasses.replace(run, init=str(tmp_path / "one"), store="no", out=tmp_path / "two", **sizes))
    assert "which would stay equal" in capsys.readouterr().err


def test_init_of_another_size(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sae.main(dataclasses.replace(run, init=str(run.out), latents=32, k=None, store="no", out=tmp_path / "other"))
    assert "--latents is 32, but the dictionaries of --init have 64" in capsys.readouterr().err


def test_stored_and_read_dictionaries_are_equal(run):
    folder = run.out / "dictionaries" / "text.resid_post.2.seed-7"
    stored = load_dictionary(folder)
    assert stored.place == Place("text.resid_post", 2) and stored.sparsity.shape == (64,) and len(stored.model) == 16
