"""Token groups, and parts of them, against positions counted by hand; a knock-out between parts."""

import numpy as np
import pytest

import vlm_jax
from interventions import GROUPS, Add, AttentionKnockout, bind, label
from interventions.flow.knockout import edge
from interventions.kinds.groups import ROLES, check_group, check_positions, members, positions_of, roles, tokens_of
from vlm_jax import Inputs
from vlm_jax.data import load_task
from vlm_jax.prompts import SPANS, Batch, encode

G = {name: number for number, name in enumerate(GROUPS)}
#: Three rows: a long question, one of five tokens, none.
LABELS = np.array(
    [
        [G["before"], G["image"], *[G["question"]] * 9, G["after"], G["last"], G["answer"], G["padding"]],
        [G["before"], G["image"], G["after"], *[G["question"]] * 5, G["last"], *[G["answer"]] * 2, *[G["padding"]] * 4],
        [G["before"], *[G["after"]] * 8, G["last"], G["answer"], *[G["padding"]] * 4],
    ],
    np.int32,
)


def places(group):
    return [np.flatnonzero(row).tolist() for row in tokens_of(group, LABELS)]


@pytest.mark.parametrize(
    "group, expected",
    [
        ("question", [list(range(2, 11)), list(range(3, 8)), []]),
        ("first4:question", [[2, 3, 4, 5], [3, 4], []]),  # 5 < 8: half of five, rounded down
        ("last4:question", [[7, 8, 9, 10], [6, 7], []]),
        ("first1:question", [[2], [3], []]),
        ("first4:instruction", [[2, 3, 4, 5], [2, 3, 4], [1, 2, 3, 4]]),
        ("last4:instruction", [[8, 9, 10, 11], [5, 6, 7], [5, 6, 7, 8]]),
        ("last6:prompt", [[7, 8, 9, 10, 11, 12], [5, 6, 7, 8], [5, 6, 7, 8, 9]]),
        ("first2:question+last", [[2, 3, 12], [3, 4, 8], [9]]),
        ("first4:instruction+last4:instruction", [[2, 3, 4, 5, 8, 9, 10, 11], [2, 3, 4, 5, 6, 7], list(range(1, 9))]),
    ],
)
def test_tokens_of_a_group(group, expected):
    assert places(group) == expected


@pytest.mark.parametrize(
    "group, says",
    [
        ("first4:questoin", "unknown token group 'questoin'; did you mean 'question'"),
        ("first0:question", "has no tokens: give at least 1"),
        ("firstfour:question", "unknown token group"),
        ("first4:", "unknown token group"),
        ("", "unknown token group"),
    ],
)
def test_refused_groups(group, says):
    with pytest.raises(vlm_jax.UserError, match=says):
        check_group(group)


def test_a_part_is_no_whole_group():
    with pytest.raises(vlm_jax.UserError, match="is a part of a group, but a whole group is needed here"):
        members("first4:question")


def test_a_kind_acts_on_the_tokens_of_a_part():
    vector = np.ones((2, 1, 1), np.float32)
    bound = Add(vector, "text.resid_post", np.zeros(2, np.int32), group="last4:question").bound(LABELS)
    np.testing.assert_array_equal(bound.where, tokens_of("last4:question", LABELS))
    with pytest.raises(vlm_jax.UserError, match="acts on the tokens 'first2:image_end', but this batch has none"):
        Add(vector, "text.resid_post", np.zeros(2, np.int32), group="first2:image_end").bound(LABELS)


@pytest.mark.parametrize(
    "name, pair",
    [
        ("text:image", ("text", "image")),
        ("first4:question:image", ("first4:question", "image")),
        ("text:last2:image", ("text", "last2:image")),
        ("first4:question+last:last2:image", ("first4:question+last", "last2:image")),
    ],
)
def test_edges_between_parts(name, pair):
    assert edge(name) == pair


@pytest.fixture(scope="module")
def case():
    model, processor = vlm_jax.load("mini-llava")
    return model, encode(load_task("mini-vsr", split="trace", limit=3), processor, model.config)


@pytest.mark.parametrize("mode", ["pre_softmax", "post_softmax"])
def test_a_knockout_between_parts_cuts_exactly_these_tokens(case, mode):
    """The same probabilities as with a mask written from the tokens' places."""
    model, batch = case
    depth, labels = model.config.text.num_hidden_layers, label(batch)
    pair = ("first4:question+last", "question+first5:image")
    cut = AttentionKnockout.between(depth, *pair, [0], mode=mode)
    acting = bind((cut,), batch)
    found, plain = (
        np.asarray(model(batch.inputs, those, {"text.attn_probs": [0]}).taps["text.attn_probs"][0])
        for those in (acting, ())
    )
    away = tokens_of(pair[0], labels)[:, None, :, None] & tokens_of(pair[1], labels)[:, None, None, :]
    kept = np.where(away, 0, plain)
    if mode == "pre_softmax":
        with np.errstate(invalid="ignore"):
            kept = kept / kept.sum(-1, keepdims=True)
    real = labels != G["padding"]
    rows = np.broadcast_to(real[:, None, :], kept.shape[:3]) & np.isfinite(kept).all(-1)
    np.testing.assert_allclose(found[rows], kept[rows], atol=1e-6)
    assert np.abs(found[rows] - plain[rows]).max() > 1e-3  # the control


def test_parts_survive_saving(case, tmp_path):
    from interventions import load_interventions, save_interventions

    model, batch = case
    cut = AttentionKnockout.between(model.config.text.num_hidden_layers, "first4:question", "image")
    save_interventions(tmp_path / "cut.safetensors", (cut,))
    (loaded,) = load_interventions(tmp_path / "cut.safetensors")
    assert loaded.parts == ("first4:question",)
    one, other = (model(batch.inputs, bind((c,), batch)).logits for c in (cut, loaded))
    np.testing.assert_array_equal(one, other)
    whole = AttentionKnockout.between(model.config.text.num_hidden_layers, "question", "image")
    assert np.abs(np.asarray(one - model(batch.inputs, bind((whole,), batch)).logits)).max() > 1e-3


# ROME's roles


def made_up(subject, stop, length=9):
    """A row: the template's token, a question from 1 to ``stop``, its subject, and an answer from ``stop`` on."""
    spans = {name: np.zeros((1, length), bool) for name in SPANS}
    spans["question"][0, 1:stop] = spans["answer"][0, stop:] = True
    spans["subject"][0, subject[0] : subject[1]] = True
    mask = np.ones((1, length), bool)
    return Batch(Inputs(np.ones((1, length), np.int32), mask, np.zeros((3, 1, length), np.int32)), spans, 0)


@pytest.mark.parametrize(
    "subject, stop, expected",
    [
        ((2, 5), 8, [[2], [3], [4], [5], [6], [7]]),
        ((2, 4), 8, [[2], [], [3], [4], [5, 6], [7]]),
        ((2, 3), 8, [[2], [], [2], [3], [4, 5, 6], [7]]),
        ((2, 4), 5, [[2], [], [3], [4], [], [4]]),
        ((1, 5), 5, [[1], [2, 3], [4], [], [], [4]]),
    ],
    ids=["three", "two", "one", "next is last", "to the end"],
)
def test_roles(subject, stop, expected):
    batch = made_up(subject, stop)
    found = {name: np.flatnonzero(mask[0]).tolist() for name, mask in roles(batch).items()}
    expected = dict(zip(ROLES, expected, strict=True))
    assert found == expected
    for name, tokens in expected.items():
        np.testing.assert_array_equal(np.flatnonzero(positions_of(name, batch)[0]), tokens)
    both = np.flatnonzero(positions_of("first_subject+answer", batch)[0]).tolist()
    assert both == [subject[0], *range(stop, 9)]
    assert np.flatnonzero(positions_of("subject", batch)[0]).tolist() == list(range(*subject))
    assert np.flatnonzero(positions_of("first1:question", batch)[0]).tolist() == [1]


def test_names_of_positions():
    for name in ("last_subject", "subject", "question", "first4:question", "next+last", "all"):
        check_positions(name)
    for name, says in (("last_subjct", "did you mean 'last_subject'"), ("nxt", "unknown token group 'nxt'")):
        with pytest.raises(vlm_jax.UserError, match=says):
            check_positions(name)
