"""Interventions on disk: what is loaded is what was saved, bit by bit, and does the same; the foreign is refused."""

import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_oracle import make_batch, tiny_config, tiny_model
from kind_cases import one_sentence
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import vlm_jax
from interventions import (
    GROUPS,
    Ablation,
    Add,
    AttentionKnockout,
    Dictionary,
    Gate,
    HeadGate,
    Latents,
    LoRA,
    LoReFT,
    Noise,
    Patch,
    ProjectOut,
    Replace,
    UniformAttention,
    describe,
    digest,
    load_interventions,
    save_interventions,
)
from interventions.kinds import KINDS
from interventions.kinds.base import kind, option
from interventions.kinds.reft import EDITOR_KINDS
from vlm_jax import Intervention
from vlm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_programs")

LAYERS, HEADS, HEAD_DIM, WIDTH, LENGTH = 2, 4, 32, 64, 9
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


WHERE = np.arange(LENGTH)[None] >= np.array([4, 5])[:, None]
SLOT = np.array([1, 2], np.int32)  # the second of two slots in layer 0, none in layer 1
BETWEEN = {"query": "question", "key": "before", "layers": [1]}
GROUP_LABELS = np.where(WHERE, GROUPS.index("question"), GROUPS.index("before")).astype(np.int32)


def knock(mode, **how):
    return AttentionKnockout.between(LAYERS, **BETWEEN, mode=mode, **how).replace(groups=GROUP_LABELS)


#: Shapes of the editors' arrays besides the projection.
SOURCES = {"W": (2, WIDTH, 3), "b": (2, 3)}
SAVED = {
    "Patch": Patch({"text.attn_out": normal(2, 2, LENGTH, WIDTH)}, {"text.attn_out": SLOT}, WHERE),
    "Patch of heads": Patch(
        {"text.head_out": normal(2, 2, LENGTH, HEADS, HEAD_DIM)},
        {"text.head_out": SLOT},
        None,
        np.array([True, False, True, False]),
    ),
    "Patch outside of the layers": Patch(
        {"text.embeddings": normal(1, 2, LENGTH, WIDTH)}, {"text.embeddings": np.int32(0)}, WHERE
    ),
    "Ablation": Ablation(
        {"text.attn_out": normal(2, len(GROUPS), WIDTH)},
        {"text.attn_out": SLOT},
        np.ones(len(GROUPS), bool),
        np.ones((2, LENGTH), np.int32),
        where=WHERE,
    ),
    "Ablation of heads": Ablation.zero("text.head_out", [0]).replace(heads=np.array([True, False, True, False])),
    "Noise": Noise(np.array([[1, 2], [3, 4]], np.uint32), np.array([0.5, 1], np.float32), where=WHERE),
    "Gate": Gate({"text.attn_out": np.array([1, 0], np.float32), "text.mlp_out": np.array([0.5, 1], np.float32)}),
    "Gate outside of the layers": Gate({"text.norm": np.float32(0.5)}, where=WHERE, new=True),
    "HeadGate": HeadGate.cut(LAYERS, HEADS, [(0, 1), (1, 3)]),
    "AttentionKnockout": knock("post_softmax", keep=0.5),
    "AttentionKnockout, random": knock("random_mass", seed=3),
    "UniformAttention": UniformAttention(np.array([0, 1], np.float32)),
    "Add": Add(normal(2, WIDTH), "text.resid_post", SLOT, where=WHERE, new=True),
    "Add to embeddings": Add(normal(WIDTH)),
    "Replace": Replace(normal(2, WIDTH), "text.mlp_out", SLOT, where=WHERE),
    "ProjectOut": ProjectOut.of(normal(2, 3, WIDTH), {"text.resid_post": SLOT, "text.norm": np.int32(0)}),
    "Latents": Latents.clamp(
        Dictionary(normal(2, WIDTH, 5), normal(2, 5), normal(2, 5, WIDTH), normal(2, WIDTH), architecture="topk", k=2),
        {"text.resid_post": SLOT},
        [1, 3],
        2.0,
        where=WHERE,
    ),
    "LoReFT": LoReFT(
        {"text.resid_post": (normal(2, WIDTH, 3), normal(2, WIDTH, 3), normal(2, 3))}, {"text.resid_post": SLOT}
    ),
    **{
        name: cls(
            {"text.resid_post": (normal(2, WIDTH, 3), *(normal(*SOURCES[part]) for part in cls.sources))},
            {"text.resid_post": SLOT},
        )
        for name, cls in EDITOR_KINDS.items()
        if name != "LoReFT"
    },
    "LoRA": LoRA(
        {"text.self_attn.q_proj": (normal(2, WIDTH, 3), normal(2, 3, HEADS * HEAD_DIM))},
        {"text.self_attn.q_proj": SLOT},
        np.float32(2),
        magnitude={"text.self_attn.q_proj": normal(2, HEADS * HEAD_DIM)},
        dropout=0.1,
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config("qwen3", text={"num_hidden_layers": LAYERS})).save_pretrained(folder)
    return vlm_jax.load(folder)[0]


@pytest.fixture(scope="module")
def inputs(model):
    return vlm_jax.Inputs.from_hf(model.config, **make_batch([[LENGTH], [LENGTH]]))


def reloaded(intervention, tmp_path):
    save_interventions(tmp_path / "file.safetensors", (intervention,))
    (loaded,) = load_interventions(tmp_path / "file.safetensors")
    return loaded


def test_every_kind_is_here():
    ours = {name for name, made in KINDS.items() if made.__module__.startswith("interventions.kinds.")}
    assert {type(intervention).__name__ for intervention in SAVED.values()} == ours


@pytest.mark.parametrize("name", SAVED)
def test_arrays_and_options_come_back(tmp_path, name):
    saved = SAVED[name]
    loaded = reloaded(saved, tmp_path)
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)  # kinds, sites and options too
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("name", SAVED)
def test_digest_comes_back(tmp_path, name):
    assert digest((reloaded(SAVED[name], tmp_path),)) == digest((SAVED[name],))


LAYERED = [name for name in SAVED if "outside" not in name and name not in ("Add to embeddings", "ProjectOut", "Noise")]


@pytest.mark.parametrize("names", [LAYERED, [n for n in SAVED if n not in LAYERED]], ids=["layers", "outside of them"])
def test_effect_comes_back(tmp_path, model, inputs, names):
    """All of them at once: each that was loaded, alone, is the same pytree of the same bits."""
    run = jax.jit(lambda m, x, i: m(x, i).logits)
    saved = tuple(SAVED[name] for name in names)
    save_interventions(tmp_path / "file", saved)
    want = np.asarray(run(model, inputs, saved))
    np.testing.assert_array_equal(run(model, inputs, load_interventions(tmp_path / "file")), want)
    assert np.abs(want - np.asarray(run(model, inputs, ()))).max() > 1e-3


@pytest.mark.parametrize("name", ["Patch", "Add", "Replace", "LoRA", "LoReFT", "AttentionKnockout", "HeadGate"])
def test_what_is_loaded_needs_no_jit(tmp_path, model, inputs, name):
    """Files hold NumPy arrays, which the traced number of a layer must index all the same."""
    loaded = reloaded(SAVED[name], tmp_path)
    found = jax.eval_shape(lambda m: m(inputs, (loaded,)).logits, model)
    assert found.shape == (2, LENGTH, 320)


@pytest.mark.parametrize("name", SAVED)
def test_digest_is_of_every_number(name):
    """The last entry of any array."""
    leaves, structure = jax.tree.flatten(SAVED[name])
    seen = {digest((SAVED[name],))}
    for number, leaf in enumerate(leaves):
        changed = np.array(leaf)
        changed.reshape(-1)[-1:] = ~changed.reshape(-1)[-1:] if leaf.dtype == bool else changed.reshape(-1)[-1:] + 1
        seen.add(digest((structure.unflatten([*leaves[:number], changed, *leaves[number + 1 :]]),)))
    assert len(seen) == len(leaves) + 1


def test_digest_is_of_kinds_sites_and_options():
    same = normal(2, WIDTH)
    found = [
        Add(same, "text.resid_post", SLOT),
        Replace(same, "text.resid_post", SLOT),
        Add(same, "text.resid_mid", SLOT),
        Add(same, "text.resid_post", SLOT, new=True),
        Add(same, "text.resid_post", SLOT, group="image"),
        Add(same.astype(np.float16), "text.resid_post", SLOT),
    ]
    assert len({digest((i,)) for i in found}) == len(found)
    assert digest(found[:2]) != digest(found[1::-1])


def test_jax_arrays_are_the_same_as_numpy():
    gate = SAVED["Gate"]
    assert digest((jax.tree.map(jnp.asarray, gate),)) == digest((gate,))


def test_layout_in_memory_does_not_matter():
    vectors = normal(WIDTH, 2)
    assert digest((Add(vectors.T, "text.resid_post", SLOT),)) == digest(
        (Add(np.ascontiguousarray(vectors.T), "text.resid_post", SLOT),)
    )


def test_several_in_their_order(tmp_path):
    saved = tuple(SAVED.values())
    save_interventions(tmp_path / "all.safetensors", saved)
    loaded = load_interventions(tmp_path / "all.safetensors")
    assert [type(i) for i in loaded] == [type(i) for i in saved]
    assert digest(loaded) == digest(saved)


def test_half_precision_comes_back(tmp_path):
    saved = Add(normal(2, WIDTH).astype(ml_dtypes.bfloat16), "text.resid_post", SLOT)
    loaded = reloaded(saved, tmp_path)
    assert loaded.value.dtype == ml_dtypes.bfloat16
    assert loaded.value.tobytes() == saved.value.tobytes()


@pytest.mark.parametrize("name", SAVED)
def test_description_is_one_line(name):
    text, intervention = describe(SAVED[name]), SAVED[name]
    assert "\n" not in text and len(text) < 200
    assert text.startswith(type(intervention).__name__) and digest((intervention,)) in text
    assert all(site in text for site in intervention.sites)


def test_description_names_the_layers():
    text = describe(SAVED["Gate"])
    assert "text.attn_out L1" in text and "text.mlp_out L0" in text
    assert "post_softmax" in describe(SAVED["AttentionKnockout"])


# Refusals


def refusal(path):
    with pytest.raises(UserError) as raised:
        load_interventions(path)
    assert one_sentence_of(raised.value, path)
    return str(raised.value)


def one_sentence_of(error, path):
    """Its words, without the path's."""
    return one_sentence(str(error).replace(str(path), "file"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.safetensors"
    save_interventions(path, (SAVED["Add"], SAVED["Gate"]))
    return path


def respell(path, change):
    """Rewrites a file's description."""
    with safe_open(path, framework="numpy") as opened:
        described = json.loads(opened.metadata()["interventions"])
    described = change(described) or described
    save_file(load_file(path), path, metadata={"interventions": json.dumps(described)})


def test_no_file(tmp_path):
    assert "none.safetensors" in refusal(tmp_path / "none.safetensors")


def test_folder(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_cut_off_file(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    assert "holds no saved interventions" in refusal(file)


def test_foreign_safetensors(tmp_path):
    save_file({"weight": normal(3)}, tmp_path / "model.safetensors")
    assert "holds no saved interventions" in refusal(tmp_path / "model.safetensors")


def test_pickle_is_refused_and_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("",))

    (tmp_path / "file.pkl").write_bytes(pickle.dumps(Evil()))
    refusal(tmp_path / "file.pkl")
    assert not (tmp_path / "ran").exists()


def without_array(described):
    described[0]["arrays"]["value"] = "0.elsewhere"


def unknown_kind(described):
    described[1]["kind"] = "Gates"


def unknown_option(described):
    described[0]["options"]["newer"] = True


def missing_field(described):
    del described[0]["arrays"]["value"]


def unknown_mode(described):
    described[0] = {"kind": "AttentionKnockout", "options": {"mode": "softmax"}, "arrays": {"keep": "0.value"}}


def not_a_list(described):
    return {"kind": "Gate"}


def of_numbers(described):
    return [1, 2]


@pytest.mark.parametrize(
    "change", [without_array, unknown_kind, unknown_option, missing_field, unknown_mode, not_a_list, of_numbers]
)
def test_description_that_does_not_fit(file, change):
    respell(file, change)
    refusal(file)


def test_unknown_kind_is_named(file):
    respell(file, unknown_kind)
    assert "'Gates'" in refusal(file) and "'Gate'" in refusal(file)


def test_unregistered_kinds_cannot_be_saved(tmp_path):
    class Mine(Gate):
        pass

    with pytest.raises(UserError, match="Mine"):
        save_interventions(tmp_path / "file", (Mine({"text.norm": np.float32(1)}),))
    assert not (tmp_path / "file").exists()


# Kinds from outside of the library


@kind
class Sharpen(Intervention):
    """Scales the attention scores of chosen layers."""

    strength: jax.Array  # (L,)
    place: tuple[str, ...] = option(("text.attn_scores",))

    @property
    def sites(self):
        return frozenset(self.place)

    def active(self):
        return dict.fromkeys(self.place, self.strength != 1)

    def __call__(self, site, value, ctx):
        return value * self.strength[ctx.layer]


@pytest.fixture
def foreign(tmp_path):
    save_interventions(tmp_path / "foreign", (Sharpen(np.array([1, 3], np.float32)), SAVED["Gate"]))
    return tmp_path / "foreign"


def test_kinds_of_others_come_back_and_act(foreign, model, inputs):
    loaded = load_interventions(foreign)
    assert isinstance(loaded[0], Sharpen) and loaded[0].place == ("text.attn_scores",)
    assert "text.attn_scores L1" in describe(loaded[0])
    run = jax.jit(lambda m, i: m(inputs, i).logits)
    got, plain = run(model, loaded[:1]), run(model, ())
    assert np.abs(np.asarray(got) - np.asarray(plain)).max() > 1e-3
    np.testing.assert_array_equal(got, run(model, (Sharpen(np.array([1, 3], np.float32)),)))


def test_a_file_says_which_module_defines_its_kind(foreign, monkeypatch):
    monkeypatch.delitem(KINDS, "Sharpen")
    assert "'Sharpen'" in refusal(foreign) and f"import {__name__}," in refusal(foreign)


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(UserError, match=r"'Gate' exists in interventions\.kinds\.gates") as raised:

        @kind
        class Gate(Intervention):
            sites = frozenset({"text.norm"})

            def __call__(self, site, value, ctx):
                return value

    assert one_sentence(raised.value) and KINDS["Gate"] is type(SAVED["Gate"])


def test_a_kind_may_be_defined_again():
    """As in a notebook's cell that is run twice: the newer class counts."""

    def cell(name):
        class Twice(Intervention):
            sites = frozenset({name})

            def __call__(self, site, value, ctx):
                return value

        return kind(Twice)

    cell("text.embeddings")
    newer = cell("text.norm")
    assert KINDS.pop("Twice") is newer and newer.sites == {"text.norm"}


def test_only_interventions_are_kinds():
    with pytest.raises(UserError, match="Table"):

        @kind
        class Table:
            values: jax.Array


# Token groups have names in files

REVERSED = GROUPS[::-1]


def in_reverse(knock):
    """The same knock-out as a library would save it whose groups are in the reverse order."""
    last = len(GROUPS) - 1
    return knock.replace(keep=knock.keep[:, ::-1, ::-1], groups=last - knock.groups, group_names=REVERSED)


@pytest.mark.parametrize("mode", ["post_softmax", "random_mass"])
def test_order_of_the_groups_in_a_file_does_not_matter(tmp_path, model, inputs, mode):
    run = jax.jit(lambda m, i: m(inputs, i).logits)
    today = knock(mode, seed=1)
    want = np.asarray(run(model, (today,)))
    assert np.abs(want - np.asarray(run(model, ()))).max() > 1e-3
    np.testing.assert_array_equal(run(model, (in_reverse(today),)), want)
    loaded = reloaded(in_reverse(today), tmp_path)
    assert loaded.group_names == GROUPS and digest((loaded,)) == digest((today,))
    np.testing.assert_array_equal(run(model, (loaded,)), want)
    # The control: by their order alone, the groups of the file would be other ones.
    misread = in_reverse(today).replace(group_names=GROUPS, groups=GROUP_LABELS)
    assert np.abs(np.asarray(run(model, (misread,))) - want).max() > 1e-3


def test_a_file_of_fewer_groups_keeps_the_attention_of_new_ones(tmp_path):
    fewer = tuple(name for name in GROUPS if name != "image_end")
    rows = [GROUPS.index(name) for name in fewer]
    today = knock("post_softmax")
    saved = today.replace(keep=today.keep[:, rows][:, :, rows], group_names=fewer, groups=None)
    loaded = reloaded(saved, tmp_path)
    assert loaded.group_names == GROUPS
    np.testing.assert_array_equal(loaded.keep, today.keep)
    np.testing.assert_array_equal(saved.bound(GROUP_LABELS).keep, today.keep)


def without_group_names(described):
    del described[0]["options"]["group_names"]


def of_a_group_that_is_gone(described):
    described[0]["options"]["group_names"][0] = "thumbnail"


def of_more_groups_than_the_table(described):
    described[0]["options"]["group_names"].append("register")


@pytest.mark.parametrize(
    "change, says",
    [
        (without_group_names, "does not name the token groups"),
        (of_a_group_that_is_gone, "'thumbnail'"),
        (of_more_groups_than_the_table, "register"),
    ],
)
def test_groups_that_do_not_fit(tmp_path, change, says):
    path = tmp_path / "file.safetensors"
    save_interventions(path, (knock("post_softmax"),))
    respell(path, change)
    assert says in refusal(path)
