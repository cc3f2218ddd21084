"""P4's editors: as many parameters as the paper's, the loss by another way, gradients in each and nowhere else."""

import functools
import operator

import jax
import numpy as np
import optax
import pytest
from gradients import value_and_grad

from interventions.editing.editors import EDITOR_SITES, editor_parameters, init_editors
from train.edit import EDITOR_LABELS, Edited, EditorBatch, editor_label, editor_loss
from train.loop import fit
from train.subsets import split
from vlm_jax import UserError, load
from vlm_jax.checkpoints.leaves import abstract
from vlm_jax.data import load_task
from vlm_jax.info import config_of
from vlm_jax.inputs import Inputs
from vlm_jax.prompts import encode, positions

init = functools.partial(init_editors, key=jax.random.key(0))


def test_as_many_parameters_as_in_the_paper():
    """On CLIP-L and Vicuna-7B (the sizes of LLaVA-1.5-7B): editors in blocks 1 to 22 and in all 32 layers."""
    model = abstract(config_of("LLaVA-1.5-7B"))
    found = editor_parameters(jax.eval_shape(lambda: init(model, blocks=range(1, 23))))
    assert found == {"visual": 270_468, "cross": 49_158, "prefix": 32 * 32_772, "suffix": 32 * 32_772}
    assert sum(found.values()) == 2_417_034
    odd = editor_parameters(jax.eval_shape(lambda: init(model, blocks=range(1, 23, 2), layers=range(1, 32, 2))))
    assert odd["visual"] * 2 == found["visual"] and odd["prefix"] * 2 == found["prefix"]


def test_every_editor_begins_orthogonal():
    for name, editor in init(abstract(config_of("mini-qwen3-vl")), visual_rank=3).items():
        r, _, _ = editor.weights[EDITOR_SITES[name]]
        np.testing.assert_allclose(np.einsum("kdi,kdj->kij", r, r), [np.eye(r.shape[-1])] * len(r), atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rank": 0}, "the rank of the prefix editor is 0"),
        ({"visual_rank": 1000}, "the rank of the visual editor is 1000: give 1 to"),
        ({"layers": [8]}, "name some of 0 to 7"),
    ],
)
def test_refused_editors(changed, says):
    with pytest.raises(UserError, match=says):
        init(abstract(config_of("mini-qwen3-vl")), **changed)


def test_a_text_model_has_nothing_to_edit():
    with pytest.raises(UserError, match="no vision tower"):
        init(abstract(config_of("mini-llava-text")))


@pytest.fixture(scope="module", params=["mini-qwen3-vl", pytest.param("mini-llava", marks=pytest.mark.slow)])
def case(request):
    """Four prompts with images, an editor in every other block and layer, and what the loss takes."""
    model, processor = load(request.param)
    batch = encode(load_task("mini-textvqa", split="train", limit=4), processor, model.config)
    place, first = np.arange(batch.inputs.input_ids.shape[1]), batch.spans["question"].argmax(1)[:, None]
    last = batch.spans["answer"].argmax(1)[:, None]
    where = {"prefix": (first <= place) & (place < first + 4), "suffix": (last - 4 <= place) & (place < last)}
    # Not in the last layer: no answer reads its prefix, and there would be no gradient.
    blocks, layers = range(0, model.depths["visual"], 2), range(0, model.depths["text"], 2)
    editors = init(model, blocks=blocks, layers=layers)
    # Larger than they begin, so that each is felt.
    weights = {n: {site: (r, w, b + 2) for site, (r, w, b) in editor.weights.items()} for n, editor in editors.items()}
    editors = {name: editor.replace(weights=weights[name]) for name, editor in editors.items()}
    index, valid = positions(batch.spans["answer"] | batch.spans["end"])
    return model, batch.inputs, editors, EditorBatch(batch.inputs.turned(), where, index, valid)


def plain(model, inputs: Inputs, editors, batch: EditorBatch):
    """The loss from all logits of the model under the editors."""
    where = {**batch.where, "cross": inputs.is_image}
    acting = tuple(editor.replace(where=where.get(name)) for name, editor in editors.items())
    logp = jax.nn.log_softmax(model(inputs, acting).logits)
    rows = np.arange(len(batch.index))[:, None]
    target = np.take_along_axis(np.asarray(inputs.input_ids), batch.index, 1)
    return -(logp[rows, batch.index - 1, target] * batch.valid).sum() / batch.valid.sum()


def test_the_loss_is_that_of_the_edited_model(case):
    model, inputs, editors, batch = case
    found = jax.jit(editor_loss)(Edited(model, editors), batch, jax.random.key(0))
    wanted = plain(model, inputs, editors, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for left_out in editors:  # the control: each of them matters
        others = {name: editor for name, editor in editors.items() if name != left_out}
        assert abs(plain(model, inputs, others, batch) - wanted) > 3e-4 * wanted, left_out


def test_gradients_reach_every_editor(case):
    model, inputs, editors, batch = case
    trained, rest = split(Edited(model, editors), editor_label)
    _, found = jax.jit(value_and_grad(editor_loss))(trained, rest, batch, jax.random.key(0))

    def by_hand(weights):
        acting = {name: editor.replace(weights=weights[name]) for name, editor in editors.items()}
        return plain(model, inputs, acting, batch)

    wanted = jax.jit(jax.grad(by_hand))({name: editor.weights for name, editor in editors.items()})
    scale = float(optax.tree.norm(wanted))
    for name, site in EDITOR_SITES.items():
        for i, want in enumerate(wanted[name][site]):
            got = found[f"editors.{name}.weights.{site}.{i}"]
            assert all(np.abs(slot).max() > 0 for slot in np.asarray(got)), name
            np.testing.assert_allclose(got, want, atol=1e-5 * scale, err_msg=name)


def test_without_images_the_cross_editor_does_nothing(case):
    model, _, editors, batch = case
    texts = batch.replace(inputs=batch.inputs.replace(images=None, image_index=None))
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
