"""P4's editors: as many parameters as the paper's, the loss by another way, gradients in each and nowhere else."""

import functools
import operator

import jax
import numpy as np
import optax
import pytest
from gradients import value_and_grad

from interventions import GROUPS, bind, label
from interventions.editing.editors import EDITOR_SITES, editor_parameters, init_editors, lowest_acting
from interventions.editing.options import EditorOptions
from interventions.kinds.groups import tokens_of
from interventions.kinds.reft import EDITOR_KINDS
from train.editors import EDITOR_LABELS, Edited, edited_tokens, editor_label, editor_loss
from train.loop import fit
from train.subsets import split
from vlm_jax import UserError, load
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.data import load_task
from vlm_jax.info import config_of
from vlm_jax.prompts import Fitted, encode, positions

KEY = jax.random.key(0)
init = functools.partial(init_editors, key=KEY)


def placed(model, **options):
    """The editors of :class:`EditorOptions`, as shapes."""
    return jax.eval_shape(lambda: EditorOptions(**options).init(model, KEY))


def layers_of(model, name, **options):
    """In which blocks or layers an editor acts."""
    editor = EditorOptions(**options).init(model, KEY)[name]
    return np.flatnonzero(editor.active()[EDITOR_SITES[name]]).tolist()


@pytest.fixture(scope="module")
def llava():
    """CLIP-L and Vicuna-7B: the sizes of LLaVA-1.5-7B."""
    return abstract(config_of("LLaVA-1.5-7B"))


def test_as_many_parameters_as_in_the_released_code(llava):
    """Editors in blocks 1 to 22 and in all 32 layers."""
    found = editor_parameters(placed(llava, preset="repo"))
    assert found == {"visual": 270_468, "cross": 49_158, "prefix": 32 * 32_772, "suffix": 32 * 32_772}
    assert sum(found.values()) == 2_417_034


def test_the_papers_editors_are_in_odd_blocks_and_layers(llava):
    found = editor_parameters(placed(llava))
    assert found == {"visual": 11 * 12_294, "cross": 49_158, "prefix": 16 * 32_772, "suffix": 16 * 32_772}


@pytest.mark.parametrize("name, top", [("mini-llava", 3), ("mini-gemma3", 3), ("mini-qwen3-vl", 3)])
def test_presets_on_other_towers(name, top):
    """Blocks from 1 up to the one that the projector reads; mini-llava runs four of its five blocks."""
    model = abstract(config_of(name))
    assert layers_of(model, "visual", preset="repo") == list(range(1, top + 1))
    assert layers_of(model, "visual") == [block for block in range(1, top + 1) if block % 2]
    assert layers_of(model, "prefix", preset="repo") == list(range(8)) and layers_of(model, "suffix") == [1, 3, 5, 7]


def test_every_value_of_a_preset_is_an_option():
    model = abstract(config_of("mini-qwen3-vl"))
    assert layers_of(model, "suffix", layers=("even",)) == [0, 2, 4, 6]
    assert layers_of(model, "suffix", layers=("first",)) == [0, 1, 2, 3]
    assert layers_of(model, "suffix", layers=("last",)) == [4, 5, 6, 7]
    assert layers_of(model, "suffix", layers=("2", "5")) == [2, 5]
    assert layers_of(model, "visual", blocks=("0", "3")) == [0, 3]
    found = placed(model, editors=("cross", "prefix"), rank=2, visual_rank=3, length=7)
    assert set(found) == {"cross", "prefix"} and found["prefix"].group == "first7:instruction"
    assert found["prefix"].weights["text.resid_post"][0].shape == (4, 128, 2)
    assert found["cross"].weights["text.embeddings"][0].shape == (1, 128, 3)
    assert placed(model, preset="repo")["suffix"].group == "last6:instruction"
    assert placed(model)["suffix"].group == "last4:instruction"


def test_tied_editors_are_one_at_both_ends():
    found = placed(abstract(config_of("mini-qwen3-vl")), tied=True)
    assert found.keys() == {"visual", "cross", "ends"}
    assert found["ends"].group == "first4:instruction+last4:instruction"


def test_mores_steers_the_image_in_the_layers():
    found = placed(abstract(config_of("mini-qwen3-vl")), kind="MoReS")
    assert list(found) == ["steering"] and found["steering"].group == "image"
    assert found["steering"].sites == {"text.resid_post"} and type(found["steering"]).__name__ == "LoReFT"


@pytest.mark.parametrize("kind", EDITOR_KINDS)
def test_every_kind_has_its_arrays(kind):
    found = placed(abstract(config_of("mini-qwen3-vl")), kind=kind)
    for name, editor in found.items():
        arrays = editor.weights[EDITOR_SITES[name]]
        assert type(editor) is EDITOR_KINDS[kind] and len(arrays) == 1 + len(EDITOR_KINDS[kind].sources)


def test_an_editor_begins_alike_whichever_others_there_are():
    model = abstract(config_of("mini-qwen3-vl"))
    alone, among = (EditorOptions(editors=names).init(model, KEY)["suffix"] for names in (("suffix",), ()))
    assert all(map(np.array_equal, jax.tree.leaves(alone), jax.tree.leaves(among)))


def test_every_editor_begins_orthogonal():
    for name, editor in init(abstract(config_of("mini-qwen3-vl")), visual_rank=3).items():
        r, _, _ = editor.weights[EDITOR_SITES[name]]
        np.testing.assert_allclose(np.einsum("kdi,kdj->kij", r, r), [np.eye(r.shape[-1])] * len(r), atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rank": 129}, "the rank of the prefix editor is 129: give 1 to 128"),
        ({"rank": 0}, "--rank is 0"),
        ({"visual_rank": 1000}, "the rank of the visual editor is 1000: give 1 to 96"),
        ({"layers": ("8",)}, "name some of 0 to 7"),
        ({"blocks": ("4",)}, "name some of 0 to 3"),
        ({"layers": ("odd", "2")}, "--layers has 'odd': give numbers, or one of all"),
        ({"layers": ("middle",)}, "--layers has 'middle'"),
        ({"editors": ("sufix",)}, "unknown editor 'sufix'; did you mean 'suffix'"),
        ({"editors": ("suffix", "suffix")}, "--editors has a name twice"),
        ({"kind": "MoReS", "editors": ("suffix",)}, "--kind MoReS has an editor of its own"),
        ({"tied": True, "editors": ("suffix",)}, "--tied needs prefix and suffix"),
    ],
)
def test_refused_options(changed, says):
    with pytest.raises(UserError, match=says):
        EditorOptions(**changed).init(abstract(config_of("mini-qwen3-vl")), KEY)


def test_a_text_model_has_only_text_to_edit():
    model = abstract(config_of("mini-llava-text"))
    with pytest.raises(UserError, match="no vision tower, so there is nothing for the editor 'visual'"):
        placed(model)
    assert placed(model, editors=("prefix", "suffix")).keys() == {"prefix", "suffix"}


def test_the_backward_pass_ends_at_the_lowest_editor():
    model = abstract(config_of("mini-qwen3-vl"))

    def lowest(**options):
        return lowest_acting(model, EditorOptions(**options).init(model, KEY).values())

    assert lowest() == (1, 0) and lowest(blocks=("2", "3")) == (2, 0)
    assert lowest(editors=("prefix", "suffix")) == (4, 1)  # no block, and the layers from 1 on
    assert lowest(editors=("suffix",), layers=("5", "6")) == (4, 5)
    assert lowest(editors=("cross", "suffix"), layers=("5",)) == (4, 0)


@pytest.fixture(scope="module", params=["mini-qwen3-vl", pytest.param("mini-llava", marks=pytest.mark.slow)])
def case(request):
    """Four prompts with images, an editor in every other block and layer, and what the loss takes."""
    model, processor = load(request.param)
    batch = encode(load_task("mini-textvqa", split="train", limit=4), processor, model.config)
    # Not in the last layer: no answer reads its prefix, and there would be no gradient.
    blocks, layers = range(0, model.depths["visual"], 2), range(0, model.depths["text"], 2)
    editors = init(model, blocks=blocks, layers=layers)
    # Larger than they begin, so that each is felt.
    weights = {n: {site: (r, w, b + 2) for site, (r, w, b) in editor.weights.items()} for n, editor in editors.items()}
    editors = {name: editor.replace(weights=weights[name]) for name, editor in editors.items()}
    index, valid = positions(batch.spans["answer"] | batch.spans["end"])
    return model, batch, editors, Fitted(batch.inputs.turned(), index, valid, edited_tokens(editors)(batch))


def plain(model, encoded, editors, batch: Fitted):
    """The loss from all logits of the model under the editors, which are bound as any other intervention."""
    inputs = encoded.inputs
    logp = jax.nn.log_softmax(model(inputs, bind(tuple(editors.values()), encoded)).logits)
    rows = np.arange(len(batch.index))[:, None]
    target = np.take_along_axis(np.asarray(inputs.input_ids), batch.index, 1)
    return -(logp[rows, batch.index - 1, target] * batch.valid).sum() / batch.valid.sum()


def test_the_loss_is_that_of_the_edited_model(case):
    model, encoded, editors, batch = case
    found = jax.jit(editor_loss)(Edited(model, editors), batch, jax.random.key(0))
    wanted = plain(model, encoded, editors, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for left_out in editors:  # the control: each of them matters
        others = {name: editor for name, editor in editors.items() if name != left_out}
        assert abs(plain(model, encoded, others, batch) - wanted) > 3e-4 * wanted, left_out


def test_gradients_reach_every_editor(case):
    model, encoded, editors, batch = case
    trained, rest = split(Edited(model, editors), editor_label)
    _, found = jax.jit(value_and_grad(editor_loss))(trained, rest, batch, jax.random.key(0))

    def by_hand(weights):
        acting = {name: editor.replace(weights=weights[name]) for name, editor in editors.items()}
        return plain(model, encoded, acting, batch)

    wanted = jax.jit(jax.grad(by_hand))({name: editor.weights for name, editor in editors.items()})
    scale = float(optax.tree.norm(wanted))
    for name in editors:
        site = EDITOR_SITES[name]
        for i, want in enumerate(wanted[name][site]):
            got = found[f"editors.{name}.weights.{site}.{i}"]
            assert all(np.abs(slot).max() > 0 for slot in np.asarray(got)), name
            np.testing.assert_allclose(got, want, atol=1e-5 * scale, err_msg=name)


def matmuls(jaxpr):
    """How many matmuls a program runs; those in a loop count once for each turn."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            p for value in equation.params.values() for p in (value if isinstance(value, tuple | list) else [value])
        ]
        inner = sum(matmuls(getattr(p, "jaxpr", p)) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns"))
        total += inner * equation.params.get("length", 1) + (equation.primitive.name == "dot_general")
    return total


@pytest.mark.parametrize(
    "options", [{"blocks": ("2", "3")}, {"editors": ("suffix",), "layers": ("5", "6")}], ids=["tower", "decoder"]
)
def test_what_is_not_differentiated_changes_nothing_and_costs_nothing(case, options):
    """The same loss and gradients as with a backward pass through everything, with fewer matmuls."""
    model, encoded, _, _ = case
    editors = EditorOptions(**options).init(model, KEY)
    index, valid = positions(encoded.spans["answer"] | encoded.spans["end"])
    batch = Fitted(encoded.inputs.turned(), index, valid, edited_tokens(editors)(encoded))
    results = []
    for params in (Edited.of(model, editors), Edited(model, editors)):
        trained, rest = split(params, editor_label)
        traced = jax.jit(value_and_grad(editor_loss)).trace(trained, rest, batch, KEY)
        results.append((traced.lower().compile()(trained, rest, batch, KEY), matmuls(traced.jaxpr.jaxpr)))
    ((loss, gradient), count), ((whole_loss, whole_gradient), whole_count) = results
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
    for path, want in whole_gradient.items():
        np.testing.assert_allclose(gradient[path], want, atol=1e-5 * np.abs(want).max(), err_msg=path)
    # Of a layer that is not differentiated only the forward pass is left: a third, or less with remat.
    saved = 2 if "blocks" in options else 5
    assert whole_count - count >= saved * 7


def test_published_suffixes_are_at_the_end_of_the_answer(case):
    """As in P4's training code: the last tokens of the whole turn but one, though answering sees the prompt's end."""
    _, encoded, editors, batch = case
    published = edited_tokens(editors, published=True)(encoded)
    labels = label(encoded)
    for row in range(len(labels)):
        real = np.flatnonzero(labels[row] != GROUPS.index("padding"))
        np.testing.assert_array_equal(np.flatnonzero(published["suffix"][row]), real[-5:-1])
        prompt = real[~np.isin(labels[row, real], [GROUPS.index("answer")])]
        np.testing.assert_array_equal(np.flatnonzero(batch.where["suffix"][row]), prompt[-5:-1])
    for name in ("cross", "prefix"):
        np.testing.assert_array_equal(published[name], batch.where[name])
    np.testing.assert_array_equal(batch.where["suffix"], tokens_of("last4:instruction", labels))


def test_without_images_the_cross_editor_does_nothing(case):
    model, _, editors, batch = case
    where = {**batch.where, "cross": np.zeros_like(batch.where["cross"])}
    texts = batch._replace(inputs=batch.inputs.replace(images=None, image_index=None), where=where)
    site = EDITOR_SITES["cross"]
    r, w, b = editors["cross"].weights[site]
    changed = {**editors, "cross": editors["cross"].replace(weights={site: (r, w, b + 1)})}
    some, others = (Edited(model, those) for those in (editors, changed))
    key = jax.random.key(0)
    assert editor_loss(some, texts, key) == editor_loss(others, texts, key)
    assert editor_loss(some, batch, key) != editor_loss(others, batch, key)


def test_training_lowers_the_loss(case):
    model, _, editors, batch = case
    before = editor_loss(Edited(model, editors), batch, jax.random.key(0))
    micro = jax.tree.map(lambda a: np.asarray(a)[None], batch)
    transforms = dict.fromkeys(EDITOR_LABELS.values(), optax.adam(3e-3))
    trained = fit(editor_loss, Edited(model, editors), lambda step: micro, transforms, editor_label, steps=20).params
    assert editor_loss(trained, batch, jax.random.key(0)) < 0.5 * before
    assert all(map(operator.is_, jax.tree.leaves(trained.model), jax.tree.leaves(model)))
    for name, editor in editors.items():
        assert all(trained.editors[name].slot[site] is slot for site, slot in editor.slot.items()), name


def test_labels_are_those_of_the_paper(case):
    model, _, editors, _ = case
    trained, _ = split(Edited(model, editors), editor_label)
    assert len(trained) == 12 and {editor_label(path) for path in trained} == {"psi_V", "psi_c", "psi_P", "psi_S"}
    assert editor_label("editors.prefix.weights.text.resid_post.2") == "psi_P"
