"""Activations: which rows there are, their values, their order, and their store on disk."""

import dataclasses
import json

import numpy as np
import pytest
from kind_cases import one_sentence

import vlm_jax
from interventions import GROUPS, Dictionary, label
from interventions.diff import saved
from interventions.diff.activations import ActivationOptions, Computed, Index, Shuffled
from interventions.diff.place import Place
from interventions.diff.quality import splice_losses
from interventions.diff.saved import Saved, save_activations, stored_bytes
from vlm_jax import UserError
from vlm_jax.data import load_task
from vlm_jax.prompts import encode

SITES = ("text.resid_post", "text.attn_out", "text.head_out", "text.embeddings")
OPTIONS = ActivationOptions(sites=SITES, layers=(1, 5), activation_batch=4)


@pytest.fixture(scope="module")
def mini():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def examples():
    return load_task("mini-okvqa", split="train", limit=3) + load_task("mini-docvqa", split="train", limit=4)


@pytest.fixture(scope="module")
def computed(mini, examples):
    return Computed.of(*mini, examples, OPTIONS)


def everything(source):
    blocks = range(int(source.index.block.max()) + 1)
    parts = [source.read(block) for block in blocks]
    return {site: np.concatenate([part[site] for part in parts], 1) for site in parts[0]}


def test_rows_are_the_prompts_tokens(mini, computed, examples):
    """Of every example, in order, with their groups and ids; padding is left out."""
    index = computed.index
    for number, example in enumerate(examples):
        batch = encode([example], mini[1], mini[0].config, with_answer=False)
        real = np.asarray(batch.inputs.attention_mask)[0]
        rows = index.example == number
        np.testing.assert_array_equal(index.token[rows], np.flatnonzero(real))
        np.testing.assert_array_equal(index.token_id[rows], np.asarray(batch.inputs.input_ids)[0, real])
        np.testing.assert_array_equal(index.group[rows], label(batch)[0, real])
    assert GROUPS.index("padding") not in index.group and GROUPS.index("image") in index.group


def test_values_are_the_taps(mini, computed, examples):
    model, processor = mini
    values = everything(computed)
    assert {site: value.shape[::2] for site, value in values.items()} == {
        "text.resid_post": (2, 128),
        "text.attn_out": (2, 128),
        "text.head_out": (2, 4 * 32),
        "text.embeddings": (1, 128),
    }
    assert computed.shapes == {site: value.shape[::2] for site, value in values.items()}
    for number in (0, 5):
        batch = encode([examples[number]], processor, model.config, with_answer=False)
        taps = model(batch.inputs, taps=SITES).taps
        rows = computed.index.example == number
        count = int(rows.sum())
        for site in SITES:
            tap = np.asarray(taps[site])
            tap = tap[[1, 5], 0] if site != "text.embeddings" else tap
            np.testing.assert_allclose(values[site][:, rows], tap[:, :count].reshape(len(tap), count, -1), atol=1e-4)


def test_a_token_group(mini, examples):
    options = dataclasses.replace(OPTIONS, sites=("text.resid_post",), tokens="first1:question+last")
    index = Computed.of(*mini, examples, options).index
    assert np.bincount(index.example).tolist() == [2] * len(examples)
    with pytest.raises(UserError, match="no example has a token of the group 'register'"):
        Computed.of(*mini, examples, dataclasses.replace(options, tokens="register"))


@pytest.mark.parametrize("name", ["mini-qwen3-vl", "mini-gemma3", "mini-llava"])
def test_patches_of_the_vision_tower(name, examples):
    """Of every image, in order, LLaVA's class token included; fillers and padding are left out."""
    model, processor = vlm_jax.load(name)
    without = dataclasses.replace(examples[0].without_images(), id="text")
    two = dataclasses.replace(examples[1], id="two", images=(examples[1].images[0], examples[2].images[0]))
    asked = [examples[0], without, two, *examples[4:]]
    sites = ("visual.resid_post", "visual.head_out", "visual.embeddings")
    last = model.depths["visual"] - 1
    options = ActivationOptions(sites=sites, layers=(0, last), activation_batch=4)
    computed = Computed.of(model, processor, asked, options)
    values = everything(computed)
    assert set(np.bincount(computed.index.group).nonzero()[0]) == {GROUPS.index("image")}
    assert set(computed.index.token_id) == {-1}
    for number, example in enumerate(asked):
        rows = computed.index.example == number
        if not example.images:
            assert not rows.any()
            continue
        batch = encode([example], processor, model.config, with_answer=False)
        taps = model(batch.inputs, taps=sites).taps
        before = int(name == "mini-llava")
        real = np.pad(np.asarray(batch.inputs.images.patch_mask), [(0, 0), (before, 0)], constant_values=True)
        np.testing.assert_array_equal(computed.index.token[rows], np.nonzero(real)[1])
        for site in sites:
            tap = np.asarray(taps[site])
            tap = tap[[0, last]] if site != "visual.embeddings" else tap[None]
            wanted = tap.reshape(*tap.shape[:3], -1)[:, real]
            np.testing.assert_allclose(values[site][:, rows], wanted, atol=1e-4)
    if name == "mini-qwen3-vl":
        assert len({int((computed.index.example == n).sum()) for n in range(3)}) == 3
    with pytest.raises(UserError, match="no example has a picture") as caught:
        Computed.of(model, processor, [without], options)
    assert one_sentence(caught.value)


def test_text_beside_pictures(examples):
    """What the model loses is measured on batches with pictures; without any there is nothing to measure."""
    model, processor = vlm_jax.load("mini-llava")
    width, rng = model.config.vision.hidden_size, np.random.default_rng(0)
    decoder = rng.standard_normal((48, width)).astype(np.float32) / width**0.5
    one = Dictionary(decoder.T, np.zeros(48, np.float32), decoder, np.zeros(width, np.float32), k=4)
    place = Place("visual.resid_post", 1)
    blind = [dataclasses.replace(e.without_images(), id=f"text {e.id}") for e in examples[:2]]
    both = splice_losses(model, processor, [*examples[:2], *blind], {place: one}, batch=2)[place]
    alone = splice_losses(model, processor, examples[:2], {place: one}, batch=2)[place]
    np.testing.assert_allclose(both.spliced, alone.spliced, rtol=1e-5)
    assert not np.allclose(alone.spliced, alone.clean, rtol=1e-4)
    with pytest.raises(UserError, match="no held-out example has a picture") as caught:
        splice_losses(model, processor, blind, {place: one})
    assert one_sentence(caught.value)


class Numbers:
    """A source whose only value in each row is the row's number."""

    def __init__(self, counts):
        block = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
        self.group = np.full(len(block), GROUPS.index("image"), np.int32)
        self.index = Index(block, block, block, self.group, block)
        self.reads = []

    def read(self, block):
        self.reads.append(block)
        rows = np.flatnonzero(self.index.block == block).astype(np.float32)
        return {"site": rows[None, :, None]}


def test_an_epoch_reads_every_row_once():
    """Up to those that do not fill a batch; every epoch in another order; the same for the same step."""
    source = Numbers([7, 3, 9, 1, 6, 8])
    read = Shuffled(source, 4, buffer=2, seed=0)
    steps = read.steps(1)
    epochs = [np.concatenate([read(s)["site"].ravel() for s in range(e * steps, (e + 1) * steps)]) for e in range(2)]
    assert len(set(epochs[0])) == 4 * steps >= 34 - 3 * 3
    assert not np.array_equal(*[epoch[: 4 * steps] for epoch in epochs])
    assert np.abs(np.diff(epochs[0])).max() > 3  # shuffled within the buffer
    fresh = Shuffled(Numbers([7, 3, 9, 1, 6, 8]), 4, buffer=2, seed=0)
    np.testing.assert_array_equal(fresh(3)["site"], read(3)["site"])
    other = Shuffled(Numbers([7, 3, 9, 1, 6, 8]), 4, buffer=2, seed=1)
    assert any(not np.array_equal(other(s)["site"], read(s)["site"]) for s in range(steps))


def test_a_block_is_read_once_for_all_its_steps():
    source = Numbers([50] * 6)
    read = Shuffled(source, 4, buffer=2)
    for step in range(read.steps(1)):
        read(step)
    assert sorted(source.reads) == list(range(6))


@pytest.mark.parametrize("counts", [[1] * 20, [30, 1, 1, 1], [1, 1, 1, 30]])
def test_windows_fill_batches(counts):
    read = Shuffled(Numbers(counts), 5, buffer=1)
    for step in range(2 * read.steps(1)):
        assert read(step)["site"].shape == (1, 5, 1)
    joined = np.concatenate(read.windows(0))
    assert sorted(joined) == list(range(len(counts)))


def test_only_the_rows_of_a_group():
    source = Numbers([6, 6])
    source.group[::2] = GROUPS.index("question")
    read = Shuffled(source, 3, tokens="question")
    assert read.steps(1) == 2
    assert {int(v) % 2 for step in range(2) for v in read(step)["site"].ravel()} == {0}
    with pytest.raises(
        UserError, match="there are 6 activations of the tokens 'question', but a batch has 7"
    ) as caught:
        Shuffled(source, 7, tokens="question")
    assert one_sentence(caught.value)


@pytest.mark.parametrize("tokens", ["all", "image+question"])
def test_visual_tokens_keep_their_marks_through_the_shuffling(tokens):
    """The value of a row is its number, so a step's marks can be read from its values."""
    source = Numbers([7, 3, 9, 1, 6, 8])
    groups = np.array([GROUPS.index(name) for name in ("image", "question", "before")])
    source.group[:] = groups[np.arange(len(source.group)) % 3]
    read = Shuffled(source, 4, tokens=tokens, buffer=2)
    seen = set()
    for step in range(2 * read.steps(1)):
        numbers = read(step)["site"].ravel().astype(int)
        np.testing.assert_array_equal(read.images(step), numbers % 3 == 0)
        seen |= set(read.images(step).tolist())
    assert seen == {True, False}


@pytest.mark.parametrize("precision, tolerance", [("float32", 0), ("bfloat16", 2**-8)])
def test_the_store(computed, tmp_path, capsys, precision, tolerance):
    """The same rows and values; the size is told before."""
    stored = save_activations(tmp_path / "store", computed, precision, {"model": "a"})
    assert "tokens" in capsys.readouterr().out
    for name, array in stored.index._asdict().items():
        np.testing.assert_array_equal(array, getattr(computed.index, name))
    want, got = everything(computed), everything(stored)
    for site in SITES:
        np.testing.assert_allclose(got[site], want[site], rtol=tolerance, atol=0)
    assert [stored.number(layer) for layer in (1, 5, None)] == [0, 1, 0]
    size = sum(path.stat().st_size for site in SITES for path in (tmp_path / "store" / site).rglob("*"))
    assert size <= stored_bytes(computed, precision) * 1.05 + 2**16


def test_a_killed_session_goes_on(computed, tmp_path):
    """Blocks that are written are not computed again; until all are, the store cannot be read."""

    class Killed(Exception):
        pass

    class Dying(Computed):
        calls: list = []  # noqa: RUF012

        def read(self, block):
            self.calls.append(block)
            if len(self.calls) == 2:
                raise Killed
            return super().read(block)

    fields = {field.name: getattr(computed, field.name) for field in dataclasses.fields(computed)}
    dying, folder = Dying(**fields), tmp_path / "store"
    with pytest.raises(Killed):
        save_activations(folder, dying, "float32", {})
    with pytest.raises(UserError, match="lacks 1 of 2 blocks") as caught:
        Saved.open(folder)
    assert one_sentence(caught.value)
    with open(folder / "done.0", "a") as file:
        file.write("1")  # a line that the killed process did not finish
    Dying.calls.clear()
    stored = save_activations(folder, Dying(**fields), "float32", {})
    assert Dying.calls == [1] and (folder / "done.0").read_text() == "0\n1\n"
    for site, values in everything(computed).items():
        np.testing.assert_array_equal(everything(stored)[site], values)


def test_another_store(computed, tmp_path):
    save_activations(tmp_path / "store", computed, "float32", {"model": "a"})
    with pytest.raises(UserError, match="model is a there and b here") as caught:
        save_activations(tmp_path / "store", computed, "float32", {"model": "b"})
    assert one_sentence(caught.value)
    with pytest.raises(UserError, match="precision is float32 there and bfloat16 here"):
        save_activations(tmp_path / "store", computed, "bfloat16", {"model": "a"})
    with pytest.raises(UserError, match="holds no activations"):
        Saved.open(tmp_path)
    index = tmp_path / "store" / "index.npz"
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        Saved.open(tmp_path / "store")


def test_a_disk_that_is_too_small(computed, tmp_path, monkeypatch):
    """Told before anything is written."""
    usage = saved.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saved.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="GiB free") as caught:
        save_activations(tmp_path / "store", computed, "float32", {})
    assert one_sentence(caught.value) and not (tmp_path / "store").exists()


BAD = {
    "visual.attn_probs": "no activation for each token",
    "projector.linear_1": "no activation for each token",
    "text.attn_probs": "no activation for each token",
    "text.resid": "unknown site",
}


@pytest.mark.parametrize("site", BAD)
def test_sites_without_tokens(mini, site):
    with pytest.raises(UserError, match=BAD[site]) as caught:
        ActivationOptions(sites=(site,)).check_activations(mini[0])
    assert one_sentence(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layers": (8,)}, "name some of 0 to 7"),
        ({"layers": (1, 1)}, "name some of 0 to 7"),
        ({"layers": (1,), "sites": ("text.norm",)}, "outside of the layers"),
        ({"sites": ()}, "--sites is empty"),
        ({"tokens": "picture"}, "unknown token group"),
        ({"sites": ("visual.resid_post", "text.resid_post")}, "train each by itself"),
        ({"sites": ("visual.resid_post",), "tokens": "text"}, "not in the vision tower"),
        ({"sites": ("visual.resid_post",), "tokens": "image"}, "not in the vision tower"),
        ({"sites": ("visual.resid_post",), "layers": (0, 99)}, "name some of 0 to"),
    ],
)
def test_other_bad_options(mini, options, words):
    with pytest.raises(UserError, match=words) as caught:
        ActivationOptions(**options).check_activations(mini[0])
    assert one_sentence(caught.value)


def test_facts_are_json(computed, tmp_path):
    save_activations(tmp_path / "store", computed, "float32", {"model": "a"})
    facts = json.loads((tmp_path / "store" / "activations.json").read_text())
    assert facts["rows"] == len(computed.index.block) and facts["layers"] == [1, 5]
